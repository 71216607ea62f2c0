"""LightGCLLoss against its definition, and SVDView against the dense decomposition."""

import math

import pytest
import torch

from ccl_fast.losses import LightGCLLoss, SVDView
from tests.oracles.losses import assert_matches, batch, call, differentiate, infonce, learnable, reduced, unit

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
NODES = torch.tensor([6, 0, 3, 3, 8])


def views(n=9, d=6, dtype=torch.float64):
    return batch(n, 2, d, 1, dtype=dtype)[0].unbind(1)


def lightgcl(embeddings, view, nodes=None, *, temperature=0.2, normalize=True, reduction="mean", positive_limit=5.0):
    limit = torch.inf if positive_limit is None else positive_limit
    e, g = (unit(x.double()) if normalize else x.double() for x in (embeddings, view))
    batch = range(len(e)) if nodes is None else nodes.tolist()
    logits = {i: g @ e[i] / temperature for i in batch}
    losses = [logits[i].logsumexp(0) - logits[i][i].clamp(-limit, limit) for i in batch]
    return reduced(losses, [True] * len(losses), (len(losses),), reduction, embeddings)


def check(e, g, nodes=NODES, *, backend="auto", temperature=0.2, tolerance=1e-10, **options):
    leaves = [x.detach().requires_grad_() for x in (e, g)]
    module = learnable(LightGCLLoss, temperature, backend=backend, **options)
    actual = differentiate(call(module, *leaves, nodes), [*leaves, *module.parameters()])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = lightgcl(*exact, nodes, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature]), tolerance)


@pytest.mark.parametrize("nodes", (None, NODES, NODES.int(), torch.tensor([4])))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(nodes, reduction, backend):
    check(*views(), nodes, reduction=reduction, backend=backend)


@pytest.mark.parametrize("temperature, normalize", ((0.01, True), (1.0, True), (0.5, False)))
def test_options(temperature, normalize, backend):
    check(*views(), temperature=temperature, normalize=normalize, backend=backend)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    check(*views(33, dtype=dtype), tolerance=tolerance)


@pytest.mark.parametrize("positive_limit", (None, 0.5, 5.0))
def test_the_limit_of_positives(positive_limit, backend):
    for normalize, temperature in ((True, 0.02), (False, 0.5)):
        check(*views(), temperature=temperature, normalize=normalize, positive_limit=positive_limit, backend=backend)


def test_it_is_the_authors(backend):
    e = torch.tensor([[1.0, 0], [0, 2], [1, 1]], dtype=torch.float64)
    g = torch.tensor([[2.0, 0], [0, 1], [0.5, 0.5]], dtype=torch.float64)
    loss = LightGCLLoss(0.2, normalize=False, backend=backend)(g, e, nodes=torch.tensor([0, 2]))
    torch.testing.assert_close(loss.item(), 3.2132698376, rtol=0, atol=1e-9)


def test_all_nodes_are_infonce_of_one_direction():
    e, g = views()
    torch.testing.assert_close(call(LightGCLLoss(), e, g), infonce(e, g, temperature=0.2, symmetric=False))


def test_rows_that_do_not_lie_side_by_side():
    e, g = views()
    strided = [torch.empty(18, 6, dtype=e.dtype)[::2].copy_(x) for x in (e, g)]
    torch.testing.assert_close(call(LightGCLLoss(), *strided, NODES), call(LightGCLLoss(), e, g, NODES))


def test_authors_code():
    # Anchors of the view, plain products; their clamp at +-5 is out of reach here.
    e, g = (0.3 * x for x in views())
    theirs = (g[NODES] @ e.T / 0.2).exp().sum(1).log().mean() - ((g[NODES] * e[NODES]).sum(1) / 0.2).mean()
    torch.testing.assert_close(call(LightGCLLoss(normalize=False), g, e, NODES), theirs)


def test_the_order_of_nodes_is_of_no_effect():
    e, g = views()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        call(LightGCLLoss(), e[order], g[order], order.argsort()[NODES]), call(LightGCLLoss(), e, g, NODES)
    )


@pytest.mark.parametrize("n", (0, 9))
def test_empty_batch_is_zero_with_a_graph(n):
    e, g = (torch.ones(n, 6, requires_grad=True) for _ in range(2))
    loss = call(LightGCLLoss(), e, g, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and (e.grad == 0).all() and (g.grad == 0).all()


def test_errors():
    e, g = views()
    for arguments, message in (
        ((e[0], g), r"queries: expected shape \[rows, d\], got \[6\]"),
        ((e.long(), g.long()), "queries: expected float64, .* got torch.int64"),
        ((e, g[:4]), r"keys: expected shape \[9, 6\] \(that of queries\), got \[4, 6\]"),
        ((e, g.float()), "keys: expected dtype torch.float64"),
        ((e, g, NODES[None]), r"nodes: expected shape \[b\], got \[1, 5\]"),
        ((e, g, NODES > 3), "nodes: expected integers, got torch.bool"),
        ((e, g, [1, 2]), "nodes: expected a torch.Tensor, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            call(LightGCLLoss(), *arguments)
    for outside in (-1, 9):
        with pytest.raises(IndexError, match="expected rows 0 to"):
            call(LightGCLLoss(), e, g, torch.tensor([0, outside]))


# ---- the view ----


def interactions(users=30, items=17, dtype=torch.float64):
    """Of users with items, normalised by the degrees; a user and an item have none."""
    generator = torch.Generator().manual_seed(4)
    a = (torch.rand(users, items, generator=generator) < 0.2).to(dtype)
    a[3], a[:, 5] = 0, 0
    return a / (a.sum(1, keepdim=True) * a.sum(0)).clamp(min=1).sqrt()


sparse = pytest.mark.filterwarnings("ignore:Sparse")  # torch's own, of its sparse tensors
LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


@sparse
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", (1, 5, 17))
def test_view_is_the_truncated_decomposition(layout, rank):
    a = interactions()
    torch.manual_seed(0)
    view = SVDView(a if layout == torch.strided else a.to_sparse(layout=layout), rank=rank, iterations=400)
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    dense = u[:, :rank] * s[:rank] @ vt[:rank]
    items, users = batch(17, 0, 6, 1)[0].requires_grad_(), batch(30, 0, 6, 1)[0].requires_grad_()
    assert_matches(differentiate(view(items), [items]), differentiate(dense @ items, [items]), 1e-6)
    to_items = differentiate(view(users, transposed=True), [users])
    assert_matches(to_items, differentiate(dense.T @ users, [users]), 1e-6)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.float16, 0.002)))
@pytest.mark.parametrize("autocast", (False, True))
def test_view_in_other_dtypes(dtype, tolerance, autocast):
    a, items = interactions(), batch(17, 0, 6, 1, dtype=dtype)[0]
    view = SVDView(a.float(), rank=17)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = view(items)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), a @ items.double(), atol=tolerance, rtol=tolerance)


@sparse
def test_view_of_no_edge_is_zero():
    view = SVDView(torch.sparse_coo_tensor(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), (6, 4)), rank=3)
    assert (view(torch.ones(4, 2)) == 0).all()


def test_view_moves_and_is_saved_with_its_module():
    torch.manual_seed(0)
    view, other = (SVDView(interactions(), rank=2, iterations=n) for n in (2, 0))
    items = batch(17, 0, 6, 1)[0]
    assert not torch.equal(view(items), other(items))
    other.load_state_dict(view.state_dict())
    assert torch.equal(view(items), other(items))
    assert SVDView(interactions(), rank=2).to("meta").u.is_meta and not list(view.parameters())


@sparse
def test_view_of_many_nodes_stays_small():
    # 200,000 x 100,000 of density 1e-8: dense it would have 80 GB.
    generator = torch.Generator().manual_seed(0)
    edges = torch.stack([torch.randint(n, (300,), generator=generator) for n in (200_000, 100_000)])
    view = SVDView(torch.sparse_coo_tensor(edges, torch.ones(300), (200_000, 100_000)), rank=2, iterations=1)
    assert view(torch.ones(100_000, 1)).shape == (200_000, 1)
    assert math.isfinite(view.s.sum())


def test_view_errors():
    a = interactions()
    for arguments, message in (
        ((a[0],), r"adjacency: expected shape \[rows, d\], got \[17\]"),
        ((a.half(),), "adjacency: expected float32 or float64, got torch.float16"),
        ((a, 18), r"rank: expected an integer from 1 to 17 \(the smaller side\), got 18"),
        ((a, 0), "rank: expected an integer from 1 to 17"),
        ((a, 5, -1), "iterations: expected an integer >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call(SVDView, *arguments)
    view = SVDView(a)
    for transposed, rows in ((False, 17), (True, 30)):
        with pytest.raises(ValueError, match=f"embeddings: expected {rows} rows, got 9"):
            view(torch.ones(9, 2, dtype=a.dtype), transposed=transposed)

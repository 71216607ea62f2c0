"""PamCLoss against its definition, and against the full sums that it stands for."""

import pytest
import torch

from ccl_fast.losses import PamCLoss
from tests.losses.test_scgc import graph
from tests.oracles.losses import assert_matches, batch, differentiate, infonce, learnable, reduced, unit

pytestmark = [
    pytest.mark.usefixtures("one_thread", "several_tiles"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning"),
]
FORMS = ("meta-node", "node", "cluster")
every_form = pytest.mark.parametrize("form", FORMS)
IDS = torch.tensor([7, 0, -1, 7, 3, 0, 7, -1, 3])  # sizes 3, 2, 2 and two of their own


def pairs(n=9, d=6, dtype=torch.float64):
    return batch(n, 2, d, 1, dtype=dtype)[0].unbind(1)


def meta_nodes(z, ids, positives, temperature, normalize):
    """The authors': a matrix of clusters' similarities, one of rows', without their diagonals; a loss for each row."""
    own = [("own", i) if c < 0 else c for i, c in enumerate(ids)]
    sums = torch.stack([z[[c == cluster for c in own]].sum(0) for cluster in dict.fromkeys(own)])
    c, s = (x @ x.T for x in ((unit(sums), unit(z)) if normalize else (sums, z)))
    c, s = (x * (1 - torch.eye(len(x), dtype=x.dtype)) for x in (c, s))
    between = ((c / temperature).exp().sum(1) + 1e-10).log().mean()
    return between - ((positives * (s / temperature).exp()).sum(1) + 1e-10).log()


def pamc(queries, keys, ids, positives=None, *, temperature=0.1, form="meta-node", normalize=True, reduction="mean"):
    if form == "meta-node":
        z, n = queries.double(), len(queries)
        if keys is not None:
            z = torch.cat((z, keys.double()))
            positives = torch.eye(2 * n, dtype=z.dtype).roll(n, 0)
            # An unassigned sample is one cluster of both of its rows.
            ids = torch.where(ids < 0, 1000 + torch.arange(n), ids).repeat(2)
        losses = meta_nodes(z, ids.tolist(), positives.to_dense().double(), temperature, normalize)
        shape = (n,) if keys is None else (n, 2)
        losses = losses if keys is None else losses.view(2, n).T.flatten()
        return reduced(list(losses), [True] * len(losses), shape, reduction, queries)
    q, k = (unit(x.double()) if normalize else x.double() for x in (queries, keys))
    own = [("own", i) if c < 0 else c for i, c in enumerate(ids.tolist())]
    members = [[i for i, c in enumerate(own) if c == cluster] for cluster in dict.fromkeys(own)]
    q_means, k_means = (torch.stack([x[rows].mean(0) for rows in members]) for x in (q, k))
    size = [len(rows) for rows in members]
    losses = []
    for i in range(len(q)):
        if form == "node":
            total = sum(n * (q[i] @ c / temperature).exp() for n, c in zip(size, k_means, strict=True))
        else:
            total = sum(
                size[a] * size[b] * (q_means[a] @ k_means[b] / temperature).exp()
                for a in range(len(size))
                for b in range(len(size))
                if a != b
            )
        losses.append(total.log() - q[i] @ k[i] / temperature)
    return reduced(losses, [True] * len(losses), (len(losses),), reduction, queries)


AUTHORS = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.float64) / 3


@pytest.mark.parametrize("layout", ("to_sparse", "to_sparse_csr"))
def test_the_authors_value(layout, backend):
    z = torch.tensor([[2, 0], [1, 1], [0, 3], [-1, 1]], dtype=torch.float64)
    arguments = z, None, torch.tensor([0, 0, 1, 1])
    loss = PamCLoss(2.0, backend=backend)(*arguments, positives=getattr(AUTHORS, layout)())
    assert loss.item() == pytest.approx(0.5673834094, abs=1e-9)
    torch.testing.assert_close(loss, pamc(*arguments, AUTHORS, temperature=2.0))


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("temperature, normalize", ((0.05, True), (2.0, True), (0.5, False)))
@pytest.mark.parametrize("ids", (IDS, torch.full((9,), -1), torch.zeros(9, dtype=torch.long)))
def test_the_nodes_of_a_graph(ids, temperature, normalize, reduction, backend):
    """Some without an edge, some with one to themselves alone, whose similarity is 0."""
    z, positives = pairs()[0], graph()
    options = {"normalize": normalize, "reduction": reduction}
    module = learnable(PamCLoss, temperature, backend=backend, **options)
    leaf, log_temperature = z.requires_grad_(), torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    actual = module(leaf, None, ids, positives=positives.to_sparse())
    expected = pamc(leaf, None, ids, positives, temperature=log_temperature.exp(), **options)
    assert_matches(
        differentiate(actual, [leaf, *module.parameters()]), differentiate(expected, [leaf, log_temperature])
    )


def check(q, k, ids, *, backend="auto", temperature=0.1, tolerance=1e-10, **options):
    module, leaves = learnable(PamCLoss, temperature, backend=backend, **options), [q.clone(), k.clone()]
    leaves = [x.detach().requires_grad_() for x in leaves]
    actual = differentiate(module(*leaves, ids), [*leaves, *module.parameters()])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = pamc(*exact, ids, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature]), tolerance)


@every_form
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(form, reduction, backend):
    check(*pairs(), IDS, form=form, reduction=reduction, backend=backend)


@every_form
@pytest.mark.parametrize("temperature, normalize", ((0.01, True), (1.0, True), (0.5, False)))
def test_options(form, temperature, normalize, backend):
    check(*pairs(), IDS, form=form, temperature=temperature, normalize=normalize, backend=backend)


@every_form
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(form, dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    check(*pairs(33, dtype=dtype), torch.randint(0, 5, (33,), generator=generator), form=form, tolerance=tolerance)


@pytest.mark.parametrize("ids", (torch.arange(9), torch.full((9,), -1)))
def test_singletons_are_the_full_sum(ids, backend):
    q, k = pairs()
    torch.testing.assert_close(PamCLoss(form="node", backend=backend)(q, k, ids), infonce(q, k, symmetric=False))
    scores = unit(q) @ unit(k).T / 0.1
    between = scores.masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf).flatten().logsumexp(0)
    actual = PamCLoss(form="cluster", backend=backend)(q, k, ids)
    torch.testing.assert_close(actual, between - scores.diagonal().mean())


def test_equal_members_are_the_full_sum():
    q, k = pairs()
    rows = IDS.masked_fill(IDS < 0, 1)  # each member of a cluster is a copy of one row
    q, k = q[rows], k[rows]
    torch.testing.assert_close(PamCLoss(form="node")(q, k, rows), infonce(q, k, symmetric=False))


def test_never_above_the_full_sum():
    q, k = pairs(40)
    ids = torch.arange(40) % 7
    for temperature in (0.05, 0.5, 5.0):
        proxy = PamCLoss(temperature, form="node", reduction="none")(q, k, ids)
        full = infonce(q, k, temperature=temperature, symmetric=False, reduction="none")
        assert (proxy <= full + 1e-12).all()


@every_form
def test_one_cluster(form):
    q, k = (x.clone().requires_grad_() for x in pairs())
    loss = PamCLoss(form=form)(q, k, torch.zeros(9, dtype=torch.int64))
    loss.backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()
    if form == "cluster":  # nothing to contrast with
        assert loss == 0 and (q.grad == 0).all() and (k.grad == 0).all()


@every_form
def test_empty_batch_is_zero_with_a_graph(form):
    q, k = (torch.zeros(0, 6, requires_grad=True) for _ in range(2))
    loss = PamCLoss(form=form)(q, k, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and q.grad is not None and k.grad is not None


def test_errors():
    q, k = pairs()
    with pytest.raises(ValueError, match="form: expected one of 'meta-node', 'node', 'cluster', got 'edge'"):
        PamCLoss(form="edge")
    for arguments, message in (
        ((q, None, IDS), "keys: expected a torch.Tensor, got NoneType"),
        ((q, k[:4], IDS), r"keys: expected shape \[9, 6\]"),
        ((q, k, IDS[:4]), r"cluster_ids: expected shape \[9\], got \[4\]"),
        ((q, k, IDS.double()), "cluster_ids: expected integers, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            PamCLoss()(*arguments)
    edges = graph().to_sparse()
    for form, given, matrix, message in (
        ("node", None, edges, "positives: expected None with form='node', got a matrix"),
        ("cluster", None, edges, "positives: expected None with form='cluster', got a matrix"),
        ("meta-node", k, edges, "keys: expected None with positives, got keys"),
        ("meta-node", None, edges.to_dense(), "positives: expected a sparse tensor, CSR or COO"),
        ("meta-node", None, graph(8).to_sparse(), r"positives: expected shape \[9, 9\], got \[8, 8\]"),
        ("meta-node", None, -edges, "positives: expected weights >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            PamCLoss(form=form)(q, given, IDS, positives=matrix)
    with pytest.raises(ValueError, match="positives: expected None with process_group, got a matrix"):
        PamCLoss(process_group="world")._check(q, None, IDS, edges)

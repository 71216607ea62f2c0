"""SCGCLoss and its influence matrix against their definitions, and SupCon on a graph of classes."""

import pytest
import torch

from ccl_fast.losses import SCGCLoss, influence_matrix
from tests.oracles.losses import (
    assert_matches,
    batch,
    call,
    evaluate,
    evaluate_oracle,
    learnable,
    reduced,
    supcon,
    unit,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread", "several_tiles"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning"),
]


def nodes(n=9, d=6, dtype=torch.float64, seed=0):
    return batch(n, 0, d, 1, seed, dtype)[0]


@torch.compiler.disable  # torch 2.11 compiles no generator
def graph(n=9, edges=20, seed=0, dtype=torch.float64):
    """Dense weights: some nodes without an edge, some with one to themselves, most zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(n, n, dtype=torch.float64)
    weights[torch.randint(n, (2, edges), generator=generator).unbind()] = 1.0
    weights = weights * torch.rand(n, n, generator=generator, dtype=torch.float64)
    weights[2], weights[5] = 0.0, torch.eye(n)[5]
    return weights.to(dtype)


def scgc(embeddings, influence, *, temperature=1.0, self_term=True, normalize=True, reduction="mean"):
    z = unit(embeddings.double()) if normalize else embeddings.double()
    influence, losses = influence.to_dense().double(), []
    counted = [any(influence[i, j] > 0 for j in range(len(z)) if self_term or j != i) for i in range(len(z))]
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        if not counted[i]:
            losses.append(None)
            continue
        s, weights = z[others] @ z[i] / temperature, influence[i, others]
        if self_term:
            s, weights = torch.cat((s, s.new_zeros(1))), torch.cat((weights, influence[i, i][None]))
        losses.append(torch.logsumexp(s, 0) - torch.logsumexp(s + weights.log(), 0))
    return reduced(losses, counted, (len(z),), reduction, embeddings)


def check(z, influence, *, backend="auto", temperature=1.0, tolerance=1e-10, **options):
    actual = evaluate(learnable(SCGCLoss, temperature, backend=backend, **options), z, influence)
    assert_matches(actual, evaluate_oracle(scgc, z, influence, temperature=temperature, **options), tolerance)
    return actual


@pytest.mark.parametrize("sparse", (torch.Tensor.to_sparse_coo, torch.Tensor.to_sparse_csr), ids=("coo", "csr"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(sparse, reduction, backend):
    check(nodes(), sparse(graph()), reduction=reduction, backend=backend)


@pytest.mark.parametrize("temperature, normalize", ((0.01, True), (0.1, True), (4.0, True), (0.5, False)))
def test_options(temperature, normalize, backend):
    check(nodes(), graph().to_sparse(), temperature=temperature, normalize=normalize, backend=backend)


@pytest.mark.parametrize("weights", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance, weights):
    z, influence = nodes(33, dtype=dtype), graph(33, 100, dtype=weights).to_sparse()
    _, gradient, _ = check(z, influence, tolerance=tolerance, temperature=0.2)
    assert call(SCGCLoss(), z, influence).dtype == torch.float32 and gradient.dtype == dtype


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    with torch.autocast("cpu", dtype=dtype):
        check(nodes(33, dtype=torch.float32), graph(33, 100).to_sparse(), tolerance=0.03, temperature=0.2)


def test_improbable_positives_at_a_low_temperature():
    z = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.0]])
    influence = torch.zeros(3, 3)
    influence[0, 2] = 1e-30
    loss, *_ = check(z, influence.to_sparse(), temperature=0.005, tolerance=1e-5)
    assert loss > 400


def test_unordered_edges_repeated_edges_and_stored_zeros(backend):
    rows, columns = torch.tensor([[4, 0, 0, 3, 0, 1, 1], [1, 2, 2, 3, 1, 0, 1]])
    weights = torch.tensor([1.0, 2.0, 3.0, 1.0, 4.0, 0.0, 5.0], dtype=torch.float64)
    influence = torch.sparse_coo_tensor(torch.stack((rows, columns)), weights, (5, 5), check_invariants=True)
    assert not influence.is_coalesced()
    losses, *_ = check(nodes(5), influence, self_term=False, reduction="none", backend=backend)
    check(nodes(5), influence, backend=backend)
    assert losses.count_nonzero() == 2 and not influence.is_coalesced()
    nothing = torch.sparse_coo_tensor(influence._indices(), -0.0 * weights, (5, 5), check_invariants=True)
    check(nodes(5), nothing)


def test_nothing_on_the_way_back_is_not_a_number():
    z = nodes().requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        call(SCGCLoss(), z, graph().to_sparse()).backward()  # with nodes without an edge, or with only their own
    assert z.grad.isfinite().all()


def test_csr_of_int32():
    csr = graph().to_sparse_csr()
    crow, columns = csr.crow_indices().int(), csr.col_indices().int()
    narrow = torch.sparse_csr_tensor(crow, columns, csr.values(), check_invariants=True)
    assert narrow.crow_indices().dtype == torch.int32
    check(nodes(), narrow)


def test_the_graph_of_the_classes_is_supcon():
    labels = torch.tensor([0, 1, -1, 0, 2, 1, 0, 3, 1])
    influence = ((labels[:, None] == labels) & (labels >= 0)).double().to_sparse()
    actual = evaluate(learnable(SCGCLoss, 0.2, self_term=False), nodes(), influence)
    assert_matches(actual, evaluate_oracle(supcon, nodes(), labels, temperature=0.2, form="inside"))


def test_a_full_graph_of_ones_is_zero_and_a_factor_is_a_constant():
    full, half = torch.ones(9, 9), torch.full((9, 9), 0.5)
    assert call(SCGCLoss(0.1), nodes(), full.to_sparse()).abs() < 1e-12
    losses = call(SCGCLoss(0.1, reduction="none"), nodes(), half.to_sparse())
    torch.testing.assert_close(losses, torch.full((9,), 2.0, dtype=torch.float64).log())


def test_the_order_of_the_nodes_and_their_own_entries_make_no_difference():
    order, influence = torch.randperm(9), graph()
    loss_fn = SCGCLoss(self_term=False, reduction="none")
    losses = call(loss_fn, nodes(), influence.to_sparse())
    torch.testing.assert_close(call(loss_fn, nodes()[order], influence[order][:, order].to_sparse()), losses[order])
    torch.testing.assert_close(call(loss_fn, nodes(), (influence + 7 * torch.eye(9)).to_sparse()), losses)


@pytest.mark.parametrize("layout", (torch.sparse_coo, torch.sparse_csr))
@pytest.mark.parametrize("n", (0, 1, 9))
def test_no_edges_is_zero_with_a_graph(n, layout):
    z = nodes(n).requires_grad_()
    loss = call(SCGCLoss(), z, torch.zeros(n, n).to_sparse(layout=layout))
    loss.backward()
    assert loss == 0 and (z.grad == 0).all() and z.grad.shape == z.shape


def test_one_node_with_an_edge_to_itself():
    z = nodes(1).requires_grad_()
    loss = call(SCGCLoss(), z, torch.ones(1, 1).to_sparse())
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


def test_the_influence_gets_no_gradient():
    influence = graph().to_sparse().requires_grad_()
    loss = call(SCGCLoss(), nodes().requires_grad_(), influence)
    loss.backward()
    assert influence.grad is None


@pytest.mark.parametrize("temperature", (0.1, 2.0))
def test_without_the_self_term(temperature, backend):
    check(nodes(), graph().to_sparse(), temperature=temperature, self_term=False, backend=backend)


def test_it_is_the_authors(backend):
    z = torch.tensor([[2.0, 0], [1, 1], [0, 3], [-1, 1]], dtype=torch.float64)
    ring = torch.tensor([[0.0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]], dtype=torch.float64)
    given = torch.tensor([[1.0, 1, 0, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.float64) / 3
    influence = influence_matrix(ring.to_sparse(), hops=1)
    torch.testing.assert_close(influence.to_dense(), given)
    loss = call(SCGCLoss(2.0, backend=backend), z, influence)
    torch.testing.assert_close(loss.item(), 1.3528774380, rtol=0, atol=1e-9)


# ---- influence_matrix ----


def adjacency(n=9, seed=1):
    weights = graph(n, seed=seed).triu(1)
    return weights + weights.T


@pytest.mark.parametrize("sparse", (torch.Tensor.to_sparse_coo, torch.Tensor.to_sparse_csr), ids=("coo", "csr"))
@pytest.mark.parametrize("hops", (1, 2, 4))
@pytest.mark.parametrize("cumulative", (True, False))
@pytest.mark.parametrize("normalization", ("rows", "symmetric"))
def test_influence_is_the_sum_of_the_powers(sparse, hops, cumulative, normalization):
    weights = adjacency() + torch.eye(9)
    degree = weights.sum(1)
    scaled = weights / (degree[:, None] if normalization == "rows" else degree.outer(degree).sqrt())
    powers = [torch.linalg.matrix_power(scaled, r) for r in range(1, hops + 1)]
    actual = influence_matrix(sparse(adjacency()), hops=hops, cumulative=cumulative, normalization=normalization)
    assert actual.layout == torch.sparse_coo and actual.is_coalesced()
    torch.testing.assert_close(actual.to_dense(), sum(powers) if cumulative else powers[-1])
    assert actual.values().numel() == (actual.to_dense() > 0).sum()
    check(nodes(), actual)


def test_influence_reaches_as_far_as_its_hops():
    path = torch.zeros(6, 6)
    path[range(5), range(1, 6)] = path[range(1, 6), range(5)] = 1.0
    distance = (torch.arange(6)[:, None] - torch.arange(6)).abs()
    for hops in (1, 2, 3):
        influence = influence_matrix(path.to_sparse(), hops=hops)
        assert influence.dtype == torch.float32 and torch.equal(influence.to_dense() > 0, distance <= hops)
    assert torch.equal(
        influence_matrix(path.to_sparse()).to_dense(), influence_matrix(path.to_sparse(), hops=2).to_dense()
    )


def test_influence_without_edges():
    for n in (0, 1, 4):
        actual = influence_matrix(torch.zeros(n, n).to_sparse(), hops=3)
        torch.testing.assert_close(actual.to_dense(), 3 * torch.eye(n))


# ---- errors ----


def test_errors():
    sparse = graph().to_sparse()
    for arguments, message in (
        ((nodes(), graph()), r"influence: expected a sparse tensor, CSR or COO, got layout torch.strided"),
        ((nodes(), graph().to_sparse_csc()), r"influence: expected a sparse tensor, CSR or COO, got layout torch.sp"),
        ((nodes(), None), "influence: expected a torch.Tensor, got NoneType"),
        ((nodes(), graph().to_sparse(1)), "influence: expected two sparse dimensions, got 1"),
        ((nodes(4), sparse), r"influence: expected shape \[4, 4\], got \[9, 9\]"),
        ((nodes(), sparse.long()), "influence: expected float64, float32, bfloat16 or float16, got torch.int64"),
        ((nodes(), -sparse), "influence: expected weights >= 0, got a smallest of -"),
        ((nodes(), sparse * torch.nan), "influence: expected weights >= 0, got a smallest of nan"),
        ((nodes(), -graph().to_sparse_csr()), "influence: expected weights >= 0, got a smallest of -"),
        ((nodes().to("meta"), sparse), "influence: expected device meta"),
        ((nodes()[0], sparse), r"embeddings: expected shape \[rows, d\], got \[6\]"),
        ((nodes().long(), sparse), "embeddings: expected float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call(SCGCLoss(), *arguments)
    for arguments, message in (
        ((adjacency(),), "adjacency: expected a sparse tensor"),
        ((adjacency()[:4].to_sparse(),), r"adjacency: expected shape \[4, 4\], got \[4, 9\]"),
        ((adjacency()[0].to_sparse(),), r"adjacency: expected shape \[9, 9\], got \[9\]"),
        ((adjacency().half().to_sparse(),), "adjacency: expected float32 or float64, got torch.float16"),
        ((-adjacency().to_sparse(),), "adjacency: expected weights >= 0"),
        ((adjacency().to_sparse(), 0), "hops: expected a positive integer, got 0"),
        ((adjacency().to_sparse(), True), "hops: expected a positive integer, got True"),
        ((adjacency().to_sparse(), 2.0), r"hops: expected a positive integer, got 2\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call(influence_matrix, *arguments)

"""AdaMEOWLoss against its definition, InfoNCE and MEOWLoss; PairWeights against the authors' formula."""

import pytest
import torch

from ccl_fast.losses import AdaMEOWLoss, MEOWLoss, PairWeights
from tests.losses.test_cluster_negatives import example
from tests.oracles.losses import assert_matches, batch, call, differentiate, infonce, largest, learnable, reduced, unit

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
IDS = torch.tensor([3, 0, -1, 3, 0, 3, 1, -1, 0])  # none of cluster 2
# Whether two towers come, and whether both are anchors.
USES = {"views": (False, True), "two towers": (True, True), "one direction": (True, False)}
every_use = pytest.mark.parametrize("use", USES)


def matrix(k=4, dtype=torch.float64, seed=7):
    """Not symmetric, with weights of 0, near it, and above 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(k, k, generator=generator, dtype=torch.float64)
    weights[0, 3], weights[3, 3], weights[3, 0], weights[0, 1] = 0.0, 0.0, 1e-4, 3.0
    return weights.to(dtype)


def adameow(
    queries, ids, weights, keys=None, *, temperature=0.1, symmetric=True, normalize=True, reduction="mean",
    weigh_positive=True,
):  # fmt: skip
    scaled = unit if normalize else torch.Tensor.double
    pairs = scaled(queries.double() if keys is None else torch.stack((queries, keys), dim=1).double())
    n, losses, weights = len(pairs), [], weights.double()
    for i in range(n):
        for side in (0, 1) if symmetric else (0,):
            positive = (pairs[i, 1 - side] @ pairs[i, side] / temperature).exp()
            own = weights[ids[i], ids[i]] if ids[i] >= 0 and weigh_positive else 1.0
            total = own * positive
            for j in range(n):
                weight = weights[ids[i], ids[j]] if ids[i] >= 0 and ids[j] >= 0 else 1.0
                for other in (0, 1) if keys is None else (1 - side,):
                    if j != i:
                        total = total + weight * (pairs[j, other] @ pairs[i, side] / temperature).exp()
            losses.append(total.log() - positive.log() if total > 0 else None)
    return reduced(losses, [x is not None for x in losses], (n, 2) if symmetric else (n,), reduction, queries)


def tensors(use, n=9, dtype=torch.float64):
    towers, symmetric = USES[use]
    views = batch(n, 2, 6, 1, dtype=dtype)[0]
    return ([views[:, 0], views[:, 1]] if towers else [views]), symmetric


def check(
    use, *, ids=IDS, weights=None, backend="auto", temperature=0.1, tolerance=1e-10, dtype=torch.float64, **options
):
    leaves, options["symmetric"] = tensors(use, dtype=dtype)
    weights = matrix(dtype=torch.promote_types(dtype, torch.float32)) if weights is None else weights
    leaves = [x.clone().requires_grad_() for x in (leaves[0], weights, *leaves[1:])]
    module = learnable(AdaMEOWLoss, temperature, backend=backend, **options)
    value = call(module, leaves[0], ids, *leaves[1:])
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    actual = differentiate(value, [*leaves, *module.parameters()])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    value = adameow(exact[0], ids, *exact[1:], temperature=log_temperature.exp(), **options)
    expected = differentiate(value, [*exact, log_temperature])
    expected[2] = expected[2].masked_fill(weights == 0, 0.0)  # a weight of 0 stays 0
    assert_matches(actual, expected, tolerance)


@every_use
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(use, reduction, backend):
    check(use, reduction=reduction, backend=backend)


@every_use
@pytest.mark.parametrize("temperature, normalize", ((0.02, True), (1.0, True), (30.0, True), (0.5, False)))
def test_options(use, temperature, normalize, backend):
    check(use, temperature=temperature, normalize=normalize, backend=backend)


@every_use
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(use, dtype, tolerance):
    check(use, dtype=dtype, tolerance=tolerance)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.2)))
@pytest.mark.parametrize("smallest", (1e-30, 1e-10, 1e-3))
def test_tiny_weights(dtype, tolerance, smallest):
    weights = smallest * (1 + torch.arange(16).view(4, 4)).to(torch.promote_types(dtype, torch.float32))
    weights[0] = 1.0
    # 1e-30 has a logarithm of -69, so bfloat16 knows it to some 14 %.
    check("views", weights=weights, dtype=dtype, tolerance=tolerance)


@every_use
def test_weights_of_one_are_infonce(use, backend):
    z, symmetric = tensors(use)
    for ids in (IDS, torch.full((9,), -1)):
        ours = call(AdaMEOWLoss(symmetric=symmetric, backend=backend), z[0], ids, torch.ones(4, 4), *z[1:])
        torch.testing.assert_close(ours, infonce(*z, symmetric=symmetric))


@every_use
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16))
@pytest.mark.parametrize("normalize", (True, False))
def test_weights_of_zero_within_a_cluster_are_meow(use, dtype, normalize, backend):
    z, symmetric = tensors(use, dtype=dtype)
    leaves = [x.requires_grad_() for x in z]
    options = {"symmetric": symmetric, "backend": backend, "normalize": normalize, "temperature": 0.2}
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    # An unassigned anchor's own positive has the weight 1 here, 0 there.
    for ids, weigh in ((IDS, False), (IDS.clamp(min=0), True)):
        ours, theirs = (loss(weigh_positive=weigh, **options) for loss in (AdaMEOWLoss, MEOWLoss))
        ours, theirs = (
            call(ours, leaves[0], ids, 1 - torch.eye(4), *leaves[1:]),
            call(theirs, leaves[0], ids, *leaves[1:]),
        )
        assert_matches(differentiate(ours, leaves), differentiate(theirs, leaves), tolerance)


@every_use
def test_the_positive_has_the_weight_one_if_wanted(use, backend):
    check(use, weigh_positive=False, backend=backend)


def test_it_is_the_authors(backend):
    q, k, ids, _ = example()
    w = torch.tensor([[0.2, 0.7], [0.4, 0.9]], dtype=torch.float64)
    for weigh, value in ((True, -0.1493268719), (False, 0.3469495844)):
        loss_fn = AdaMEOWLoss(0.5, symmetric=False, weigh_positive=weigh, backend=backend)
        torch.testing.assert_close(loss_fn(q, ids, weights=w, keys=k).item(), value, rtol=0, atol=1e-9)


@every_use
def test_all_weights_times_a_number_leave_the_gradients(use):
    z, symmetric = tensors(use)
    leaves, found = [x.requires_grad_() for x in z], []
    for factor in (1.0, 7.0):
        weights = (factor * matrix()).requires_grad_()
        value = call(AdaMEOWLoss(symmetric=symmetric), leaves[0], IDS.clamp(min=0), weights, *leaves[1:])
        found.append((value.detach() - torch.tensor(factor).log(), *torch.autograd.grad(value, leaves)))
    for once, times in zip(*found, strict=True):
        torch.testing.assert_close(once, times)


@every_use
@pytest.mark.parametrize("normalize, length", ((True, 1.0), (False, 3.0), (False, 50.0)))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_weights_of_zero_remove_all_negatives(use, normalize, length, dtype, backend):
    z, symmetric = tensors(use, dtype=dtype)
    leaves = [(length * x).requires_grad_() for x in z]
    weights = torch.zeros(2, 2, requires_grad=True)
    loss = AdaMEOWLoss(symmetric=symmetric, normalize=normalize, backend=backend)
    value = call(loss, leaves[0], torch.zeros(9, dtype=torch.int64), weights, *leaves[1:])
    assert value == 0 and all(largest(x) == 0 for x in differentiate(value, [*leaves, weights]))


def test_a_weight_counts_members_like_copies():
    # Twice the weight is each member twice.
    z, ids = batch(9, 2, 6, 1)[0], torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1])
    weights = torch.tensor([[1.0, 2.0], [1.0, 1.0]])
    once = call(AdaMEOWLoss(reduction="none", symmetric=False), z[:, 0], ids, weights, z[:, 1])
    rows = torch.cat((torch.arange(9), torch.arange(3, 9)))
    q, k = z[rows, 0], z[rows, 1]
    twice = call(AdaMEOWLoss(reduction="none", symmetric=False), q, ids[rows], torch.ones(2, 2), k)
    torch.testing.assert_close(once[:3], twice[:3])


@pytest.mark.parametrize("k", (0, 4))
def test_empty_batch_is_zero_with_a_graph(k):
    z, weights = torch.zeros(0, 2, 6, requires_grad=True), torch.ones(k, k)
    value = call(AdaMEOWLoss(), z, torch.zeros(0, dtype=torch.int64), weights)
    value.backward()
    assert value == 0 and z.grad is not None


def test_no_cluster_at_all_is_infonce():
    z = batch(9, 2, 6, 1)[0]
    ours = call(AdaMEOWLoss(), z, torch.full((9,), -1), torch.ones(0, 0))
    torch.testing.assert_close(ours, infonce(z))


def test_errors():
    z, weights = batch(9, 2, 6, 1)[0], matrix()
    for arguments, message in (
        ((z, IDS[:3], weights), r"cluster_ids: expected shape \[9\], got \[3\]"),
        ((z, IDS, weights[:3]), r"weights: expected shape \[k, k\], got \[3, 4\]"),
        ((z, IDS, weights > 0), "weights: expected float64, .* got torch.bool"),
        ((z, IDS, weights - 0.5), "weights: expected finite numbers >= 0, got -0.5 to 2.5"),
        ((z, IDS, weights * torch.inf), "weights: expected finite numbers >= 0, got nan to"),
        ((z, IDS, weights.to("meta")), "weights: expected device cpu"),
        ((z[:, 0], IDS, weights, z[:4, 1]), r"keys: expected shape \[9, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(AdaMEOWLoss(), *arguments)
    with pytest.raises(IndexError, match=r"cluster_ids: expected ids from -1 to 2 .* got -1 to 3"):
        call(AdaMEOWLoss(), z, IDS, weights[:3, :3])


# ---- the network ----


def test_pair_weights_are_the_network_of_sums():
    torch.manual_seed(0)
    network = PairWeights(6, hidden=5).double()
    a, b = batch(4, 2, 6, 1)[0].unbind(1)
    first, second = network.first, network.second
    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_(), *network.parameters()]
    actual = differentiate(network(*leaves[:2]), leaves)
    sums = leaves[0][:, None] + leaves[1][None]
    dense = torch.sigmoid(second(torch.tanh(first(sums))))[..., 0]
    assert_matches(actual, differentiate(dense, leaves))
    torch.testing.assert_close(network(a), network(a, a))
    torch.testing.assert_close(network(a), network(a).T)


def test_single_samples_with_the_network_are_the_authors_weights():
    torch.manual_seed(0)
    network, (q, k) = PairWeights(6).double(), (unit(x) for x in batch(9, 2, 6, 1)[0].unbind(1))
    loss = call(AdaMEOWLoss(temperature=0.9, symmetric=False, reduction="none"), q, torch.arange(9), network(q, k), k)
    dots = (q @ k.T / 0.9).exp()
    torch.testing.assert_close(loss, -(dots.diagonal() / (dots * network(q, k)).sum(1)).log())


def test_the_network_learns_through_the_loss():
    torch.manual_seed(0)
    network, z = PairWeights(6), batch(9, 2, 6, 1, dtype=torch.float32)[0]
    centers = batch(4, 0, 6, 1, seed=2, dtype=torch.float32)[0]
    optimiser = torch.optim.SGD(network.parameters(), lr=1.0)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = call(AdaMEOWLoss(), z, IDS, network(centers))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.01

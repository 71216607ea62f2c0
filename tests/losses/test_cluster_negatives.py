"""MCLLoss, MEOWLoss and CenterNegativesLoss against their definition, and InfoNCE."""

import pytest
import torch

from ccl_fast import InfoNCELoss
from ccl_fast.losses import CenterNegativesLoss, MCLLoss, MEOWLoss
from tests.oracles.losses import assert_matches, batch, call, differentiate, infonce, largest, learnable, reduced, unit

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
IDS = torch.tensor([4, 0, -1, 4, 0, 4, 2, -1, 0])
STAGES = (IDS, torch.tensor([1, 1, 1, 1, 0, 0, 0, 1, 1]))
# Whether two towers come, and whether both are anchors.
USES = {"views": (False, True), "two towers": (True, True), "one direction": (True, False)}
every_use = pytest.mark.parametrize("use", USES)
LOSSES = (MCLLoss, MEOWLoss)
every_loss = pytest.mark.parametrize("loss", LOSSES)


def is_negative(loss, ids, i, j):
    """Whether sample j's rows are negatives of sample i, i != j."""
    if loss is MEOWLoss:
        return bool(ids[i] != ids[j] or ids[i] < 0)
    return all(bool(stage[i] == stage[j] and stage[i] >= 0) for stage in ids)


def definition(
    loss, queries, ids, keys=None, *, temperature=0.1, symmetric=True, normalize=True, reduction="mean",
    weigh_positive=True,
):  # fmt: skip
    scaled = unit if normalize else torch.Tensor.double
    pairs = scaled(queries.double() if keys is None else torch.stack((queries, keys), dim=1).double())
    n, losses = len(pairs), []
    for i in range(n):
        negatives = [j for j in range(n) if j != i and is_negative(loss, ids, i, j)]
        for side in (0, 1) if symmetric else (0,):
            seen = (0, 1) if keys is None else (1 - side,)
            rows = torch.stack([pairs[i, 1 - side], *(pairs[j, other] for j in negatives for other in seen)])
            logits = rows @ pairs[i, side] / temperature
            if loss is MEOWLoss and weigh_positive:
                losses.append(logits[1:].logsumexp(0) - logits[0] if negatives else None)
            else:
                losses.append(-logits.log_softmax(0)[0])
    return reduced(losses, [x is not None for x in losses], (n, 2) if symmetric else (n,), reduction, queries)


def center_negatives(embeddings, ids, centers, *, temperature=0.1, normalize=True, reduction="mean"):
    scaled = unit if normalize else torch.Tensor.double
    z, mu = scaled(embeddings.double()), scaled(centers.detach().double())
    losses = []
    for i, id_ in enumerate(ids.tolist()):
        for side in (0, 1):
            rows = [z[j, other] for j in range(len(z)) for other in (0, 1) if (j, other) != (i, side)]
            rows += [mu[c] for c in range(len(mu)) if c != id_]
            logits = torch.stack(rows) @ z[i, side] / temperature
            losses.append(logits.logsumexp(0) - z[i, 0] @ z[i, 1] / temperature)
    return reduced(losses, [True] * len(losses), embeddings.shape[:2], reduction, embeddings)


def tensors(use, n=9, dtype=torch.float64):
    towers, symmetric = USES[use]
    views = batch(n, 2, 6, 1, dtype=dtype)[0]
    return ([views[:, 0], views[:, 1]] if towers else [views]), symmetric


def ids_of(loss):
    return STAGES if loss is MCLLoss else IDS


def check(loss, use, *, ids=None, backend="auto", temperature=0.1, tolerance=1e-10, dtype=torch.float64, **options):
    leaves, options["symmetric"] = tensors(use, dtype=dtype)
    ids = ids_of(loss) if ids is None else ids
    leaves = [x.clone().requires_grad_() for x in leaves]
    module = learnable(loss, temperature, backend=backend, **options)
    value = call(module, leaves[0], ids, *leaves[1:])
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    actual = differentiate(value, [*leaves, *module.parameters()])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = definition(loss, exact[0], ids, *exact[1:], temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature]), tolerance)


@every_loss
@every_use
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(loss, use, reduction, backend):
    check(loss, use, reduction=reduction, backend=backend)


@every_loss
@every_use
@pytest.mark.parametrize("temperature, normalize", ((0.005, True), (1.0, True), (0.5, False)))
def test_options(loss, use, temperature, normalize, backend):
    check(loss, use, temperature=temperature, normalize=normalize, backend=backend)


@every_loss
@every_use
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(loss, use, dtype, tolerance):
    check(loss, use, dtype=dtype, tolerance=tolerance)


@every_use
@pytest.mark.parametrize("stages", ((), (torch.full((9,), 3),), (torch.zeros(9, dtype=torch.int32),) * 2))
def test_mcl_of_one_cluster_is_infonce(use, stages, backend):
    z, symmetric = tensors(use)
    ours = call(MCLLoss(symmetric=symmetric, backend=backend), z[0], stages, *z[1:])
    torch.testing.assert_close(ours, call(InfoNCELoss(symmetric=symmetric, backend=backend), *z))
    torch.testing.assert_close(ours, infonce(*z, symmetric=symmetric))


@every_use
@pytest.mark.parametrize("ids", (torch.arange(9), torch.full((9,), -1)))
def test_meow_of_single_samples_is_infonce(use, ids, backend):
    z, symmetric = tensors(use)
    ours = call(MEOWLoss(symmetric=symmetric, weigh_positive=False, backend=backend), z[0], ids, *z[1:])
    torch.testing.assert_close(ours, infonce(*z, symmetric=symmetric))


@every_use
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_meow_with_the_positive_in_the_sum(use, reduction, backend):
    check(MEOWLoss, use, reduction=reduction, backend=backend, weigh_positive=False)


def example():
    """Queries, keys and two clusterings, of which the authors' code makes the numbers below at T = 0.5."""
    q = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    k = torch.tensor([[0.8, 0.6], [-0.6, 0.8], [-0.8, -0.6], [0.6, -0.8]], dtype=torch.float64)
    return q, k, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])


def test_meow_is_the_authors(backend):
    q, k, ids, more = example()
    loss_fn = MEOWLoss(0.5, symmetric=False, backend=backend)
    for of, value in ((ids, -1.3139759607), ([ids], -1.3139759607), ([ids, more], 0.0915496508)):
        torch.testing.assert_close(loss_fn(q, of, keys=k).item(), value, rtol=0, atol=1e-9)
    project = MEOWLoss(0.5, symmetric=False, weigh_positive=False, backend=backend)
    torch.testing.assert_close(project(q, ids, keys=k).item(), 0.3169322788, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="cluster_ids: expected a tensor"):
        loss_fn(q, [], keys=k)
    with pytest.raises(ValueError, match=r"cluster_ids\[1\]: expected shape \[4\]"):
        loss_fn(q, [ids, ids[:2]], keys=k)


def test_anchors_without_negatives_do_not_count(backend):
    z = batch(5, 2, 6, 1)[0]
    rows = MEOWLoss(backend=backend, reduction="none")
    one = torch.zeros(5).int()
    assert (rows(z, one) == 0).all()
    first = torch.tensor([0, 0, 0, 0, 1])
    torch.testing.assert_close(rows(z, [first, one]), rows(z, first))
    assert MEOWLoss(backend=backend)(z, one) == 0


@every_use
def test_without_negatives_both_are_zero(use, backend):
    z, symmetric = tensors(use)
    leaves = [x.clone().requires_grad_() for x in z]
    for loss, ids in (
        (MCLLoss, [torch.arange(9)]),
        (MCLLoss, [torch.full((9,), -1)]),
        (MEOWLoss, torch.zeros(9).int()),
    ):
        value = call(loss(symmetric=symmetric, backend=backend), leaves[0], ids, *leaves[1:])
        assert all(largest(x) < 1e-12 for x in differentiate(value, leaves))


def test_stages_are_taken_together():
    z = batch(9, 2, 6, 1)[0]
    both = torch.tensor([0, 1, 2, 0, 1, 3, 4, 5, 1])  # distinct pairs of STAGES' ids, of those assigned
    joint = torch.where(IDS < 0, -1, both)
    joint[4] = 9  # (0, 0), where 1 and 8 are (0, 1)
    torch.testing.assert_close(call(MCLLoss(), z, STAGES), call(MCLLoss(), z, [joint]))


@every_loss
def test_empty_batch_is_zero_with_a_graph(loss):
    z, none = torch.zeros(0, 2, 6, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    value = loss()(z, [none] if loss is MCLLoss else none)
    value.backward()
    assert value == 0 and z.grad is not None


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("k", [1, 5, 40])
def test_centers_of_other_clusters_are_negatives(k, options, backend):
    leaf, centers = batch(9, 2, 6, 1)[0].requires_grad_(), torch.randn(k, 6, dtype=torch.float64, requires_grad=True)
    ids = IDS.clamp(max=k - 1)
    module = learnable(CenterNegativesLoss, 0.3, backend=backend, **options)
    value = call(module, leaf, ids, centers)
    exact = leaf.detach().clone().requires_grad_()
    log_temperature = torch.tensor(0.3, dtype=torch.float64).log().requires_grad_()
    expected = center_negatives(exact, ids, centers, temperature=log_temperature.exp(), **options)
    torch.testing.assert_close(value, expected)
    actual = differentiate(value, [leaf, *module.parameters()])
    for found, wanted in zip(actual, differentiate(expected, [exact, log_temperature]), strict=True):
        torch.testing.assert_close(found.reshape(wanted.shape), wanted, rtol=1e-9, atol=1e-12)
    assert centers.grad is None


def test_without_centers_it_is_infonce():
    z, none = batch(9, 2, 6, 1)[0], torch.full((9,), -1)
    torch.testing.assert_close(CenterNegativesLoss()(z, none, torch.zeros(0, 6)), infonce(z))
    own = torch.zeros(9, dtype=torch.int64)  # the only centre is everybody's own
    torch.testing.assert_close(CenterNegativesLoss()(z, own, torch.randn(1, 6)), infonce(z))


def test_errors():
    z = batch(9, 2, 6, 1)[0]
    for attempt, message in (
        (lambda: call(MCLLoss(), z, [IDS, IDS[:3]]), r"cluster_ids\[1\]: expected shape \[9\], got \[3\]"),
        (lambda: call(MCLLoss(), z[:, 0], [IDS]), r"queries: expected shape \[n, 2, d\] without keys"),
        (lambda: call(MEOWLoss(), z, IDS[:3]), r"cluster_ids: expected shape \[9\], got \[3\]"),
        (lambda: call(MEOWLoss(), z[:, 0], IDS, z[:4, 1]), r"keys: expected shape \[9, 6\]"),
        (
            lambda: CenterNegativesLoss()(z[:, 0], IDS, z[:5, 0]),
            r"embeddings: expected shape \[n, 2, d\], got",
        ),
        (lambda: CenterNegativesLoss()(z, IDS, z[:5, 0, :3]), r"centers: expected shape \[rows, 6\], got \[5, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()

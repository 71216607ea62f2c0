"""HardContrastiveLoss against its definition, and InfoNCE."""

import itertools
import math

import pytest
import torch

from ccl_fast.losses import HardContrastiveLoss
from tests.oracles.losses import assert_matches, batch, call, differentiate, infonce, learnable, unit
from tests.oracles.matrices import hard_contrastive

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
# Whether two towers come, whether both are anchors, and how many extra negatives.
USES = {
    "views": (False, True, 0),
    "views and extra": (False, True, 5),
    "two towers": (True, True, 0),
    "two towers and extra": (True, True, 5),
    "queue": (True, False, 5),
    "one direction": (True, False, 0),
}
every_use = pytest.mark.parametrize("use", USES)


def tensors(use, n=9, dtype=torch.float64):
    towers, symmetric, extra = USES[use]
    views, _, negatives = batch(n, 2, 6, extra, dtype=dtype)
    keys = views[:, 1] if towers else None
    return [views[:, 0] if towers else views, keys, negatives if extra else None], symmetric


def check(use, *, temperature=0.1, backend="auto", tolerance=1e-10, n=9, dtype=torch.float64, **options):
    arguments, options["symmetric"] = tensors(use, n, dtype)
    module = learnable(HardContrastiveLoss, temperature, backend=backend, **options)
    leaves = [None if x is None else x.clone().requires_grad_() for x in arguments]
    given = [x for x in leaves if x is not None]
    value = call(module, *leaves)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    actual = differentiate(value, [*given, *module.parameters()])
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = hard_contrastive(*leaves, temperature=log_temperature.exp(), **options)
    exact = [*(x for x in leaves if x is not None), log_temperature]
    assert_matches(actual, differentiate(expected, exact, unused=True), tolerance)


@every_use
@pytest.mark.parametrize("alpha", (0.001, 0.25, 0.5, 0.9, 1))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(use, alpha, reduction):
    check(use, alpha=alpha, reduction=reduction)


@every_use
@pytest.mark.parametrize("temperature, normalize", ((0.005, True), (1.0, True), (0.5, False)))
@pytest.mark.parametrize("n", (1, 2, 17))
def test_options(use, temperature, normalize, n):
    check(use, temperature=temperature, normalize=normalize, n=n, alpha=0.4)


@every_use
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(use, dtype, tolerance):
    check(use, dtype=dtype, tolerance=tolerance, alpha=0.4)


@every_use
@pytest.mark.parametrize("alpha", (1, 1.0, 0.9999))
def test_all_negatives_are_infonce(use, alpha, backend):
    z, symmetric = tensors(use)
    ours = call(HardContrastiveLoss(0.1, alpha=alpha, symmetric=symmetric, backend=backend), *z)
    torch.testing.assert_close(ours, infonce(*z, symmetric=symmetric))


@every_use
def test_more_negatives_never_lower_the_loss(use):
    z, symmetric = tensors(use)
    losses = [
        call(HardContrastiveLoss(0.1, alpha=alpha, symmetric=symmetric, reduction="none"), *z)
        for alpha in (0.01, 0.3, 0.7, 1.0)
    ]
    assert all((a <= b + 1e-12).all() for a, b in itertools.pairwise(losses))
    assert (losses[0] < losses[-1]).all()


@pytest.mark.parametrize("alpha, kept", ((0.07, 7), (0.071, 8), (0.06, 6), (0.29, 29), (1e-9, 1), (0.9999, 100)))
def test_how_many_are_kept(alpha, kept):
    # Of 100 negatives at cosines 0.99, 0.98, ...: a rank more changes the sum.
    cosine = torch.arange(99, -1, -1, dtype=torch.float64) / 100
    negatives = torch.stack((cosine, (1 - cosine**2).sqrt()), dim=1)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    loss = call(HardContrastiveLoss(1.0, alpha=alpha, symmetric=False), query, query, negatives)
    torch.testing.assert_close(loss, torch.cat((torch.ones(1), cosine[:kept])).double().logsumexp(0) - 1)


def test_equal_negatives_stay_together():
    views, _, negatives = batch(4, 2, 6, 3)
    copies = torch.cat((negatives,) * 3)
    loss = call(
        HardContrastiveLoss(0.1, alpha=1e-3, symmetric=False, reduction="none"), views[:, 0], views[:, 1], copies
    )
    expected = hard_contrastive(views[:, 0], views[:, 1], copies, alpha=1e-3, symmetric=False, reduction="none")
    torch.testing.assert_close(loss, expected)
    hardest = (unit(views[:, 0]) @ unit(torch.cat((views[:, 1], negatives))).T).fill_diagonal_(-2).argmax(1)
    assert (hardest >= 4).any(), "no row's hardest negative has copies"


@pytest.mark.parametrize("alpha", (0.3, 1))
def test_without_negatives_the_loss_is_zero(alpha):
    z = batch(1, 2, 6, 1)[0].requires_grad_()
    loss = call(HardContrastiveLoss(alpha=alpha), z)
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


@pytest.mark.parametrize("alpha", (0.3, 1))
def test_empty_batch_is_zero_with_a_graph(alpha):
    for shape, others in (((0, 2, 6), ()), ((0, 6), (torch.zeros(0, 6), torch.zeros(3, 6)))):
        z = torch.zeros(shape, requires_grad=True)
        loss = call(HardContrastiveLoss(alpha=alpha), z, *others)
        loss.backward()
        assert loss == 0 and z.grad is not None


def test_errors():
    for alpha in (0, -0.1, 1.1, math.nan, True, "0.5"):
        with pytest.raises(ValueError, match="alpha: expected a number above 0 and at most 1, got"):
            HardContrastiveLoss(alpha=alpha)
    z, n = torch.ones(4, 2, 3), torch.ones(5, 2)
    for arguments, message in (
        ((z[:, 0],), r"queries: expected shape \[n, 2, d\] without keys"),
        ((z[:, 0], z[:3, 1]), r"keys: expected shape \[4, 3\]"),
        ((z, None, n), r"negatives: expected shape \[rows, 3\], got \[5, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call(HardContrastiveLoss(), *arguments)

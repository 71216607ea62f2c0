"""ConRLoss against its dense form, the authors' figures and what it is invariant to."""

import pytest
import torch

from ccl_fast.losses import ConRLoss
from tests.oracles.losses import assert_matches, batch, differentiate, learnable
from tests.oracles.terms import conr
from tests.oracles.waves import waves

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
TARGETS = torch.tensor([1, 1.5, 2, 4, 4.5, 6, 6.5, 5.2, 30], dtype=torch.float64)
PREDICTIONS = torch.tensor([1.2, 3, 2.1, 3.5, 4.4, 4.9, 8, 9.9, 4.0], dtype=torch.float64)
WEIGHTS = torch.linspace(0.5, 2, 8, dtype=torch.float64)
AT = {"targets": TARGETS, "predictions": PREDICTIONS}


def of(n, weighted=True):
    weights = torch.linspace(0.5, 2, n, dtype=torch.float64) if weighted else None
    generator = torch.Generator().manual_seed(n)
    targets = 6 * torch.rand(n, generator=generator, dtype=torch.float64)
    return targets, targets + torch.randn(n, generator=generator, dtype=torch.float64), weights


def check(z, *, weighted=True, temperature=0.07, tolerance=1e-10, **options):
    targets, predictions, weights = of(len(z), weighted)
    leaves = [x.clone().requires_grad_() for x in ((z, weights) if weighted else (z,))]
    module = learnable(ConRLoss, temperature, **options)
    given = {"targets": targets, "predictions": predictions, "weights": leaves[1] if weighted else None}
    value = module(leaves[0], **given)
    assert value.dtype == torch.promote_types(z.dtype, torch.float32)
    actual = differentiate(value, [*leaves, *module.parameters()], unused=True)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    given["weights"] = exact[1] if weighted else None
    expected = conr(exact[0], temperature=log_temperature.exp(), **given, **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature], unused=True), tolerance)


def rows(n=13, dtype=torch.float64):
    return batch(n, 0, 6, 1, dtype=dtype)[0]


@pytest.mark.parametrize("n", (0, 1, 2, 13))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("weighted", (True, False))
def test_the_definition(n, reduction, weighted):
    check(rows(n), reduction=reduction, weighted=weighted)


@pytest.mark.parametrize("window, push", ((0.0, 0.01), (0.5, 0.0), (2.0, 0.5)))
@pytest.mark.parametrize("count_masked", (False, True))
@pytest.mark.parametrize("temperature, normalize", ((0.02, True), (1.0, False)))
def test_options(window, push, count_masked, temperature, normalize):
    options = {"window": window, "push": push, "count_masked": count_masked, "normalize": normalize}
    check(rows(), temperature=temperature, **options)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)))
def test_dtypes(dtype, tolerance):
    check(rows(dtype=dtype), temperature=0.2, tolerance=tolerance)


@pytest.mark.parametrize("count_masked, figure", ((False, 3.966412), (True, 4.226278)))
def test_it_is_the_authors(count_masked, figure):
    given = {name: x[:8] for name, x in AT.items()}
    loss = ConRLoss(count_masked=count_masked)(waves(8, 3), weights=WEIGHTS, **given)
    torch.testing.assert_close(loss.item(), figure, rtol=0, atol=5e-7)


def test_rows_without_a_positive_or_a_negative_are_zero():
    # The last target is alone; and whom nobody is mistaken for has no negative.
    losses = ConRLoss(reduction="none")(rows(9), **AT)
    assert losses[0] == losses[8] == 0 and losses[1] != 0 and losses.isfinite().all()
    right = ConRLoss(reduction="none")(rows(9), targets=TARGETS, predictions=TARGETS)
    assert (right == 0).all()


def test_a_shift_of_targets_and_predictions_makes_no_difference():
    z, targets, predictions = rows(9), TARGETS.round(), PREDICTIONS.round()
    loss = ConRLoss()(z, targets=targets, predictions=predictions)
    torch.testing.assert_close(ConRLoss()(z, targets=targets + 7, predictions=predictions - 3), loss)
    torch.testing.assert_close(ConRLoss()(z, targets=targets.int(), predictions=predictions), loss)


def test_the_predictions_get_no_gradient():
    predictions = PREDICTIONS.clone().requires_grad_()
    ConRLoss()(rows(9).requires_grad_(), targets=TARGETS, predictions=predictions).backward()
    assert predictions.grad is None


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int64, torch.bool, torch.float16))
def test_numbers_of_any_dtype(dtype):
    targets, predictions = (torch.tensor(x).to(dtype) for x in ([1, 0, 5, 6, 0, 9], [1, 2, 1, 0, 1, 1]))
    loss = ConRLoss(window=0.5)(rows(6), targets=targets, predictions=predictions)
    expected = ConRLoss(window=0.5)(rows(6), targets=targets.double(), predictions=predictions.double())
    assert loss > 0
    torch.testing.assert_close(loss, expected)


def test_a_weight_of_zero_has_a_derivative():
    actual = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    near = torch.full_like(actual, 1e-9, requires_grad=True)
    for h in (actual, near):
        ConRLoss(temperature=1.0)(rows(9), **AT, weights=h).backward()
    assert (actual.grad > 0.01).any()
    torch.testing.assert_close(actual.grad, near.grad, rtol=1e-6, atol=1e-6)


def test_errors():
    z = torch.ones(4, 3)
    good = {"targets": torch.ones(4), "predictions": torch.ones(4)}
    for change, message in (
        ({"targets": torch.ones(3)}, r"targets: expected shape \[4\], got \[3\]"),
        ({"predictions": torch.ones(4, 1)}, r"predictions: expected shape \[4\], got \[4, 1\]"),
        ({"weights": torch.ones(5)}, r"weights: expected shape \[4\], got \[5\]"),
        ({"weights": torch.ones(4).long()}, r"weights: expected float64.*int64"),
        ({"weights": -torch.ones(4)}, r"weights: expected numbers >= 0, got a smallest of -1"),
        ({"targets": [1.0] * 4}, r"targets: expected a torch.Tensor, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            ConRLoss()(z, **good | change)
    for options, message in (
        ({"window": -1}, r"window: expected a number >= 0, got -1"),
        ({"push": "1"}, r"push: expected a number >= 0, got '1'"),
        ({"count_masked": 1}, r"count_masked: expected True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ConRLoss(**options)

"""SBCLLoss against its definition, and SupCon."""

import pytest
import torch

from ccl_fast import SupConLoss
from ccl_fast.losses import SBCLLoss
from tests.oracles.losses import (
    as_rows,
    assert_matches,
    batch,
    evaluate,
    evaluate_oracle,
    largest,
    learnable,
    reduced,
    supcon,
)

# A head class of two subclasses, a tail class, a single sample, unlabelled ones, one without subclass.
LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, -1, -1, 0])
SUBCLASSES = torch.tensor([0, 1, 0, 1, 0, 0, 0, 0, 0, 0, -1])

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def sbcl(
    embeddings, labels, subclasses, *, temperature=0.1, class_weight=0.25, normalize=True, reduction="mean",
    base_temperature=None, own_views=True,
):  # fmt: skip
    z, classes, shape = as_rows(embeddings, labels, normalize)
    _, within, _ = as_rows(embeddings, subclasses, normalize)
    losses, counted = [], []
    views = embeddings.shape[1] if embeddings.ndim == 3 else 1
    for i in range(len(z)):
        others = [j for j in range(len(z)) if j != i]
        mates = [j for j in others if classes[j] == classes[i]]
        own = [j for j in mates if within[j] == within[i]]
        outside, rest = [j for j in others if j not in own], [j for j in mates if j not in own]
        if own_views:
            same = [j for j in own if j // views == i // views]
            outside, rest = outside + same, rest + same
        s, loss = z @ z[i] / temperature, 0.0 * z.sum()
        if own:
            weight = 1.0 if base_temperature is None else temperature / base_temperature
            loss = loss - weight * (s[own] - s[others].logsumexp(0)).mean()
        if rest:
            loss = loss - class_weight * (s[rest] - s[outside].logsumexp(0)).mean()
        losses.append(loss)
        counted.append(bool(mates))
    return reduced(losses, counted, shape, reduction, embeddings)


@pytest.mark.parametrize("views", (0, 1, 2, 3))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(views, reduction, backend):
    z = batch(11, views, 6, 1)[0]
    actual = evaluate(learnable(SBCLLoss, reduction=reduction, backend=backend), z, LABELS, SUBCLASSES)
    assert_matches(actual, evaluate_oracle(sbcl, z, LABELS, SUBCLASSES, reduction=reduction))


@pytest.mark.parametrize("options", (
    {"temperature": 0.01}, {"temperature": 1.0}, {"normalize": False, "temperature": 0.5}, {"class_weight": 0},
    {"class_weight": 3.0}, {"base_temperature": 0.07}, {"base_temperature": 3, "temperature": 1.0},
))  # fmt: skip
def test_options(options, backend):
    z = batch(11, 2, 6, 1)[0]
    actual = evaluate(learnable(SBCLLoss, backend=backend, **options), z, LABELS, SUBCLASSES)
    assert_matches(actual, evaluate_oracle(sbcl, z, LABELS, SUBCLASSES, **options))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    z = batch(11, 2, 6, 1, dtype=dtype)[0]
    actual = evaluate(learnable(SBCLLoss), z, LABELS, SUBCLASSES)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    assert_matches(actual, evaluate_oracle(sbcl, z, LABELS, SUBCLASSES), tolerance)


@pytest.mark.parametrize("views", (0, 2))
def test_subclasses_that_are_classes_make_it_supcon(views, backend):
    z = batch(11, views, 6, 1)[0]
    actual = evaluate(learnable(SBCLLoss, own_views=False, backend=backend), z, LABELS, LABELS.clamp(min=0))
    assert_matches(actual, evaluate(learnable(SupConLoss, backend=backend), z, LABELS))
    assert_matches(actual, evaluate_oracle(supcon, z, LABELS))


def test_subclasses_of_one_sample_without_other_views():
    # No subclass has a positive: SupCon on the classes, times the weight.
    z = batch(11, 0, 6, 1)[0]
    actual = evaluate(learnable(SBCLLoss, class_weight=1), z, LABELS, torch.arange(11))
    assert_matches(actual, evaluate_oracle(supcon, z, LABELS))


def test_no_positives_at_all():
    z = batch(5, 0, 6, 1)[0]
    results = evaluate(learnable(SBCLLoss), z, torch.arange(5), torch.zeros(5, dtype=torch.int64))
    assert all(largest(x) == 0 for x in results)


def test_all_rows_of_one_subclass(backend):
    z, zeros = batch(5, 0, 6, 1)[0], torch.zeros(5, dtype=torch.int64)
    actual = evaluate(learnable(SBCLLoss, backend=backend), z, zeros, zeros)
    assert_matches(actual, evaluate_oracle(supcon, z, zeros))


def test_empty_batch_is_zero_with_a_graph():
    z, none = torch.zeros(0, 2, 6, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss = SBCLLoss()(z, none, none)
    loss.backward()
    assert loss == 0 and z.grad is not None


def test_errors():
    z = batch(11, 2, 6, 1)[0]
    with pytest.raises(ValueError, match="class_weight: expected a number >= 0, got -1"):
        SBCLLoss(class_weight=-1)
    with pytest.raises(ValueError, match="base_temperature: expected a positive number, got 0"):
        SBCLLoss(base_temperature=0)
    for arguments, error, message in (
        ((z, LABELS[:3], SUBCLASSES), ValueError, r"labels: expected shape \[11\], got \[3\]"),
        ((z, LABELS, SUBCLASSES[:3]), ValueError, r"cluster_ids: expected shape \[11\], got \[3\]"),
        ((z, LABELS, SUBCLASSES.float()), ValueError, "cluster_ids: expected integers"),
        ((z, LABELS - 1, SUBCLASSES), IndexError, "labels: expected ids at least -1"),
        ((z, LABELS, SUBCLASSES - 2), IndexError, "cluster_ids: expected ids at least -1"),
    ):
        with pytest.raises(error, match=message):
            SBCLLoss()(*arguments)


# ---- a temperature for each class ----


def test_it_is_the_authors(backend):
    q = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    k = torch.tensor([[0.8, 0.6], [-0.6, 0.8], [-0.8, -0.6], [0.6, -0.8]], dtype=torch.float64)
    given = torch.stack((q, k), 1), torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 0])
    loss_fn = SBCLLoss(0.5, class_weight=0.25, backend=backend)
    torch.testing.assert_close(loss_fn(*given).item(), 1.8145075327, rtol=0, atol=1e-9)
    of_class = torch.tensor([0.4, 0.6], dtype=torch.float64)
    torch.testing.assert_close(loss_fn(*given, class_temperature=of_class).item(), 1.8842627089, rtol=0, atol=1e-9)
    weighted, first = SBCLLoss(0.5, base_temperature=0.07, backend=backend), SBCLLoss(0.5, class_weight=0)
    torch.testing.assert_close(weighted(*given), loss_fn(*given) + (0.5 / 0.07 - 1) * first(*given))


@pytest.mark.parametrize("views", (1, 2, 3))
def test_own_views_in_the_first_term_alone(views, backend):
    z = batch(11, views, 6, 1)[0]
    actual = SBCLLoss(own_views=False, backend=backend)(z, LABELS, SUBCLASSES)
    torch.testing.assert_close(actual, sbcl(z, LABELS, SUBCLASSES, own_views=False))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.03)))
def test_equal_class_temperatures_are_the_temperature(dtype, tolerance):
    z, *_ = batch(9, 2, 6, 1, dtype=dtype)
    labels, clusters = torch.arange(9) % 2, torch.arange(9) % 3
    found = []
    for given in ({}, {"class_temperature": torch.full((2,), 0.25)}):
        leaf = z.detach().requires_grad_()
        value = SBCLLoss(0.25)(leaf, labels, clusters, **given)
        found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_class_temperature_errors():
    z, labels = batch(9, 2, 6, 1)[0], torch.arange(9) % 2
    for value, error, message in (
        (torch.ones(1), IndexError, "labels: expected ids from -1 to 0"),
        (torch.tensor([1.0, -1.0]), ValueError, "class_temperature: expected positive numbers"),
        (torch.tensor(1.0), ValueError, r"class_temperature: expected shape \[k\]"),
        (0.5, ValueError, "class_temperature: expected"),
    ):
        with pytest.raises(error, match=message):
            SBCLLoss()(z, labels, labels, class_temperature=value)

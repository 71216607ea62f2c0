"""NTXentLoss against lightly's, pytorch-metric-learning's and the formula."""

import pytest
import torch

from ccl_fast import InfoNCELoss, NTXentLoss
from ccl_fast.losses import ntxent
from tests.oracles.losses import unit

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = torch.tensor([0, 2, -1, 0, 1, 2, 0, -1, 2, -5, 7])  # one, of which there are several below 0


def rows(n=11, d=6, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def value_and_gradients(loss, *leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value.sum(), leaves)


def assert_same(actual, expected, **tolerance):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


def of_pairs(embeddings, labels, temperature=0.5, unassigned=-1, reduction="mean"):
    """The formula, pair by pair."""
    z = unit(embeddings)
    same = labels[:, None] == labels
    if unassigned is not None:
        same &= labels[:, None] != unassigned
    same.fill_diagonal_(True)
    s = z @ z.T / temperature
    losses = []
    for a in range(len(z)):
        others = s[a][~same[a]]
        of_row = [
            torch.logsumexp(torch.cat((s[a, p][None], others)), 0) - s[a, p]
            for p in range(len(z))
            if p != a and same[a, p]
        ]
        losses.append(torch.stack(of_row) if of_row else z.new_zeros(0))
    if reduction == "none":
        return torch.stack([x.sum() for x in losses])
    every = torch.cat(losses)
    return every.sum() / (max(len(every), 1) if reduction == "mean" else 1)


# ---- lightly ----


@pytest.mark.parametrize("temperature", (0.1, 0.5, 1.0))
def test_two_views_are_lightlys(temperature):
    theirs = pytest.importorskip("lightly.loss").NTXentLoss(temperature)
    views = rows(), rows(seed=1)
    assert_same(value_and_gradients(NTXentLoss(temperature), *views), value_and_gradients(theirs, *views))
    assert_same(value_and_gradients(NTXentLoss(temperature), torch.stack(views, 1))[:1], (theirs(*views),))


def test_a_memory_bank_is_lightlys():
    theirs = pytest.importorskip("lightly.loss").NTXentLoss(0.2, memory_bank_size=(32, 6))
    ours, views = NTXentLoss(0.2), (rows(dtype=torch.float32), rows(seed=1, dtype=torch.float32))
    theirs(rows(20, seed=2, dtype=torch.float32).requires_grad_(), rows(20, seed=3, dtype=torch.float32))  # fills it
    for _ in range(3):
        bank = theirs.memory_bank.bank.clone()
        expected = value_and_gradients(theirs, *views)
        actual = value_and_gradients(lambda a, b, bank=bank: ours(a, b, negatives=bank), *views)
        assert_same(actual, expected, rtol=2e-5, atol=1e-6)


def test_views_without_the_package():
    views = torch.stack((rows(), rows(seed=1)), 1)
    assert_same(
        value_and_gradients(lambda x: NTXentLoss(0.3)(x[:, 0], x[:, 1]), views),
        value_and_gradients(InfoNCELoss(0.3), views),
    )
    bank = rows(30, seed=5)
    actual = NTXentLoss(0.3, reduction="none")(views, negatives=bank)
    z, b = unit(views), unit(bank)
    logits = torch.cat(((z[:, 0] * z[:, 1]).sum(1, keepdim=True), z[:, 0] @ b.T), 1) / 0.3
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(11, dtype=torch.long), reduction="none")
    torch.testing.assert_close(actual, expected)


# ---- pytorch-metric-learning ----


@pytest.mark.parametrize("temperature", (0.07, 0.5))
@pytest.mark.parametrize("labels", (LABELS, LABELS % 2, torch.arange(11), torch.zeros(11, dtype=torch.long)))
def test_labels_are_pytorch_metric_learnings(temperature, labels):
    theirs = pytest.importorskip("pytorch_metric_learning.losses").NTXentLoss(temperature)
    ours = NTXentLoss(temperature, unassigned=None)
    x = rows()
    assert_same(
        value_and_gradients(lambda x: ours(x, labels), x),
        value_and_gradients(lambda x: theirs(x, labels), x),
        rtol=1e-6,
        atol=1e-9,
    )


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("unassigned", (-1, None))
@pytest.mark.parametrize("pairs", (1, 5, 1 << 20))
def test_the_formula(reduction, unassigned, pairs, monkeypatch):
    """Also in parts that are computed anew in the backward."""
    monkeypatch.setattr(ntxent, "PAIRS", pairs)
    labels = LABELS if unassigned is None else LABELS.clamp(min=-1)
    x = rows()
    loss_fn = NTXentLoss(0.5, unassigned=unassigned, reduction=reduction)
    assert_same(
        value_and_gradients(lambda x: loss_fn(x, labels), x),
        value_and_gradients(lambda x: of_pairs(x, labels, 0.5, unassigned, reduction), x),
    )


def test_views_of_labelled_samples():
    x, labels = rows(22).view(11, 2, 6), LABELS.abs()
    expected = of_pairs(x.flatten(0, 1), labels.repeat_interleave(2))
    torch.testing.assert_close(NTXentLoss()(x, labels), expected)
    assert NTXentLoss(reduction="none")(x, labels).shape == (11, 2)


def test_two_rows_of_each_label_are_nt_xent():
    x = rows(10)
    expected = InfoNCELoss(0.5)(x.view(5, 2, 6))
    torch.testing.assert_close(NTXentLoss(0.5)(x, torch.arange(5).repeat_interleave(2)), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(dtype):
    x = rows(40, dtype=dtype)
    labels = torch.arange(40) % 7
    expected = of_pairs(x.double(), labels)
    actual = NTXentLoss()(x, labels)
    assert actual.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_memory_of_pairs_is_bounded(monkeypatch):
    """Of n rows of one class there are n^2 pairs; n at a time are held."""
    monkeypatch.setattr(ntxent, "PAIRS", 1)
    held = []
    kept = ntxent._sums_of_pairs
    monkeypatch.setattr(ntxent, "_sums_of_pairs", lambda *args: held.append(args[-1] - args[-2]) or kept(*args))
    x = rows(12).requires_grad_()
    NTXentLoss()(x, torch.zeros(12, dtype=torch.long)).backward()
    assert max(held) == 1 and len(held) == 2 * 12


def test_a_batch_without_pairs_or_rows():
    x = rows().requires_grad_()
    value = NTXentLoss()(x, torch.arange(11))
    value.backward()
    assert value == 0 and (x.grad == 0).all()
    empty = torch.zeros(0, 6, requires_grad=True)
    NTXentLoss()(empty, torch.zeros(0, dtype=torch.long)).backward()


@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: NTXentLoss(unassigned=3), "unassigned: expected -1 or None, got 3"),
        (lambda: NTXentLoss()(rows(), LABELS[:4].clamp(min=0)), r"labels: expected shape \[11\]"),
        (lambda: NTXentLoss()(rows(), LABELS.clamp(min=0), negatives=rows()), "negatives: expected None with labels"),
        (lambda: NTXentLoss()(rows(), rows(5)), r"labels: expected shape \[11, 6\]"),
        (lambda: NTXentLoss()(rows(), rows(), negatives=rows(d=5)), "negatives: expected shape"),
        (lambda: NTXentLoss()(rows()), r"embeddings: expected shape \[n, 2, d\] without labels"),
    ),
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_labels_below_minus_one():
    with pytest.raises(IndexError, match="labels: expected ids at least -1"):
        NTXentLoss()(rows(), LABELS)

"""SupConLoss and NTXentLoss inside of pytorch-metric-learning: references, miners, wrappers, its trainer."""

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

import ccl_fast
from ccl_fast.losses import CACRLoss, CCLLoss, SBCLLoss, ntxent
from ccl_fast.losses.batch import labels_as_ids

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("SupConLoss", "NTXentLoss")
every_loss = pytest.mark.parametrize("name", NAMES)
LABELS = torch.tensor([0, 2, -1, 0, 1, 2, 0, -1, 2, -5, 7])
REF_LABELS = torch.tensor([0, 1, 1, 2, -1, -5, 7, 0, 2, 2, 9, -1, 0, 3, 3, 0, 1])


def metric_learning(part="losses"):
    return pytest.importorskip(f"pytorch_metric_learning.{part}")


def rows(n=11, d=6, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def both(name, temperature=0.1, **options):
    """Ours, where every label is a class, and theirs."""
    theirs = getattr(metric_learning(), name)(temperature=temperature)
    return getattr(ccl_fast, name)(temperature, unassigned=None, **options), theirs


def differentiated(loss, *leaves):
    leaves = [x.clone().requires_grad_() for x in leaves]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_same(actual, expected, **tolerance):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


# ---- references ----


@every_loss
@pytest.mark.parametrize("temperature", (0.05, 0.1, 1.0))
def test_references(name, temperature, backend):
    ours, theirs = both(name, temperature, backend=backend)
    x, refs = rows(), rows(17, seed=1)
    assert_same(
        differentiated(lambda x, r: ours(x, LABELS, None, r, REF_LABELS), x, refs),
        differentiated(lambda x, r: theirs(x, LABELS, None, r, REF_LABELS), x, refs),
    )


@every_loss
def test_references_that_are_the_rows_themselves(name):
    """With labels of their own each row is a positive of itself."""
    ours, theirs = both(name)
    x = rows()
    assert_same(
        differentiated(lambda x: ours(x, LABELS, None, x, LABELS.clone()), x),
        differentiated(lambda x: theirs(x, LABELS, None, x, LABELS.clone()), x),
    )


@every_loss
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("unassigned", (-1, None))
@pytest.mark.parametrize("form", ("outside", "inside"))
def test_references_of_the_formula(name, reduction, unassigned, form, monkeypatch):
    if name == "NTXentLoss":
        monkeypatch.setattr(ntxent, "PAIRS", 3)  # in parts
    labels, ref_labels = (x if unassigned is None else x.clamp(min=-1) for x in (LABELS, REF_LABELS))
    same = labels[:, None] == ref_labels
    if unassigned is not None:
        same &= labels[:, None] != unassigned
    x, refs = rows(), rows(17, seed=1)

    def formula(x, refs):
        s = nn.functional.normalize(x) @ nn.functional.normalize(refs).T / 0.3
        positive, other = (s.masked_fill(~kept, -torch.inf) for kept in (same, ~same))
        number = same.sum(1)
        if name == "NTXentLoss":
            losses = (torch.logaddexp(s, other.logsumexp(1, keepdim=True)) - s).where(same, 0.0).sum(1)
            return losses if reduction == "none" else losses.sum() / (same.sum() if reduction == "mean" else 1)
        if form == "outside":
            losses = s.logsumexp(1) - s.where(same, 0.0).sum(1) / number.clamp(min=1)
        else:
            losses = s.logsumexp(1) - positive.where(number[:, None] > 0, s).logsumexp(1)
        losses = losses.where(number > 0, 0.0)
        return losses if reduction == "none" else losses.sum() / ((number > 0).sum() if reduction == "mean" else 1)

    options = {"form": form} if name == "SupConLoss" else {}
    ours = getattr(ccl_fast, name)(0.3, unassigned=unassigned, reduction=reduction, **options)
    cotangent = torch.linspace(1, 2, 11, dtype=torch.float64) if reduction == "none" else 1.0
    assert_same(
        differentiated(lambda x, r: (cotangent * ours(x, labels, None, r, ref_labels)).sum(), x, refs),
        differentiated(lambda x, r: (cotangent * formula(x, r)).sum(), x, refs),
    )


@every_loss
def test_no_reference_or_no_row(name):
    ours, _ = both(name)
    x, refs = rows().requires_grad_(), rows(17, seed=1).requires_grad_()
    for loss in (
        ours(x, LABELS, None, refs[:0], REF_LABELS[:0]),
        ours(x[:0], LABELS[:0], None, refs, REF_LABELS),
        ours(x, LABELS, None, refs, torch.full((17,), 100)),
    ):
        assert loss == 0
        given = torch.autograd.grad(loss, (x, refs), allow_unused=True)
        assert all(g is None or (g == 0).all() for g in given)


# ---- miners ----

MINERS = ("BatchHardMiner", "MultiSimilarityMiner", "TripletMarginMiner", "UniformHistogramMiner")


@every_loss
@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("with_references", (False, True))
def test_miners(name, miner, with_references):
    ours, theirs = both(name, 0.2)
    x, refs = rows(24), rows(30, seed=1)
    labels, ref_labels = torch.arange(24) % 4, torch.arange(30) % 4
    mine = getattr(metric_learning("miners"), miner)()
    torch.manual_seed(0)
    further = (refs,) if with_references else ()
    mined = mine(x, labels, refs, ref_labels) if with_references else mine(x, labels)
    assert len(mined[0]) > 4

    def use(loss, x, *further):
        if further:
            return loss(x, labels, mined, further[0], ref_labels)
        return loss(x, labels, mined)

    assert_same(
        differentiated(lambda *leaves: use(ours, *leaves), x, *further),
        differentiated(lambda *leaves: use(theirs, *leaves), x, *further),
    )


@every_loss
def test_all_pairs_of_a_miner_are_the_labels(name, backend):
    ours = getattr(ccl_fast, name)(0.3, unassigned=None, backend=backend, reduction="none")
    same = LABELS[:, None] == LABELS
    pairs = *(same & ~torch.eye(11, dtype=torch.bool)).nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True)
    x = rows()
    weights = torch.linspace(1, 2, 11, dtype=torch.float64)
    assert_same(
        differentiated(lambda x: (weights * ours(x, None, pairs)).sum(), x),
        differentiated(lambda x: (weights * ours(x, LABELS)).sum(), x),
    )


def test_pairs_inside_of_the_logarithm():
    ours = ccl_fast.SupConLoss(0.3, form="inside", unassigned=None)
    same = LABELS[:, None] == LABELS
    pairs = *(same & ~torch.eye(11, dtype=torch.bool)).nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True)
    assert_same(
        differentiated(lambda x: ours(x, None, pairs), rows()), differentiated(lambda x: ours(x, LABELS), rows())
    )


@every_loss
def test_a_pair_listed_twice_counts_as_theirs_does(name):
    """SupCon's are a mask, NT-Xent's a list."""
    ours, theirs = both(name, 0.2)
    x = rows(5)
    pairs = tuple(map(torch.tensor, ([3, 0, 0, 1], [1, 2, 2, 4], [0, 3, 3, 1, 1], [1, 0, 0, 2, 2])))
    assert_same(differentiated(lambda x: ours(x, None, pairs), x), differentiated(lambda x: theirs(x, None, pairs), x))


@every_loss
def test_an_empty_tuple(name):
    ours, _ = both(name)
    for empty in (torch.zeros(0).long(), torch.zeros(0)):  # theirs come in the dtype of the labels
        for number in (3, 4):
            x = rows().requires_grad_()
            loss = ours(x, LABELS, (empty,) * number)
            assert loss == 0 and (torch.autograd.grad(loss, x)[0] == 0).all()


one = torch.tensor([0, 1])
ERRORS = {
    "no tuple": ({"indices_tuple": one}, "indices_tuple: expected a tuple of 3 or 4 vectors of indices, got Tensor"),
    "two": ({"indices_tuple": (one, one)}, "indices_tuple: expected a tuple of 3 or 4 vectors of indices, got 2"),
    "weights": (
        {"indices_tuple": (one, one, one, one.float())},
        r"indices_tuple\[3\]: expected integers of one dimension, got torch.float32",
    ),
    "arrays": (
        {"indices_tuple": (one, one, one.numpy())},
        r"indices_tuple\[2\]: expected a torch.Tensor, got ndarray",
    ),
    "lengths": ({"indices_tuple": (one, one, one, one[:1])}, "expected an anchor for each of 1 negatives, got 2"),
    "references of no labels": ({"ref_emb": rows(3)}, r"ref_labels: expected integers \[3\] with ref_emb, got None"),
    "labels of no references": ({"ref_labels": one}, r"ref_emb: expected rows \[m, d\] with ref_labels, got None"),
    "width": ({"ref_emb": rows(3, 5), "ref_labels": torch.arange(3)}, r"ref_emb: expected shape \[rows, 6\]"),
    "dtype": ({"ref_emb": rows(3).float(), "ref_labels": torch.arange(3)}, "ref_emb: expected dtype torch.float64"),
    "number": ({"ref_emb": rows(3), "ref_labels": torch.arange(4)}, r"ref_labels: expected shape \[3\], got \[4\]"),
    "fractions": (
        {"ref_emb": rows(3), "ref_labels": torch.full((3,), 0.5)},
        "ref_labels: expected integers, got torch.float32",
    ),
}


@every_loss
@pytest.mark.parametrize("arguments, message", ERRORS.values(), ids=ERRORS)
def test_errors(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        both(name)[0](rows(), LABELS, **arguments)


@every_loss
def test_further_errors(name):
    ours = getattr(ccl_fast, name)()
    with pytest.raises(ValueError, match=r"labels: expected integers \[11\] with ref_emb, got None"):
        ours(rows(), ref_emb=rows(3), ref_labels=torch.arange(3))
    with pytest.raises(ValueError, match=r"embeddings: expected shape \[rows, d\], got \[11, 1, 6\]"):
        ours(rows()[:, None], LABELS, ref_emb=rows(3), ref_labels=torch.arange(3))
    with pytest.raises(IndexError, match="ref_labels: expected ids at least -1, got -2 to 0"):
        ours(rows(), LABELS.clamp(min=-1), ref_emb=rows(3), ref_labels=-torch.arange(3))
    for wrong in (torch.tensor([0, 11]), torch.tensor([-1, 0])):
        with pytest.raises(IndexError, match="indices_tuple: expected anchors 0 to 10"):
            ours(rows(), None, (wrong, one, wrong, one))
        with pytest.raises(IndexError, match="indices_tuple: expected positives 0 to 10"):
            ours(rows(), None, (one, wrong, one, one))
    if name == "SupConLoss":  # theirs asserts it; of NT-Xent's pairs each is what its list says
        with pytest.raises(ValueError, match="indices_tuple: expected each pair among the positives or the negatives"):
            ours(rows(), None, (one, one, one, one))


# ---- labels and temperatures ----

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@every_loss
@pytest.mark.parametrize("dtype", (*INTEGERS, torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_dtypes_of_labels(name, dtype):
    ours, _ = both(name)
    x, refs, labels = rows(), rows(11, seed=1), torch.arange(11) % (2 if dtype == torch.bool else 3)
    torch.testing.assert_close(ours(x, labels.to(dtype)), ours(x, labels))
    default = getattr(ccl_fast, name)(0.1)
    torch.testing.assert_close(default(x, labels.to(dtype)), ours(x, labels))
    torch.testing.assert_close(
        ours(x, labels.to(dtype), None, refs, labels.to(dtype)), ours(x, labels, None, refs, labels)
    )


@pytest.mark.parametrize("dtype", (*INTEGERS, torch.bool, torch.float16, torch.float32))
def test_dtypes_of_labels_of_other_losses(dtype):
    x, labels = rows().view(11, 1, 6), torch.arange(11) % (2 if dtype == torch.bool else 3)
    for loss in (CACRLoss(), lambda x, labels: SBCLLoss()(x, labels, torch.arange(11) % 4)):
        torch.testing.assert_close(loss(x, labels.to(dtype)), loss(x, labels))
        with pytest.raises(ValueError, match=r"labels: expected integers, got torch.float32"):
            loss(x, labels + 0.5)


TEMPERATURES = {
    "float32": np.float32(0.25),
    "float16": np.float16(0.25),
    "an array": np.array(0.25),
    "a tensor": torch.tensor(0.25),
    "an integer": np.int64(1),
    "a tensor of an integer": torch.tensor(1),
}


@every_loss
@pytest.mark.parametrize("temperature", TEMPERATURES.values(), ids=TEMPERATURES)
@pytest.mark.parametrize("learnable_temperature", (True, False))
def test_temperatures(name, temperature, learnable_temperature):
    make, labels = getattr(ccl_fast, name), LABELS.abs()
    expected = make(float(temperature), learnable_temperature=learnable_temperature)
    actual = make(temperature, learnable_temperature=learnable_temperature)
    assert type(actual._temperature) in (int, float) and repr(actual).replace("=1,", "=1.0,") == repr(expected)
    assert actual(rows(), labels) == expected(rows(), labels)
    later = make(0.7, learnable_temperature=learnable_temperature)
    later.temperature = temperature
    assert later(rows(), labels) == expected(rows(), labels)
    for wrong in (-temperature, torch.tensor([0.1]), torch.tensor(True), np.bool_(True)):
        with pytest.raises(ValueError, match="temperature: expected a positive number"):
            make(wrong)
    with pytest.raises(ValueError, match=r"temperature: expected a positive number, got tensor.*requires_grad"):
        make(torch.tensor(0.1, requires_grad=True))


def test_other_options_of_numpy():
    """They are numbers wherever they come to, the scale of a log-sum-exp too."""
    x, ids, centers = rows(18).view(9, 2, 6), torch.arange(9) % 3, rows(3)
    for made in (
        lambda of: CCLLoss(of(0.5), center_weight=of(0.25), center_temperature=of(0.5), instance_weight=of(0.5)),
        lambda of: CCLLoss(of(0.5), form="split", center_temperature=of(0.25)),
    ):
        expected = made(float)(x, ids, centers)
        for of in (np.float32, np.float64, np.float16):
            torch.testing.assert_close(made(of)(x, ids, centers), expected)
    for of in (np.float32, np.float64):
        actual = CACRLoss(t_positive=of(1), t_negative=of(2), rbf=of(2))(x)
        torch.testing.assert_close(actual, CACRLoss(rbf=2.0)(x))
        torch.testing.assert_close(
            SBCLLoss(class_weight=of(0.5), base_temperature=of(0.25))(x, ids, ids),
            SBCLLoss(class_weight=0.5, base_temperature=0.25)(x, ids, ids),
        )


def test_labels_on_the_cpu_go_to_the_embeddings():
    """As data loaders leave them, and as SelfSupervisedLoss makes them."""
    assert labels_as_ids(torch.arange(3), torch.empty(3, 2, device="meta"), None).device.type == "meta"


# ---- wrappers and the trainer ----


@every_loss
@pytest.mark.parametrize("miner", (None, "MultiSimilarityMiner"))
def test_cross_batch_memory(name, miner):
    """More batches than the memory holds."""
    losses = metric_learning()
    memories = [
        losses.CrossBatchMemory(loss, 6, memory_size=20, miner=miner and getattr(metric_learning("miners"), miner)())
        for loss in both(name)
    ]
    labels = torch.arange(8) % 3
    for step in range(5):
        x = rows(8, seed=step)
        actual, expected = (differentiated(lambda x, memory=memory: memory(x, labels), x) for memory in memories)
        assert_same(actual, expected)
    x, kept = rows(8, seed=9), torch.arange(8) > 4
    assert_same(
        *(differentiated(lambda x, memory=memory: memory(x, labels, enqueue_mask=kept), x) for memory in memories)
    )


@every_loss
@pytest.mark.parametrize("symmetric", (True, False))
def test_self_supervised_loss(name, symmetric):
    ours, theirs = (metric_learning().SelfSupervisedLoss(loss, symmetric=symmetric) for loss in both(name))
    views = rows(), rows(seed=1)
    assert_same(differentiated(ours, *views), differentiated(theirs, *views))


def test_multiple_losses():
    """Beside losses of theirs, with a miner for one."""
    losses, miners, x = metric_learning(), metric_learning("miners"), rows(24)
    labels = torch.arange(24) % 4
    supcon, ntxent = both("SupConLoss"), both("NTXentLoss")
    ours, theirs = (
        losses.MultipleLosses(
            {"a": a, "b": b, "c": losses.TripletMarginLoss()},
            miners={"b": miners.MultiSimilarityMiner()},
            weights={"a": 1, "b": 0.5, "c": 2},
        )
        for a, b in zip(supcon, ntxent, strict=True)
    )
    assert_same(differentiated(lambda x: ours(x, labels), x), differentiated(lambda x: theirs(x, labels), x))


@every_loss
@pytest.mark.parametrize("mined", (False, True))
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")  # in its progress bar
def test_metric_loss_only(name, mined):
    """Two epochs of theirs end at the same parameters."""
    logging.getLogger("PML").setLevel(logging.ERROR)
    trainers, ours_and_theirs = metric_learning("trainers"), both(name)
    x = rows(32, 5, dtype=torch.float32)
    dataset = torch.utils.data.TensorDataset(x, torch.arange(32) % 4)
    trunk, ends = nn.Linear(5, 8), []
    for loss in ours_and_theirs:
        model = copy.deepcopy(trunk)
        torch.manual_seed(3)
        trainers.MetricLossOnly(
            models={"trunk": model},
            optimizers={"trunk_optimizer": torch.optim.SGD(model.parameters(), 0.1)},
            batch_size=16,
            loss_funcs={"metric_loss": loss},
            mining_funcs={"tuple_miner": metric_learning("miners").MultiSimilarityMiner()} if mined else {},
            dataset=dataset,
            data_device=torch.device("cpu"),
            dataloader_num_workers=0,
        ).train(num_epochs=2)
        ends.append(model)
    assert not torch.allclose(ends[0].weight, trunk.weight, atol=1e-3)
    assert_same(ends[0].parameters(), ends[1].parameters(), rtol=1e-4, atol=1e-5)

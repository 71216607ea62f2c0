"""SupConLoss against its definition and against pytorch-metric-learning."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccl_fast import SupConLoss
from ccl_fast.ops.logsumexp import blocked
from tests.oracles.losses import assert_matches, batch, differentiate, evaluate, evaluate_oracle, learnable, supcon

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = ("outside", "inside")
every_form = pytest.mark.parametrize("form", FORMS)


def check(z, labels, *, backend, tolerance=1e-10, **options):
    expected = evaluate_oracle(supcon, z, labels, **options)
    assert_matches(evaluate(learnable(SupConLoss, backend=backend, **options), z, labels), expected, tolerance)


@every_form
@pytest.mark.parametrize("views", (0, 1, 2, 3, 4))
def test_every_form_and_number_of_views(form, views, backend):
    z, labels, _ = batch(8, views, 5, 3)
    check(z, labels, form=form, backend=backend)


@every_form
@pytest.mark.parametrize("views", (1, 2, 4))
def test_without_labels_every_sample_is_its_own_class(form, views, backend):
    check(batch(6, views, 5, 1)[0], None, form=form, backend=backend)


@every_form
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("views", (0, 2))
def test_reduction(form, reduction, views, backend):
    z, labels, _ = batch(8, views, 5, 3)
    check(z, labels, form=form, reduction=reduction, backend=backend)


@every_form
@pytest.mark.parametrize("temperature, normalize", ((0.005, True), (0.07, True), (1.0, True), (0.5, False)))
def test_temperature_and_normalize(form, temperature, normalize, backend):
    z, labels, _ = batch(9, 2, 7, 4)
    check(z, labels, form=form, temperature=temperature, normalize=normalize, backend=backend)


LABELS = {
    "one class": [3, 3, 3, 3, 3],
    "singletons": [4, 2, 0, 5, 1],
    "some unlabelled": [-1, 7, 7, -1, 0],
    "all unlabelled": [-1, -1, -1, -1, -1],
    "huge": [2**62, -1, 2**63 - 1, 2**62, 2**63 - 1],
}


@every_form
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("views", (0, 2))
def test_kinds_of_labels(form, labels, views, backend):
    check(batch(5, views, 4, 1)[0], torch.tensor(labels), form=form, backend=backend)


@every_form
def test_hypothesis_shapes(form, backend):
    @settings(deadline=None, derandomize=True, max_examples=15, database=None)
    @given(
        n=st.integers(1, 7),
        views=st.integers(0, 4),
        d=st.integers(1, 6),
        classes=st.integers(1, 4),
        block=st.sampled_from((1, 3, 8)),
        temperature=st.sampled_from((0.005, 0.1, 1.0)),
        reduction=st.sampled_from(("mean", "sum", "none")),
        seed=st.integers(0, 1000),
    )
    def matches(n, views, d, classes, block, temperature, reduction, seed):
        z, labels, _ = batch(n, views, d, classes, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocked, "BLOCK", block)
            check(z, labels, form=form, backend=backend, temperature=temperature, reduction=reduction)

    matches()


@every_form
def test_blocked_over_several_tiles(form, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 8)
    for classes in (1, 4, 30):
        z, labels, _ = batch(35, 0, 6, classes)
        check(z, labels, form=form, backend="blocked")


@every_form
def test_gradcheck(form, backend):
    z, labels, _ = batch(5, 2, 3, 3)
    loss_fn = SupConLoss(temperature=0.4, form=form, reduction="none", backend=backend)
    assert torch.autograd.gradcheck(lambda z: loss_fn(z, labels), (z.requires_grad_(),))


@every_form
def test_one_class_in_the_whole_batch_inside_is_zero(form, backend):
    # Every candidate is a positive: their share of the softmax is 1.
    z = batch(6, 0, 5, 1)[0]
    loss, gradient, _ = evaluate(learnable(SupConLoss, form=form, backend=backend), z, torch.zeros(6).long())
    assert (abs(loss) < 1e-12 and gradient.abs().max() < 1e-12) == (form == "inside")


@pytest.mark.parametrize("temperature", (0.005, 0.07, 0.5, 1.0))
@pytest.mark.parametrize("views", (0, 1, 2, 3))
def test_outside_equals_pytorch_metric_learning(temperature, views, backend):
    z, labels, _ = batch(24, views, 16, 5, dtype=torch.float32)
    labels = labels.clamp(min=0)
    labels[0] = 9  # a class of its own: without views, an anchor without a positive
    z.requires_grad_()
    actual = differentiate(SupConLoss(temperature=temperature, backend=backend)(z, labels), [z])
    peer = pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(temperature=temperature)
    expected = differentiate(peer(z.flatten(0, -2), labels.repeat_interleave(max(views, 1))), [z])
    assert_matches(actual, expected, 2e-5)


def test_unlabelled_rows_join_the_negatives_of_pytorch_metric_learning(backend):
    z, labels, _ = batch(24, 0, 16, 5, dtype=torch.float32)
    unique = torch.where(labels < 0, 100 + torch.arange(24), labels)
    z.requires_grad_()
    actual = differentiate(SupConLoss(backend=backend)(z, labels), [z])
    assert_matches(
        actual,
        differentiate(
            pytest.importorskip("pytorch_metric_learning.losses").SupConLoss(temperature=0.1)(z, unique), [z]
        ),
        2e-5,
    )


@pytest.mark.parametrize("labels", ([0, 1, 2, 3], [-1, -1, -1, -1]))
@every_form
def test_no_pair_gives_zero_loss_and_zero_gradients(form, labels, backend):
    z = batch(4, 0, 5, 1)[0]
    loss, *gradients = evaluate(learnable(SupConLoss, form=form, backend=backend), z, torch.tensor(labels))
    assert loss == 0 and all((g == 0).all() for g in gradients)


ERRORS = {
    "shape": (torch.zeros(7).long(), r"labels: .*\[8\].*\[7\]"),
    "dtype": (torch.full((8,), 0.5), r"labels: expected integers, got .*float32"),
    "NaN": (torch.full((8,), torch.nan), r"labels: expected integers, got .*float32"),
    "infinite": (torch.full((8,), torch.inf), r"labels: expected integers, got .*float32"),
    "type": ([0] * 8, "labels: .*Tensor.*list"),
    "device": (torch.zeros(8, dtype=torch.int64, device="meta"), "labels: .*cpu.*meta"),
    "missing": (None, "labels: .*None"),
}


@pytest.mark.parametrize("labels, message", ERRORS.values(), ids=ERRORS)
def test_error_names_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        SupConLoss()(batch(8, 0, 4, 1)[0], labels)


def test_label_below_minus_one_is_an_index_error():
    with pytest.raises(IndexError, match=r"labels: .*-1.*-2"):
        SupConLoss()(batch(3, 0, 4, 1)[0], torch.tensor([0, -2, 1]))


def test_form_names_its_choices():
    with pytest.raises(ValueError, match=r"form: .*'outside', 'inside'.*'joint'"):
        SupConLoss(form="joint")

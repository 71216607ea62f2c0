"""ProtoGCDLoss against its definition, and the authors' figures."""

import functools
import math

import pytest
import torch

from ccl_fast.losses import ProtoGCDLoss
from tests.oracles.losses import assert_matches, batch, differentiate, learnable, unit
from tests.oracles.matrices import protogcd
from tests.oracles.waves import waves

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
SIZES = ((9, 4), (4, 9), (1, 3), (6, 2))
WEIGHTS = {"entropy_weight": 0.0, "separation_weight": 0.0, "supervised_weight": 0.0}


def given(n, k, dtype=torch.float64):
    views, labels, prototypes = batch(n, 2, 6, k, dtype=dtype)
    return views, prototypes, labels


def check(n, k, labelled, dtype=torch.float64, tolerance=1e-10, backend="auto", temperature=0.1, **options):
    views, prototypes, labels = given(n, k, dtype)
    labels = labels if labelled else None
    module = learnable(ProtoGCDLoss, temperature, backend=backend, **options)
    leaves = [x.clone().requires_grad_() for x in (views, prototypes)]
    actual = differentiate(module(*leaves, labels=labels), [*leaves, *module.parameters()])
    exact = [x.double().requires_grad_() for x in (views, prototypes)]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = protogcd(*exact, labels, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature]), tolerance)


@pytest.mark.parametrize("n, k", SIZES)
@pytest.mark.parametrize("labelled", (False, True))
@pytest.mark.parametrize("hard_share", (0, 0.3, 0.62, 1))
def test_the_definition(n, k, labelled, hard_share, backend):
    check(n, k, labelled, hard_share=hard_share, backend=backend)


@pytest.mark.parametrize(
    "options",
    ({"teacher_temperature": 0.3}, {"temperature": 1.0}, {"normalize": False}, {"supervised_weight": 1.0}, WEIGHTS),
)
def test_options(options):
    check(9, 4, True, hard_share=0.5, **options)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 0.06), (torch.float16, 0.01)))
def test_dtypes(dtype, tolerance):
    check(9, 4, True, dtype, tolerance, hard_share=0.0)


def test_the_figures_of_the_authors_code():
    # Their sixth part of the ramp: epoch 50 of np.linspace(0.2, 1, 100).
    share = 0.2 + 0.8 * 50 / 99
    first, prototypes = waves(6, 5), waves(7, 5, 0.8, 0.6)
    views = torch.stack((first, first + 0.2 * waves(6, 5, 1.3, 0.1)), dim=1)
    loss = functools.partial(ProtoGCDLoss, hard_share=share)
    parts = {
        "distillation": loss(**WEIGHTS)(views, prototypes),
        "entropy": loss(**WEIGHTS | {"entropy_weight": 1.0})(views, prototypes),
        "separation": loss(**WEIGHTS | {"separation_weight": 1.0})(views, prototypes),
    }
    parts["entropy"] -= parts["distillation"]
    parts["separation"] -= parts["distillation"]
    found = {name: round(value.item(), 6) for name, value in parts.items()}
    assert found == {"distillation": 0.531354, "entropy": 0.258550, "separation": 3.141090}
    whole = 0.65 * (0.531354 + 2 * 0.258550 + 0.1 * 3.141090)
    assert loss()(views, prototypes).item() == pytest.approx(whole, abs=2e-6)
    labels = torch.tensor([0, 1, 2, -1, -1, -1])
    logits = unit(views)[:3].flatten(0, 1) @ unit(prototypes).T / 0.1
    supervised = torch.nn.functional.cross_entropy(logits, labels[:3].repeat_interleave(2)).item()
    assert loss()(views, prototypes, labels=labels).item() == pytest.approx(whole + 0.35 * supervised, abs=2e-6)


def test_equal_shares_have_no_lack_of_entropy_and_one_prototype_none_of_anything():
    corners = torch.eye(4, dtype=torch.float64)
    views = corners[:, None].expand(-1, 2, -1)
    with_entropy, without = (ProtoGCDLoss(**WEIGHTS | {"entropy_weight": weight})(views, corners) for weight in (1, 0))
    assert abs((with_entropy - without).item()) < 1e-12
    prototypes = corners[:1].clone().requires_grad_()
    loss = ProtoGCDLoss()(views, prototypes, labels=torch.zeros(4).long())
    loss.backward()
    assert abs(loss.item()) < 1e-12 and prototypes.grad.abs().max() < 1e-12


def test_orthogonal_prototypes_have_a_separation_of_zero():
    corners = torch.eye(4, dtype=torch.float64)
    loss = ProtoGCDLoss(**WEIGHTS | {"separation_weight": 1.0})(torch.zeros(0, 2, 4).double(), corners)
    assert abs(loss.item()) < 1e-12


def test_a_schedule_may_set_the_share():
    views, prototypes, _ = given(9, 4)
    loss = ProtoGCDLoss()
    loss.hard_share = 0.3
    assert loss(views, prototypes) == ProtoGCDLoss(hard_share=0.3)(views, prototypes)


def test_labels_of_other_kinds():
    views, prototypes, labels = given(9, 4)
    expected = ProtoGCDLoss()(views, prototypes, labels=labels)
    for other in (labels.double(), labels[:, None], labels.to(torch.int8)):
        assert ProtoGCDLoss()(views, prototypes, labels=other) == expected
    unlabelled = ProtoGCDLoss()(views, prototypes, labels=torch.full((9,), -1))
    torch.testing.assert_close(unlabelled, ProtoGCDLoss()(views, prototypes))


def test_no_rows_are_the_separation_alone():
    prototypes = given(1, 4)[1]
    views = torch.zeros(0, 2, 6, dtype=torch.float64, requires_grad=True)
    loss = ProtoGCDLoss(supervised_weight=0.0)(views, prototypes)
    loss.backward()
    others = (unit(prototypes) @ unit(prototypes).T / 0.1).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(loss.detach(), 0.1 * (others.logsumexp(1).mean() - math.log(3)))
    assert views.grad is not None


def test_errors():
    for name, wrong in (("hard_share", 1.1), ("supervised_weight", -0.1), ("hard_share", True)):
        with pytest.raises(ValueError, match=rf"^{name}: expected a number from 0 to 1, got"):
            ProtoGCDLoss(**{name: wrong})
    with pytest.raises(ValueError, match=r"^teacher_temperature: expected a positive number, got 0"):
        ProtoGCDLoss(teacher_temperature=0)
    with pytest.raises(ValueError, match=r"^entropy_weight: expected a number >= 0, got -1"):
        ProtoGCDLoss(entropy_weight=-1)
    z, c = torch.ones(4, 2, 3), torch.ones(5, 3)
    for arguments, labels, message in (
        ((z[:, 0], c), None, r"embeddings: expected shape \[n, 2, d\]"),
        ((z, c[:, :2]), None, r"prototypes: expected shape \[rows, 3\], got \[5, 2\]"),
        ((z, c[:0]), None, r"prototypes: expected at least one row"),
        ((z, c), torch.ones(3).long(), r"labels: expected shape \[4\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ProtoGCDLoss()(*arguments, labels=labels)
    with pytest.raises(IndexError, match=r"labels: expected ids from -1 to 4 \(there are 5 prototypes\)"):
        ProtoGCDLoss()(z, c, labels=torch.full((4,), 5))
    loss = ProtoGCDLoss()
    loss.hard_share = 2.0
    with pytest.raises(ValueError, match=r"^hard_share: expected a number from 0 to 1, got 2\.0"):
        loss(z, c)

"""gated_similarity and GatedPairLoss against their dense forms, and the authors' figure."""

import pytest
import torch
from torch.nn import functional

from ccl_fast.losses import GatedPairLoss
from ccl_fast.ops import gated_similarity
from tests.oracles.losses import assert_matches, batch, differentiate, learnable
from tests.oracles.terms import gated_pairs
from tests.oracles.waves import waves
from tests.peak import peak_bytes
from tests.tolerance import OF_TORCH_2_11

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
LABELS = torch.tensor([0, 2, -1, 0, 1, 2, 0, -1, 2])
PARTNERS = torch.tensor([2, 1, 0, 0, -1, 0, 1, 1, 2])
GATES = torch.linspace(-2, 2, 54, dtype=torch.float64).view(9, 6).sin().sigmoid()


def rows(n=9, d=6, dtype=torch.float64):
    return batch(n, 0, d, 1, dtype=dtype)[0]


def check(z, labels=LABELS, partners=PARTNERS, *, temperature=0.1, tolerance=1e-10, **options):
    n = len(z)
    leaves = [z.clone().requires_grad_(), GATES[:n].to(z.dtype).requires_grad_()]
    module = learnable(GatedPairLoss, temperature, **options)
    value = module(leaves[0], labels[:n], partner_labels=partners[:n], gates=leaves[1])
    assert value.dtype == torch.promote_types(z.dtype, torch.float32)
    actual = differentiate(value, [*leaves, *module.parameters()])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    of = exact[0], labels[:n], partners[:n], exact[1]
    expected = gated_pairs(*of, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature], unused=True), tolerance)


@pytest.mark.parametrize("n", (0, 1, 2, 9))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("temperature", (0.02, 0.1, 1.0))
def test_the_definition(n, reduction, temperature):
    check(rows(n), reduction=reduction, temperature=temperature)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)))
def test_dtypes(dtype, tolerance):
    check(rows(dtype=dtype), temperature=0.5, tolerance=tolerance)


def test_it_is_the_authors():
    labels = torch.arange(8) // 2
    partners = labels[torch.tensor([2, 5, 7, 0, 1, 3, 6, 4])]
    loss = GatedPairLoss()(waves(8, 5), labels, partner_labels=partners, gates=waves(8, 5, 0.5, 0.9).sigmoid())
    torch.testing.assert_close(loss.item(), 4.091945, rtol=0, atol=5e-7)


def test_without_pairs_it_is_zero():
    z = rows().requires_grad_()
    for partners in (torch.full((9,), -1), torch.full((9,), 7)):
        loss = GatedPairLoss()(z, LABELS, partner_labels=partners, gates=GATES)
        loss.backward()
        assert loss == 0 and (z.grad == 0).all()


def test_scales_of_rows_and_of_gates_make_no_difference():
    loss = GatedPairLoss()(rows(), LABELS, partner_labels=PARTNERS, gates=GATES)
    scaled = torch.linspace(0.5, 3, 9, dtype=torch.float64)[:, None]
    given = {"partner_labels": PARTNERS, "gates": scaled * GATES}
    torch.testing.assert_close(GatedPairLoss()(rows() * scaled.flip(0), LABELS, **given), loss)


def test_a_closed_gate_leaves_the_gradient_finite():
    z, gates = rows(dtype=torch.float32).requires_grad_(), torch.zeros(9, 6, requires_grad=True)
    GatedPairLoss()(z, LABELS, partner_labels=PARTNERS, gates=gates).backward()
    assert z.grad.isfinite().all() and gates.grad.isfinite().all()


def test_errors():
    z, gates = torch.ones(9, 6), torch.ones(9, 6)
    good = {"partner_labels": PARTNERS, "gates": gates}
    for change, error, message in (
        ({"gates": gates[:3]}, ValueError, r"gates: expected shape \[9, 6\] \(that of embeddings\), got \[3, 6\]"),
        ({"gates": gates.long()}, ValueError, r"gates: expected float64.*int64"),
        ({"partner_labels": PARTNERS[:3]}, ValueError, r"partner_labels: expected shape \[9\], got \[3\]"),
        ({"partner_labels": PARTNERS - 1}, IndexError, r"partner_labels: expected ids at least -1, got -2 to"),
    ):
        with pytest.raises(error, match=message):
            GatedPairLoss()(z, LABELS, **good | change)


# ---- the similarity ----


@pytest.mark.parametrize("n, m, d", ((7, 5, 6), (1, 1, 1), (0, 3, 4), (4, 0, 3), (13, 9, 1)))
def test_the_similarity_is_the_cosine_of_gated_rows(n, m, d):
    q, k = (rows(number, d).requires_grad_() for number in (n, m))
    gates = rows(n, d).flip(0).sigmoid().detach().requires_grad_()
    expected = functional.cosine_similarity((gates * q)[:, None], gates[:, None] * k, dim=2)
    actual = differentiate(gated_similarity(q, gates, k), [q, gates, k], unused=True)
    assert_matches(actual, differentiate(expected, [q, gates, k], unused=True), 1e-10)


def test_open_gates_are_cosines():
    q, k = rows(7), rows(5)
    expected = functional.normalize(q, dim=1) @ functional.normalize(k, dim=1).T
    torch.testing.assert_close(gated_similarity(q, torch.ones_like(q), k), expected)


@pytest.mark.parametrize("scale", (1e-30, 1e-13, 1e10, 1e25))
def test_lengths_do_not_count(scale):
    q, k = rows(7, dtype=torch.float32), rows(5, dtype=torch.float32)
    gates = GATES[:7].float()
    expected = gated_similarity(q, gates, k)
    for given in ((scale * q, gates, k), (q, scale * gates, k), (q, gates, scale * k)):
        torch.testing.assert_close(gated_similarity(*given), expected)


def test_errors_of_the_similarity():
    q, k = torch.ones(3, 2), torch.ones(4, 2)
    for arguments, message in (
        ((q, q[:2], k), r"gates: expected shape \[3, 2\] \(that of q\), got \[2, 2\]"),
        ((q, q, k[:, :1]), r"k: expected shape \[rows, 2\], got \[4, 1\]"),
        ((q.long(), q, k), r"q: expected float64.*int64"),
    ):
        with pytest.raises(ValueError, match=message):
            gated_similarity(*arguments)


STEP = """
from ccl_fast.losses import GatedPairLoss

def prepare(n):
    z, gates = (torch.randn(n, 128).sigmoid().requires_grad_() for _ in range(2))
    labels = torch.arange(n) % 8
    given = {"partner_labels": labels.flip(0), "gates": gates}
    return lambda: GatedPairLoss()(z, labels, **given).backward()
"""


@pytest.mark.slow  # a process of its own
def test_memory_is_linear():
    """Gated keys of all rows, [n, n, d], would take 2 GiB."""
    assert peak_bytes(STEP, (2048,), (64,)) <= 48 * 2**20 + OF_TORCH_2_11

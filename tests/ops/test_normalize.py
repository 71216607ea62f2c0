"""Unit rows of any length: 1e-30 and 1e20 have a direction, though their squares are no float32 numbers."""

import pytest
import torch

from ccl_fast.losses import CCLLoss, InfoNCELoss, SupConLoss
from ccl_fast.ops import normalize
from ccl_fast.ops.normalize import SHORTEST, normalize_embeddings, normalize_rows
from tests.losses.test_contract import USES, views

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning"),
]
LENGTHS = (1e-42, 1e-38, 1e-30, 1e-20, 1e-13, 1e-11, 1.0, 1e15, 1e20, 1e38)


def rows(n=10, d=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("function", (normalize_rows, normalize_embeddings))
def test_any_length(length, dtype, function):
    x = (rows() * length).to(dtype)
    actual = function(x)
    expected = torch.nn.functional.normalize(x.double(), eps=1e-300)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=2e-2 if function is normalize_rows else 1e-6)


def test_a_row_alone_decides_nothing_about_others():
    x = rows(dtype=torch.float32)
    mixed = torch.cat((x, x * 1e-30, torch.zeros(1, 5), x * 1e20))
    expected = normalize_embeddings(x)
    found = normalize_embeddings(mixed)
    assert torch.equal(found[:10], expected)  # to the last bit: rows are scaled by powers of two
    assert (found[20] == 0).all()
    torch.testing.assert_close(found[10:20], expected)
    torch.testing.assert_close(found[21:], expected)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_gradients_are_right_and_bounded(length, dtype):
    x = (rows() * length).to(dtype)
    if not x.any():  # below the smallest bfloat16
        return
    w = rows(seed=1)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad((normalize_embeddings(leaf) * w.to(leaf.dtype)).sum(), leaf)
    z = torch.nn.functional.normalize(x.double(), eps=1e-300)
    w = w.to(dtype).double()
    exact = (w - (w * z).sum(1, keepdim=True) * z) / x.double().norm(dim=1, keepdim=True)
    assert grad.isfinite().all()
    assert grad.double().norm(dim=1).max() <= 4.0 * 2.0**-SHORTEST
    if length > 2.0 ** (1 + SHORTEST):
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(grad.double() * length, exact * length, rtol=tolerance, atol=tolerance)
    else:
        directions = (torch.nn.functional.normalize(g, eps=1e-300) for g in (grad.double(), exact))
        torch.testing.assert_close(*directions, rtol=2e-2, atol=2e-2)


def test_zeros_have_no_gradient_and_shapes_may_be_empty():
    x = torch.zeros(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(normalize_embeddings(x).sum(), x)
    assert (grad == 0).all()
    for shape in ((0, 4), (3, 0), (0, 0)):
        assert normalize_embeddings(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("usual", (True, False))
def test_second_derivatives(usual, monkeypatch):
    if not usual:
        monkeypatch.setattr(normalize, "LONGEST", normalize.SHORTEST)
    x, w = rows(3).requires_grad_(), rows(3, seed=2)
    assert torch.autograd.gradgradcheck(lambda x: (normalize_embeddings(x) * w).sum(1), x)


def test_second_derivative_beside_zeros():
    x = torch.cat((rows(2), torch.zeros(1, 5).double())).requires_grad_()
    (grad,) = torch.autograd.grad((normalize_embeddings(x) * rows(3, seed=2)).sum(), x, create_graph=True)
    assert (torch.autograd.grad(grad.square().sum(), x)[0].isfinite()).all()


def test_it_compiles():
    x = torch.cat((rows(4, dtype=torch.float32) * 1e-30, rows(4, dtype=torch.float32)))
    compiled = torch.compile(normalize_embeddings, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), normalize_embeddings(x))


# ---- every loss ----


# Whitening divides by standard deviations and an eps, and the uses of SepCLR, BECLR and MLC take the tanh of the views:
# these depend on the length. The rest sees directions alone.
NORMALIZING = [name for name in USES if name not in ("whitenedcse", "sepclr", "beclr", "mlc")]


@pytest.mark.parametrize("name", NORMALIZING)
@pytest.mark.parametrize("length", (1e-30, 1e-20, 1e20))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_loss(name, length, dtype):
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    expected = USES[name].module()(views(torch.float32))
    z = (views(torch.float32) * length).to(dtype).requires_grad_()
    actual = USES[name].module()(z)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    (grad,) = torch.autograd.grad(actual, z)
    assert grad.isfinite().all() and grad.any()


def test_the_value_of_the_issue():
    """4 samples of two views: a loss of 1.6094 = log 5 said that all similarities were 0."""
    x = rows(10, dtype=torch.float32).view(5, 2, 5)
    expected = InfoNCELoss(0.1)(x)
    for length in (1e-30, 1e-20, 1e20):
        for dtype in (torch.float32, torch.bfloat16):
            actual = InfoNCELoss(0.1)((x * length).to(dtype))
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", (1e-30, 1e-20, 1e20))
@pytest.mark.parametrize("loss", (InfoNCELoss, SupConLoss, CCLLoss))
@pytest.mark.parametrize("backend", ("triton", "reference"))
def test_backends(length, loss, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    x = rows(12, dtype=torch.float32).view(6, 2, 5)
    more = () if loss is InfoNCELoss else (torch.arange(6) % 2,)
    leaf = (x * length).requires_grad_()
    value = loss(0.1, backend=backend)(leaf, *more)
    torch.testing.assert_close(value, loss(0.1)(x, *more))
    assert torch.autograd.grad(value, leaf)[0].isfinite().all()

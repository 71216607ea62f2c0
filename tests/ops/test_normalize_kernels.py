"""Unit rows by kernels, Triton's (interpreted without a GPU) and the CPU extension's, against plain torch."""

import pytest
import torch

from ccl_fast.kernels import cpu_extension
from ccl_fast.ops import normalize, normalize_cpu, normalize_triton
from ccl_fast.ops.normalize import SHORTEST, normalize_embeddings
from tests.tolerance import assert_as_accurate

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # NumPy's, of the interpreter.
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning"),
]
LENGTHS = (1e-45, 1e-38, 1e-30, 1e-20, 1e-13, 1e-11, 1.0, 1e15, 1e20, 1e38)


@pytest.fixture(autouse=True, params=["triton", "cpu"])
def kernels(request, monkeypatch, kernel_device):
    """How many were launched."""
    module = {"triton": normalize_triton, "cpu": normalize_cpu}[request.param]
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setattr(normalize_triton, "DEVICES", (kernel_device.type,))
    elif reasons := cpu_extension.obstacles(kernel_device, torch.float32):
        pytest.skip(reasons[0])
    launched = []
    for name in ("unit", "gradient"):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, call=call, name=name: launched.append(name) or call(*x))
    return launched


def evaluate(x, w):
    leaf = x.detach().clone().requires_grad_()
    unit = normalize_embeddings(leaf)
    return unit.detach(), torch.autograd.grad((unit * w).sum(), leaf)[0]


def plainly(x, w, monkeypatch):
    with monkeypatch.context() as patch:
        for module in (normalize_triton, normalize_cpu):
            patch.setattr(module, "serves", lambda x: False)
        return evaluate(x, w)


@pytest.mark.parametrize("d", (1, 3, 64, 100, 128, 300))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_as_plain_torch(d, dtype, kernels, kernel_device, monkeypatch):
    monkeypatch.setattr(normalize_triton, "MAX_BLOCK", 64)  # so that long rows take several blocks
    x, w = torch.randn(2, 7, d, device=kernel_device, dtype=torch.float64)
    found, plain = evaluate(x.to(dtype), w.float()), plainly(x.to(dtype), w.float(), monkeypatch)
    exact = plainly(x.to(dtype).double(), w, monkeypatch)
    assert kernels == ["unit", "gradient"]
    for name, ours, right, torchs in zip(("unit", "gradient"), found, exact, plain, strict=True):
        assert ours.dtype == torchs.dtype
        assert_as_accurate(ours, right, torchs, dtype if name == "gradient" else torch.float32, name)


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length(length, kernels, kernel_device, monkeypatch):
    x, w = torch.nn.functional.normalize(torch.randn(2, 6, 5, device=kernel_device), dim=2)
    x = torch.cat((x * length, torch.zeros_like(x[:1]), x))
    w = torch.cat((w, w[:1], w))
    (unit, gradient), (expected, of_plain) = evaluate(x, w), plainly(x, w, monkeypatch)
    assert kernels == ["unit", "gradient"]
    torch.testing.assert_close(unit, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, of_plain, rtol=1e-5, atol=1e-6 * float(of_plain[:6].abs().max()))
    assert not unit[6].any() and not gradient[6].any() and gradient.norm(dim=1).max() <= 4 * 2.0**-SHORTEST


def test_rows_that_differ_by_a_power_of_two_are_the_same_to_the_last_bit(kernel_device):
    x = torch.randn(5, 9, device=kernel_device)
    assert normalize_embeddings(x * 2.0**-90).equal(normalize_embeddings(x))
    assert normalize_embeddings(x * 2.0**70).equal(normalize_embeddings(x))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_not_a_number(bad, kernel_device):
    x = torch.randn(3, 5, device=kernel_device)
    x[1, 2] = bad
    found = normalize_embeddings(x)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_any_strides(kernels, kernel_device):
    x = torch.randn(6, 4, 5, device=kernel_device)
    for view in (x[:, 1], x[:, :, 2], x[::2, 0], x[0].T, x[:, 0].expand(6, 5), x[:1, 0].expand(6, 5)):
        torch.testing.assert_close(normalize_embeddings(view), torch.nn.functional.normalize(view))
    assert len(kernels) == 6


@pytest.mark.parametrize("what", ("second derivative", "func", "float64", "empty", "compiled"))
def test_what_the_kernels_do_not_serve(what, kernels, kernel_device):
    x = torch.randn(4, 5, device=kernel_device, dtype=torch.float64 if what == "float64" else torch.float32)
    if what == "second derivative":
        twice = []
        for function in (normalize_embeddings, torch.nn.functional.normalize):
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(function(leaf)[:, 0].sum(), leaf, create_graph=True)
            assert kernels == ["unit"]
            twice += torch.autograd.grad(grad.square().sum(), leaf)
            kernels[1:] = []
        torch.testing.assert_close(*twice)
        return
    if what == "func":
        grad = torch.func.grad(lambda x: normalize_embeddings(x)[:, 0].sum())(x)
        assert grad.shape == x.shape and "gradient" not in kernels
        return
    if what == "compiled":
        torch.compiler.reset()
        found = torch.compile(normalize_embeddings, backend="aot_eager", fullgraph=True)(x)
    else:
        found = normalize_embeddings(x[:0] if what == "empty" else x)
    torch.testing.assert_close(found, torch.nn.functional.normalize(x[: len(found)]))
    assert not kernels


def test_without_a_gpu_nothing_changes(monkeypatch, kernels):
    monkeypatch.undo()
    assert normalize_triton.DEVICES == ("cuda",)
    x = torch.randn(3, 4)
    assert not normalize_triton.serves(x)
    assert normalize.unit_rows(x)[0].shape == x.shape and not kernels

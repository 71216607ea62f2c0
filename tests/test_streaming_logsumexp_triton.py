"""The Triton kernels themselves: compiled where there is a GPU, else interpreted on CPU tensors."""

import pytest
import torch
from logsumexp_cases import Case, assert_agrees, evaluate
from test_streaming_logsumexp import RELATIONS

from ccl_fast import CCLLoss, streaming_logsumexp
from ccl_fast.ops import streaming_logsumexp_triton as launcher

pytestmark = [
    # NumPy, which the interpreter computes with, reports what IEEE arithmetic defines: log2(0), exp2 of large numbers.
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning"),
    # The interpreter of Triton 3.6 reads a number from an array of one (NumPy 2.4 refuses: it needs an older one).
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]
HALF = [torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])


@pytest.fixture(params=[False, True], ids=["every column", "triangle"])
def triangle(request, monkeypatch):
    """Force the path that large self-contrast takes, or the one that small batches take."""
    monkeypatch.setattr(launcher, "TRIANGLE_MIN_ROWS", 1 if request.param else 1 << 30)
    return request.param


@pytest.mark.parametrize("relation", RELATIONS, ids=str)
@pytest.mark.parametrize("scale", [5.0, 200.0])
def test_self_contrast_agrees(relation, scale, triangle, kernel_device):
    """Three blocks of rows, the last ragged; bounded logits and such as need the running maximum."""
    assert_agrees(Case(n=150, d=20, scale=scale, **relation), "triton", torch.float32, kernel_device)


@pytest.mark.parametrize("relation", RELATIONS, ids=str)
@pytest.mark.parametrize("m,bias", [(None, True), (90, False), (90, True)])
def test_general_problem_agrees(relation, m, bias, kernel_device):
    assert_agrees(Case(n=150, m=m, d=20, bias=bias, **relation), "triton", torch.float32, kernel_device)


@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 31, 64, 65, 100, 128, 129, 200, 256, 257, 300, 512])
@pytest.mark.parametrize("m", [None, 70])
def test_every_class_of_d(d, m, kernel_device):
    assert_agrees(Case(n=70, m=m, d=d, bias=m is not None), "triton", torch.float32, kernel_device)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("d", [8, 70, 128, 300])
@pytest.mark.parametrize("case", [Case(n=150), Case(n=150, m=90, bias=True), Case(n=150, ids=3, return_same=True)])
def test_half_precision(case, d, dtype, kernel_device):
    from dataclasses import replace

    assert_agrees(replace(case, d=d), "triton", dtype, kernel_device)


def test_large_d(kernel_device):
    assert_agrees(Case(n=20, d=4096), "triton", torch.float32, kernel_device)


@pytest.mark.parametrize("n,m", [(1, None), (2, None), (1, 1), (1, 70), (70, 1), (64, None), (128, None), (129, 64)])
def test_edges_of_the_tiles(n, m, triangle, kernel_device):
    assert_agrees(Case(n=n, m=m), "triton", torch.float32, kernel_device)


@pytest.mark.parametrize("d", [8, 300])
@pytest.mark.parametrize(
    "needs,m", [(n, 40) for n in ("q", "k", "s", "b", "qk", "ks", "qs", "sb")] + [("q", None), ("sb", None)]
)
def test_only_the_gradients_asked_for(needs, m, d, kernel_device):
    assert_agrees(Case(n=40, m=m, d=d, bias=True, needs=needs), "triton", torch.float32, kernel_device)


def test_strips_smaller_than_the_problem(monkeypatch, kernel_device):
    monkeypatch.setattr(launcher, "STRIP_BYTES", 1)
    for m, bias in ((None, False), (None, True), (150, True)):
        assert_agrees(Case(n=300, m=m, d=260, bias=bias), "triton", torch.float32, kernel_device)


def test_small_gradients_survive_float16(kernel_device):
    """The mean over a large batch scales gradients by 1/n, and a weight by another 1/n: below float16's range."""
    case = Case(n=150, d=16, scale=2.0)
    inputs = case.inputs()
    inputs["weights"] = torch.full_like(inputs["weights"], 1e-6)
    exact = evaluate(case, inputs, "reference", torch.float64)["grad q"]
    # A float16 gradient of 1e-6 has few bits left itself: compare what the kernel computes before that rounding.
    q = inputs["q"].half().to(kernel_device).requires_grad_()
    s = inputs["scale"].float().to(kernel_device).requires_grad_()
    out = streaming_logsumexp(q, scale=s, backend="triton")
    (grad_scale,) = torch.autograd.grad((out * 1e-6).sum(), s)
    expected = (exact * inputs["q"]).sum() / (2 * case.scale)
    assert grad_scale.item() == pytest.approx(expected.item(), rel=2e-2, abs=1e-9)


def test_tiny_gradients_do_not_overflow_the_gain_of_float16(kernel_device):
    q = torch.randn(20, 8, device=kernel_device).half().requires_grad_()
    (streaming_logsumexp(q, scale=1.0, backend="triton") * 1e-36).sum().backward()
    assert q.grad.isfinite().all()


def test_the_flag_is_decided_on_the_device(monkeypatch, kernel_device):
    """One captured program serves temperatures on both sides of the bound: no host value selects the path."""
    monkeypatch.setattr(launcher, "TRIANGLE_MIN_ROWS", 1)
    z = torch.nn.functional.normalize(torch.randn(100, 8, device=kernel_device), dim=1)
    scales = [torch.tensor(1 / temperature, device=kernel_device) for temperature in (0.5, 0.05, 0.005)]
    with monkeypatch.context() as patch:
        if kernel_device.type == "cuda":
            patch.setattr(torch.Tensor, "item", _refuse)
            patch.setattr(torch.Tensor, "__bool__", _refuse)
        found = [streaming_logsumexp(z, scale=scale, backend="triton") for scale in scales]
    # A comparison copies to the host: only here.
    for out, scale in zip(found, scales, strict=True):
        torch.testing.assert_close(out, streaming_logsumexp(z, scale=scale, backend="reference"))


def _refuse(*_):
    raise AssertionError("a value was copied to the host")


def test_any_strides(kernel_device):
    wide = torch.randn(3, 90, 50, device=kernel_device)
    q, k = wide[1, :77, 3:19:2], wide[2].T[:41, ::12]
    assert not q.is_contiguous() and not k.is_contiguous()
    results = []
    for backend in ("triton", "reference"):
        a, b = q.clone(memory_format=torch.preserve_format), k
        a = q.detach().requires_grad_()
        b = k.detach().requires_grad_()
        out = streaming_logsumexp(a, b, scale=0.3, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), (a, b))))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_broadcast_gradient_is_accepted(kernel_device):
    q = torch.randn(40, 8, device=kernel_device, requires_grad=True)
    streaming_logsumexp(q, scale=1.0, backend="triton").sum().backward()  # expanded: stride zero
    expected = q.grad.clone()
    q.grad = None
    (streaming_logsumexp(q, scale=1.0, backend="triton") * torch.ones(40, device=kernel_device)).sum().backward()
    torch.testing.assert_close(q.grad, expected)


def test_wide_and_negative_ids(kernel_device):
    q, k = torch.randn(30, 8, device=kernel_device), torch.randn(20, 8, device=kernel_device)
    q_ids = torch.randint(-2, 2, (30,), device=kernel_device) * (1 << 40)
    k_ids = torch.randint(-2, 2, (20,), device=kernel_device) * (1 << 40)
    for arguments in ({"q": q, "q_ids": q_ids}, {"q": q, "k": k, "q_ids": q_ids, "k_ids": k_ids}):
        outs = [
            streaming_logsumexp(**arguments, scale=1.0, candidates="same_id", backend=backend)
            for backend in ("triton", "reference")
        ]
        torch.testing.assert_close(*outs)


def test_uninitialised_memory_is_never_read(monkeypatch, triangle, kernel_device):
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _original=original, **k: _poison(_original(*a, **k)))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(new_empty(*a, **k)))
    for d in (8, 300):
        assert_agrees(Case(n=70, d=d, ids=3, return_same=True), "triton", torch.float32, kernel_device)
        assert_agrees(Case(n=70, m=40, d=d, bias=True), "triton", torch.float32, kernel_device)


def _poison(x):
    return x.fill_(torch.nan) if x.is_floating_point() and x.device.type != "meta" else x


@pytest.mark.parametrize("d", [16, 260])
def test_deterministic_mode_gives_the_same_bits_twice(d, monkeypatch, kernel_device):
    """The triangle adds column sums atomically; under deterministic algorithms it is not taken. The wider rows go
    through cuBLAS, which is as conftest.py sets it."""
    monkeypatch.setattr(launcher, "TRIANGLE_MIN_ROWS", 1)
    torch.use_deterministic_algorithms(True)
    try:
        case = Case(n=300, d=d, ids=4, return_same=True)
        first, second = (evaluate(case, case.inputs(), "triton", torch.float32, kernel_device) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_nan_is_never_hidden(scale, triangle, kernel_device):
    q = torch.randn(80, 4, device=kernel_device)
    q[3, 1] = torch.nan
    q.requires_grad_()
    out = streaming_logsumexp(q, scale=scale, backend="triton")
    assert out.isnan().all()
    out.sum().backward()
    assert q.grad.isnan().any()


def test_double_backward_is_an_error(kernel_device):
    q = torch.randn(5, 3, device=kernel_device, requires_grad=True)
    out = streaming_logsumexp(q, scale=1.0, backend="triton").sum()
    (grad,) = torch.autograd.grad(out, q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("form", ["joint", "split", "inside"])
@pytest.mark.parametrize("learnable", [False, True])
def test_the_loss_on_the_kernels(form, learnable, kernel_device):
    embeddings = torch.randn(40, 2, 16, device=kernel_device)
    ids = torch.randint(-1, 5, (40,), device=kernel_device)
    centers = torch.randn(5, 16, device=kernel_device)
    results = []
    for backend in ("triton", "reference"):
        loss_fn = CCLLoss(form=form, learnable_temperature=learnable, backend=backend).to(kernel_device)
        x = embeddings.clone().requires_grad_()
        loss = loss_fn(x, ids, centers)
        results.append((loss, *torch.autograd.grad(loss, (x, *loss_fn.parameters()))))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_in_a_cuda_graph():
    z = torch.nn.functional.normalize(torch.randn(5000, 64, device="cuda"), dim=1).bfloat16().requires_grad_()
    scale = torch.tensor(10.0, device="cuda", requires_grad=True)

    def step():
        out = streaming_logsumexp(z, scale=scale, backend="triton")
        return out, *torch.autograd.grad(out.sum(), (z, scale))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (10.0, 100.0):
        scale.data.fill_(value)
        graph.replay()
        for x, y in zip(captured, step(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("m", [None, 21])
@pytest.mark.parametrize("relation", RELATIONS, ids=str)
@pytest.mark.parametrize("scale", [10.0, 200.0])
def test_keys_removed_by_the_bias(m, relation, scale, kernel_device):
    assert_agrees(Case(m=m, bias=True, removed=True, scale=scale, **relation), "triton", torch.float32, kernel_device)

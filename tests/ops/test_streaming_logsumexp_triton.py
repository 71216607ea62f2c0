"""The Triton kernels themselves: compiled where there is a GPU, else interpreted on CPU tensors."""

from dataclasses import replace

import pytest
import torch

from ccl_fast import CCLLoss, InfoNCELoss, streaming_logsumexp
from ccl_fast.kernels import launch as launches
from ccl_fast.kernels.launch import architecture_of, launch_on
from ccl_fast.ops.logsumexp import triton as launcher
from tests.kernels.offline_compile import shipped
from tests.ops.logsumexp_cases import Case, assert_agrees, evaluate
from tests.ops.test_streaming_logsumexp import RELATIONS
from tests.tolerance import assert_as_accurate

# NumPy, which the interpreter computes with, reports what IEEE arithmetic defines: log2(0), exp2 of large numbers.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning")
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
@pytest.mark.parametrize("d", [8, 70, 128, 200, 256, 300])
@pytest.mark.parametrize("case", [Case(n=150), Case(n=150, m=90, bias=True), Case(n=150, ids=3, return_same=True)])
def test_half_precision(case, d, dtype, kernel_device):
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
    # Three strips of rows, the last of them short, and two.
    for n, m, bias in ((260, None, False), (150, None, True), (150, 70, True), (150, 71, False)):
        assert_agrees(Case(n=n, m=m, d=260, bias=bias), "triton", torch.float32, kernel_device)


def test_a_million_rows_take_few_strips():
    """A strip reads and writes a whole float32 gradient, here 3 GB (D = 768): a thousandth of a second on an H200."""
    n, element, memory = 1 << 20, 2, 141 * 10**9
    rows = launcher.strip_rows(n, n, element, memory)
    assert n / rows <= 512
    assert rows * n * element <= memory * 0.032
    # What remains on a small device, and where the strip is the whole problem.
    assert launcher.strip_rows(n, n, element, 8 << 30) == launcher.strip_rows(n, n, element, 0) == 128
    assert launcher.strip_rows(5000, 4000, element, memory) == 5000


@pytest.mark.parametrize(
    "case", [Case(n=70, m=300, bias=True), Case(n=70, m=300, ids=3, return_same=True), Case(n=130)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_divided_over_the_grid(case, dtype, monkeypatch, triangle, kernel_device):
    monkeypatch.setattr(launcher, "KEYS_OF_A_PART", 8)
    monkeypatch.setattr(launcher, "_processors", lambda device: 8)
    assert launcher._parts(2, 130, kernel_device) == 8
    assert_agrees(case, "triton", dtype, kernel_device)
    assert_agrees(replace(case, scale=200.0), "triton", torch.float32, kernel_device)


def test_parts_of_the_keys_fill_the_device(monkeypatch):
    monkeypatch.setattr(launcher, "_processors", lambda device: 132)
    # (row blocks, keys): K prototypes or a queue; 4,096 rows; enough rows; few keys.
    expected = {(8, 65_536): 33, (32, 4096): 4, (128, 16_384): 2, (512, 65_536): 1, (1, 500): 1}
    assert {given: launcher._parts(*given, torch.device("cpu")) for given in expected} == expected


def towers(*sizes):
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


@pytest.mark.parametrize("d", [20, 300])
@pytest.mark.parametrize("scale", [10.0, 200.0])
@pytest.mark.parametrize("sizes", [(150, 150), (128, 256), (3, 200, 1), (130,), (64, 0, 64)], ids=str)
@pytest.mark.parametrize("keys", [None, (70, 200)], ids=str)
def test_pairs_of_one_id_are_passed_over(keys, sizes, scale, d, monkeypatch, kernel_device):
    """Runs of ids that end within tiles, at their ends, or that are all."""
    monkeypatch.setattr(launcher, "TRIANGLE_MIN_ROWS", 1)
    case = Case(n=sum(sizes), m=keys and sum(keys), d=d, scale=scale, ids=2, candidates="other_id")
    inputs = case.inputs()
    inputs |= {"q_ids": towers(*sizes), "k_ids": None if keys is None else towers(*keys)}
    exact = evaluate(case, inputs, "reference", torch.float64)
    plain = evaluate(case, inputs, "reference", torch.float32)
    actual = evaluate(case, inputs, "triton", torch.float32, kernel_device)
    terms = {"grad s": (exact["grad q"] * inputs["q"]).abs().sum() / scale}
    for name, value in actual.items():
        assert_as_accurate(value, exact[name], plain[name], torch.float32, name, magnitude=terms.get(name))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts the products")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_tiles_within_a_tower_are_not_visited(skip, backward, monkeypatch):
    """CLIP: of the upper triangle the half that joins the towers; backward half of all."""
    monkeypatch.setattr(launcher, "TRIANGLE_MIN_ROWS", 1)
    if not skip:
        monkeypatch.setattr(launcher, "_skippable", lambda *_: None)
    from triton.runtime.interpreter import InterpreterBuilder

    n, d, tower = 512, 16, 256
    z = torch.nn.functional.normalize(torch.randn(n, d), dim=1).requires_grad_()
    ask = {"scale": 10.0, "q_ids": towers(tower, tower).int(), "candidates": "other_id", "backend": "triton"}
    products, original = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *x: products.append(1) or original(*x))
    out = streaming_logsumexp(z, **ask)
    if backward:
        products.clear()
        out.sum().backward()
    found = len(products)
    kernel = "backward_rows" if backward else "forward_triangle"
    table = launch_on(architecture_of(z.device), kernel, 4, d, True)
    rows, cols = n // table.block_m, n // table.block_n
    if backward:  # a product for the logits, and one for the gradient
        assert found == (2 * rows * cols // 2 if skip else 2 * rows * cols)
    else:
        # A row of blocks begins at its diagonal.
        assert table.block_m == table.block_n
        assert found == ((rows // 2) * (cols // 2) if skip else rows * (rows + 1) // 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter counts the products")
@pytest.mark.parametrize("symmetric", [False, True])
def test_clip_visits_tiles_between_the_towers_alone(symmetric, monkeypatch):
    """One pass over n^2 pairs for each direction, and in the backward one for the gradient of each tower."""
    from triton.runtime.interpreter import InterpreterBuilder

    n, d = 256, 16
    monkeypatch.setattr(launcher, "TRIANGLE_MIN_ROWS", 1)
    queries, keys = (torch.randn(n, d, requires_grad=True) for _ in range(2))
    products, original = [], InterpreterBuilder.create_dot
    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda *x: products.append(1) or original(*x))
    loss = InfoNCELoss(0.1, symmetric=symmetric, backend="triton")(queries, keys)
    forward = len(products)
    loss.backward()
    tiles = {}
    for kernel in ("forward_rows", "backward_rows"):
        table = launch_on(architecture_of(queries.device), kernel, 4, d, True)
        tiles[kernel] = (n // table.block_m) * (n // table.block_n)
    assert forward == (2 if symmetric else 1) * tiles["forward_rows"]
    # A product for the logits, and one for the gradient.
    assert len(products) - forward == 2 * 2 * tiles["backward_rows"]


@pytest.mark.parametrize("precision,expected", [("highest", "tf32x3"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_products_follow_torch(precision, expected):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert launcher._precision() == expected
        assert expected in {of for _, element, *_, of in shipped() if element == "fp32"}  # what is compiled offline
    finally:
        torch.set_float32_matmul_precision(before)


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
        case = Case(n=150, d=d, ids=4, return_same=True)
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


def test_every_device_has_a_launch_that_fits_it(monkeypatch):
    """What is not compiled for itself takes the launches of the next of its kind; what is yet to come those for the
    least memory."""
    capabilities = {
        (8, 0): 80,
        (8, 6): 86,
        (8, 7): 86,
        (8, 9): 89,
        (9, 0): 90,
        (10, 0): 100,
        (10, 3): 100,
        (12, 0): 120,
        (12, 1): 120,
        (13, 0): 86,
    }
    for capability, expected in capabilities.items():
        launches._architecture.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert launches.architecture_of(torch.device("cuda", 0)) == expected
    launches._architecture.cache_clear()
    assert launch_on(86, "backward_rows", 2, 256, False).block_d == 256
    assert launch_on(90, "backward_rows", 2, 257, False) is None

"""A batch of any size as a single node, by Triton's kernels (interpreted without a GPU): against the dense backend."""

import pytest
import torch

from ccl_fast import CCLLoss, SupConLoss
from ccl_fast.ops import contrast_rows, normalize_triton
from ccl_fast.ops.logsumexp import triton
from ccl_fast.ops.normalize import SHORTEST
from tests.ops import contrast_cases
from tests.ops.contrast_cases import CASES, CENTERS, IDS, SCALES, K, N, rows
from tests.tolerance import assert_as_accurate

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # NumPy's, of the interpreter, where there is nothing to add.
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning"),
]
SERVED = [name for name in CASES if name.startswith(("ccl", "supcon")) and not name.endswith(("inside", "split"))]
every_case = pytest.mark.parametrize("case", SERVED)


@pytest.fixture(autouse=True)
def nodes(monkeypatch, kernel_device):
    """How often a node of this kind was made."""
    made, node = [], contrast_rows._ContrastRows
    monkeypatch.setattr(normalize_triton, "DEVICES", (kernel_device.type,))
    monkeypatch.setattr(node, "apply", lambda *inputs, apply=node.apply: made.append(1) or apply(*inputs))
    return made


@pytest.fixture(params=(False, True), ids=("few", "many"))
def many(request, monkeypatch):
    """As batches go that are worth the launches of a triangle, a flag and what may be skipped."""
    if request.param:
        monkeypatch.setattr(triton, "TRIANGLE_MIN_ROWS", 1)


def evaluate(case, dtype, backend, leaves=None, **options):
    with torch.device("cpu"):
        return contrast_cases.evaluate(case, dtype, backend, leaves, **options)


@every_case
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("temperature", (0.2, 0.03, 0.005))
@pytest.mark.parametrize("learn", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.usefixtures("many")
def test_as_accurate_as_the_dense_backend(case, reduction, temperature, learn, dtype, nodes):
    options = {"reduction": reduction, "temperature": temperature, "learn": learn}
    exact = evaluate(case, torch.float64, "reference", **options)
    plain = evaluate(case, dtype, "reference", **options)
    found = evaluate(case, dtype, "triton", **options)
    assert len(nodes) == 1 and found.keys() == exact.keys()
    for name in found:
        assert found[name].dtype == plain[name].dtype and found[name].shape == plain[name].shape
        # A sum that may cancel: in units of what it sums.
        magnitude = exact["x"].abs().sum() * rows(N, seed=3).abs().max() if name == "temperature" else None
        assert_as_accurate(found[name], exact[name], plain[name], dtype, name, magnitude=magnitude)


@pytest.mark.parametrize("n, d", ((1, 3), (2, 16), (19, 130), (33, 37)))
@pytest.mark.parametrize("weight", (0.0, 0.7))
def test_odd_sizes(n, d, weight, nodes, kernel_device):
    random = torch.Generator().manual_seed(n)
    x, centers = (torch.randn(m, d, generator=random, dtype=torch.float64) for m in (n, 3))
    ids = torch.randint(-1, 3, (n,), generator=random)
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "triton")):
        leaf, c = x.to(dtype).to(kernel_device).requires_grad_(), centers.to(dtype).to(kernel_device)
        loss = CCLLoss(0.1, center_weight=weight, backend=backend)(leaf, ids.to(kernel_device), c)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert len(nodes) == 1
    for what, exact, plain, found in zip(("loss", "gradient"), *results, strict=True):
        assert_as_accurate(found, exact, plain, torch.float32, what)


@every_case
@pytest.mark.parametrize("length", (0.0, 1e-30, 1e-8, 1e25))
def test_rows_of_any_length_have_their_direction(case, length, nodes):
    """One of them, beside usual ones: the gradient is that of its direction, or 0."""
    usual = [rows(N, seed=3 + i) for i in range(CASES[case][3])]
    leaves = [x.clone() for x in usual]
    leaves[0][4] *= length / leaves[0][4].norm()
    if not length:
        usual[0][4] = 0.0
    found = evaluate(case, torch.float32, "triton", leaves, reduction="sum", learn=False)
    expected = evaluate(case, torch.float64, "reference", usual, reduction="sum", learn=False)
    assert len(nodes) == 1
    torch.testing.assert_close(found["loss"].double(), expected["loss"], rtol=1e-5, atol=1e-5)
    if not length:
        assert not found["x"][4].any()
        return
    found, expected = found["x"][4].double(), expected["x"][4] * usual[0][4].norm() / length
    if length < 2.0**SHORTEST:  # bounded
        assert found.norm() <= 4 * 2.0**-SHORTEST * length * expected.norm()
        found, expected = (x / x.norm().clamp(min=1e-30) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("apart", (0.0, 1e-4, 1.0))
@pytest.mark.parametrize("temperature", (0.1, 0.02))
def test_positives_that_outweigh_all_else(apart, temperature, nodes, kernel_device):
    """Pairs that are close, all else opposite: the loss is far below what float32 adds to 1, and not 0."""
    first = torch.zeros(4, 8, dtype=torch.float64)
    first[torch.arange(4), torch.arange(4)] = 1.0
    x = torch.stack((first, first + apart * rows(4, seed=7).repeat(1, 2)[:, :8] * 0.1), 1)
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
        leaf = x.to(dtype).to(kernel_device).requires_grad_()
        loss = SupConLoss(temperature, backend=backend)(leaf, torch.arange(4, device=kernel_device))
        results.append((loss.detach().double().cpu(), torch.autograd.grad(loss, leaf)[0].double().cpu()))
    (exact, of_exact), (found, of_found) = results
    assert len(nodes) == 1 and exact > 0
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(of_found, of_exact, rtol=1e-3, atol=1e-3 * float(of_exact.abs().max()))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("case", ("ccl", "supcon"))
def test_not_a_number_is_not_hidden(bad, case, nodes):
    leaf = rows(N, seed=3)
    leaf[0, 0] = bad
    found = evaluate(case, torch.float32, "triton", [leaf])
    assert nodes and found["loss"].isnan() and found["x"].isnan().any()


def test_what_has_no_positive_has_the_loss_0(nodes, kernel_device):
    leaf = rows(N).float().to(kernel_device).requires_grad_()
    ids = torch.full((N,), -1, device=kernel_device)
    for reduction in ("mean", "sum", "none"):
        loss = CCLLoss(0.1, reduction=reduction, backend="triton")(leaf, ids, CENTERS.float().to(kernel_device))
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert not loss.any() and not grad.any()
    assert len(nodes) == 3


@pytest.mark.parametrize("graph", (False, True))
def test_the_gradient_of_the_gradient_is_refused(graph, nodes, kernel_device):
    leaf = rows(N).float().to(kernel_device).requires_grad_()
    loss = SupConLoss(0.1, backend="triton")(leaf, IDS.to(kernel_device))
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=graph)
    assert nodes and grad.requires_grad == graph
    if graph:
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()


def test_so_is_that_of_the_temperature_alone(nodes, kernel_device):
    loss_fn = SupConLoss(0.1, learnable_temperature=True, backend="triton").to(kernel_device)
    loss = loss_fn(rows(N).float().to(kernel_device), IDS.to(kernel_device))
    (grad,) = torch.autograd.grad(loss, loss_fn.log_temperature, create_graph=True)
    assert nodes
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), loss_fn.log_temperature)


def test_embeddings_of_inference_mode_with_a_temperature_that_learns(nodes, kernel_device):
    with torch.inference_mode():
        x = rows(N).float().to(kernel_device)
    loss_fn = SupConLoss(0.1, learnable_temperature=True, backend="triton").to(kernel_device)
    loss_fn(x, IDS.to(kernel_device)).backward()
    assert nodes and loss_fn.log_temperature.grad.isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_temperature_of_the_centers_in_half_precision(dtype, nodes, kernel_device):
    temperature = torch.tensor(1.3e-5 if dtype == torch.float16 else 0.07, dtype=dtype, device=kernel_device)
    x, ids, centers = (t.to(kernel_device) for t in (rows(N).float(), IDS, CENTERS.float()))
    found, expected = (
        CCLLoss(0.1, center_temperature=temperature, backend=b)(x, ids, centers) for b in ("triton", "reference")
    )
    assert nodes
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


# Which torch itself calls.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused(nodes, kernel_device):
    x = rows(N).float().to(kernel_device)
    with pytest.raises(RuntimeError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        SupConLoss(0.1, backend="triton")(dual, IDS.to(kernel_device))


def test_rows_of_any_strides_keep_them_to_themselves(nodes, kernel_device):
    x = torch.randn(6, N, 2, device=kernel_device)
    ids = torch.stack((IDS, IDS), 1).abs().to(kernel_device)[:, 0]
    expected = SupConLoss(0.1, backend="reference")(x[:, :, 0].T.contiguous(), ids)
    leaf = x.clone().requires_grad_()
    found = SupConLoss(0.1, backend="triton")(leaf[:, :, 0].T, ids)
    found.backward()
    torch.testing.assert_close(found.detach(), expected)
    assert len(nodes) == 1 and leaf.grad[..., 0].any() and not leaf.grad[..., 1].any()


@pytest.mark.parametrize("under", ("no grad", "inference", "autocast"))
def test_modes(under, nodes, kernel_device):
    x, ids, centers = (t.to(kernel_device) for t in (rows(N).float(), IDS, CENTERS.float()))
    plain, loss_fn = CCLLoss(0.1, backend="reference")(x, ids, centers), CCLLoss(0.1, backend="triton")
    contexts = {
        "no grad": torch.no_grad(),
        "inference": torch.inference_mode(),
        "autocast": torch.autocast(kernel_device.type, dtype=torch.float16),
    }
    with contexts[under]:
        found = loss_fn(x, ids, centers)
    assert len(nodes) == 1 and found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=2e-3 if under == "autocast" else 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "what",
    ("split", "inside", "instance_weight", "normalize", "float64", "center_temperature", "compiled", "func", "blocked"),
)
def test_what_it_does_not_serve_goes_the_other_way(what, nodes, kernel_device):
    dtype = torch.float64 if what == "float64" else torch.float32
    x = torch.stack((rows(N), rows(N, seed=1)), 1).to(dtype).to(kernel_device)
    ids, centers = IDS.to(kernel_device), CENTERS.to(dtype).to(kernel_device)
    own = {
        "split": {"form": "split"},
        "inside": {"form": "inside"},
        "instance_weight": {"instance_weight": 0.3},
        "normalize": {"normalize": False},
    }.get(what, {})
    temperature = None
    if what == "center_temperature":
        temperature = SCALES.to(kernel_device, copy=True).requires_grad_()
    backend = "blocked" if what in ("float64", "blocked") else "triton"
    loss_fn = CCLLoss(0.2, backend=backend, **own)

    def loss(x):
        return loss_fn(x, ids, centers, center_temperature=temperature)

    expected = CCLLoss(0.2, backend="reference", **own)(x, ids, centers, center_temperature=temperature)
    if what == "compiled":
        torch.compiler.reset()
        found = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)(x, ids, centers)
    elif what == "func":
        found = torch.func.functional_call(loss_fn, {}, (x, ids, centers))
        torch.func.grad(loss)(x)
        nodes.clear()
    else:
        found = loss(x)
    assert not nodes
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_without_a_gpu_nothing_changes(monkeypatch, nodes):
    monkeypatch.setattr(normalize_triton, "DEVICES", ("cuda",))
    SupConLoss(0.1, backend="triton" if torch.cuda.is_available() else "auto")(rows(N).float(), IDS)
    assert not nodes and K

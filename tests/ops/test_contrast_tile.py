"""A small batch as a single node: against the dense backend, on a CPU and as on a GPU, which does not wait."""

import pytest
import torch

from ccl_fast import CCLLoss, InfoNCELoss, NTXentLoss, SupConLoss
from ccl_fast.kernels import cpu_extension
from ccl_fast.ops import contrast_cpu, contrast_tile
from ccl_fast.ops.normalize import SHORTEST
from tests.ops.contrast_cases import CASES, CENTERS, IDS, D, K, N, evaluate, rows
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")
REDUCTIONS = ("mean", "sum")
every_case = pytest.mark.parametrize("case", CASES)
of_a_cpu = pytest.mark.parametrize("known", (True,), indirect=True)


@pytest.fixture(params=(True, False), ids=("cpu", "gpu"), autouse=True)
def known(request, monkeypatch) -> bool:
    """Whether the host knows what tensors hold."""
    if not request.param:
        monkeypatch.setattr(contrast_tile, "is_known", lambda x: False)
        monkeypatch.setattr(contrast_cpu, "serves", lambda logits: False)
    return request.param


@pytest.fixture
def tiles(monkeypatch):
    """How often a node of this kind was made."""
    made = []
    for name in ("_SelfContrast", "_ViewsContrast", "_TowerContrast"):
        node = getattr(contrast_tile, name)
        monkeypatch.setattr(node, "apply", lambda *inputs, apply=node.apply: made.append(1) or apply(*inputs))
    return made


@every_case
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("temperature", (0.2, 1 / contrast_tile.MAX_SCALE))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_as_accurate_as_the_dense_backend(case, reduction, temperature, dtype, known, tiles):
    # A scale that is a tensor is known on a CPU alone; learned, it is the temperature's inverse, rounded.
    options = {
        "reduction": reduction,
        "temperature": max(temperature, 0.0251) if known else temperature,
        "learn": known,
    }
    exact = evaluate(case, torch.float64, "reference", **options)
    plain = evaluate(case, dtype, "reference", **options)
    found = evaluate(case, dtype, "auto", **options)
    assert len(tiles) == (known or case != "ccl, temperatures")
    for name in found:
        assert found[name].dtype == plain[name].dtype
        # The temperature's gradient is a sum that may cancel: in units of what it sums.
        magnitude = exact["x"].abs().sum() * rows(N, seed=3).abs().max() if name == "temperature" else None
        assert_as_accurate(found[name], exact[name], plain[name], dtype, name, magnitude=magnitude)


@every_case
@pytest.mark.parametrize("length", (1e-30, 1e-8, 1e25))
def test_rows_of_any_length_have_their_direction(case, length, known, tiles):
    """One of them, beside usual ones, and one of zeros: the gradient is that of its direction, or 0."""
    count = CASES[case][3]
    usual = [rows(N, seed=3 + i) for i in range(count)]
    leaves = [x.clone() for x in usual]
    leaves[0][4] *= length / leaves[0][4].norm()
    leaves[0][6] = usual[0][6] = 0.0
    found = evaluate(case, torch.float32, "auto", leaves, reduction="sum", learn=known)
    expected = evaluate(case, torch.float64, "reference", usual, reduction="sum", learn=known)
    assert len(tiles) == (known or case != "ccl, temperatures")
    torch.testing.assert_close(found["loss"].double(), expected["loss"], rtol=1e-5, atol=1e-5)
    assert not found["x"][6].any()
    found, expected = found["x"][4].double(), expected["x"][4] * usual[0][4].norm() / length
    if length < 2.0**SHORTEST:  # bounded
        assert found.norm() <= 4 * 2.0**-SHORTEST * length * expected.norm()
        found, expected = (x / x.norm().clamp(min=1e-30) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("scale", (contrast_tile.MAX_SCALE, 100))
def test_positives_that_vanish_beside_the_others(scale, tiles):
    """Inside: their share of the sum is below what float32 adds, or holds."""
    x = torch.eye(4, D, dtype=torch.float64)
    x[1], x[2], x[3] = -x[0], x[0] + 0.01 * x[2], x[1] * 1.0
    labels, options = torch.tensor([0, 0, 1, 2]), {"form": "inside", "reduction": "sum"}
    for backend, dtype in (("reference", torch.float64), ("auto", torch.float32)):
        leaf = x.to(dtype, copy=True).requires_grad_()
        loss = SupConLoss(1 / scale, backend=backend, **options)(leaf, labels)
        (grad,) = torch.autograd.grad(loss, leaf)
        if backend == "reference":
            expected = loss.detach(), grad
    assert len(tiles) == (scale <= contrast_tile.MAX_SCALE) and loss > 2 * scale
    torch.testing.assert_close(loss.detach().double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", ("joint", "inside"))
def test_two_rows_and_so_many_centers_that_the_sum_would_overflow(form):
    """The rows are opposite to their positives, and alike to the other centres."""
    near = torch.zeros(D)
    near[0] = 1.0
    centers = near.repeat(100_000, 1)
    centers[0] = -near
    losses, grads = [], []
    for backend, dtype in (("blocked", torch.float64), ("auto", torch.float32)):
        leaf = (torch.stack((near, -near)) + 1e-3 * rows(2)).to(dtype).requires_grad_()
        losses.append(
            CCLLoss(1 / contrast_tile.MAX_SCALE, form=form, backend=backend)(leaf, torch.arange(2), centers.to(dtype))
        )
        grads.append(torch.autograd.grad(losses[-1], leaf)[0].double())
    torch.testing.assert_close(losses[1].double(), losses[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    (
        *({"form": "split"}, {"instance_weight": 0.3}, {"backend": "blocked"}, {"normalize": False}),
        *({"reduction": "none"}, {"temperature": 0.02}, {"center_temperature": 0.02}),
        {"center_temperature": torch.full((K,), 0.02)},
    ),
)
def test_what_it_does_not_serve_goes_the_other_way(options, tiles):
    x, options = torch.stack((rows(N), rows(N, seed=1)), 1), {"temperature": 0.2} | options
    found = CCLLoss(**options)(x, IDS, CENTERS)
    assert not tiles
    torch.testing.assert_close(found, CCLLoss(**(options | {"backend": "reference"}))(x, IDS, CENTERS))


def test_a_larger_batch_goes_the_other_way(tiles, monkeypatch):
    monkeypatch.setattr(contrast_tile, "MAX_ELEMENTS", N * N)
    SupConLoss(0.2)(rows(N), IDS)
    assert len(tiles) == 1
    SupConLoss(0.2)(rows(N + 1), torch.zeros(N + 1, dtype=torch.int64))
    assert len(tiles) == 1


@pytest.mark.parametrize("magnitude", (1e10, 3e16))
@pytest.mark.parametrize("case", ("supcon", "supcon, inside", "nt-xent", "towers"))
def test_logits_as_large_as_float32_has(case, magnitude):
    """What is no candidate weighs nothing beside logits of -1e33 either."""
    leaves = [rows(N, seed=3 + i) * magnitude for i in range(CASES[case][3])]
    found, expected = (evaluate(case, torch.float32, b, leaves, normalize=False)["loss"] for b in ("auto", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


@every_case
@of_a_cpu  # on a GPU a temperature that is learned is not known, so that there is no tile
def test_the_second_derivative_of_the_temperature_alone_is_refused(case, tiles):
    loss, own, call, count = CASES[case]
    module = loss(0.2, learnable_temperature=True, **own)
    with torch.inference_mode():  # nor does it matter how the embeddings were made
        leaves = [rows(N, seed=3 + i).float() for i in range(count)]
    (grad,) = torch.autograd.grad(call(module, *leaves), module.log_temperature, create_graph=True)
    assert len(tiles) == 1
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad.sum(), module.log_temperature)


@pytest.fixture(params=(64, 32, 16, None), ids=lambda width: f"{width or 'no'} bytes")
def vectors(request, monkeypatch, known):
    """Each width of vectors that the CPU extension has here, and no extension."""
    if request.param is None:
        monkeypatch.setattr(contrast_cpu, "serves", lambda logits: False)
        return
    cpus = [] if cpu_extension.module is None else cpu_extension.module.cpus
    found = [cpu for cpu in cpus if cpu.bytes == request.param]
    if not found:
        pytest.skip("not here")
    monkeypatch.setattr(cpu_extension, "best", lambda: found[0])


@of_a_cpu
@pytest.mark.parametrize("n", (2, 15, 33, 70))
@pytest.mark.parametrize("loss", ("ccl", "ccl, weight", "inside", "supcon", "views", "towers", "one tower"))
def test_every_width_of_vectors(loss, n, vectors, tiles):
    random = torch.Generator().manual_seed(n)
    x, y, centers = (torch.randn(rows, 7, generator=random, dtype=torch.float64) for rows in (n, n, 21))
    ids = torch.randint(-1, 21, (n,), generator=random)
    ids[n // 2 :] = ids[n // 2 :].clamp(max=4)
    build, call = {
        "ccl": (CCLLoss, lambda f, a, b: f(a, ids, centers.to(a.dtype))),
        "ccl, weight": (
            lambda t, **o: CCLLoss(t, center_weight=0.3, **o),
            lambda f, a, b: f(torch.stack((a, b), 1), ids, centers.to(a.dtype)),
        ),
        "inside": (lambda t, **o: CCLLoss(t, form="inside", **o), lambda f, a, b: f(a, ids, centers.to(a.dtype))),
        "supcon": (SupConLoss, lambda f, a, b: f(torch.cat((a, b)), torch.cat((ids, ids % 3)))),
        "views": (NTXentLoss, lambda f, a, b: f(a, b)),
        "towers": (InfoNCELoss, lambda f, a, b: f(a, b)),
        "one tower": (lambda t, **o: InfoNCELoss(t, symmetric=False, **o), lambda f, a, b: f(a, b)),
    }[loss]
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "auto")):
        leaves = [z.to(dtype, copy=True).requires_grad_() for z in (x, y)]
        value = call(build(0.07, backend=backend), *leaves)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        results.append((value.detach(), *(g for g in grads if g is not None)))
    assert len(tiles) == 1
    for exact, plain, found in zip(*results, strict=True):
        assert_as_accurate(found, exact, plain, torch.float32)

"""The distilled prediction against its double sum, the swapped prediction, and its promise of memory."""

import subprocess
import sys

import pytest
import torch

from ccl_fast.ops import distilled_prediction, swapped_prediction
from tests import ROOT
from tests.oracles.losses import assert_matches, unit
from tests.tolerance import OF_TORCH_2_11

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
SIZES = ((9, 5), (5, 9), (1, 4), (6, 1), (0, 3))  # n, k
every_size = pytest.mark.parametrize("n, k", SIZES)
every_kind = pytest.mark.parametrize("potentials, hard", ((False, False), (True, False), (True, True)))


def given(n, k, d=6, width=4, dtype=torch.float64, potentials=True, hard=True):
    """Rows and prototypes of a student and of a teacher, what is added to the teacher's logits, whose are hard."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((n, d), (k, d), (n, width), (k, width))
    rows = [unit(torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype) for size in sizes]
    bias = torch.randn(k, generator=generator, dtype=torch.float64)
    is_hard = torch.rand(n, generator=generator) < 0.5
    return rows, {"potentials": bias if potentials else None, "hard": is_hard if hard else None}


def definition(z, centers, teacher_z, teacher_centers, *, scale, teacher_scale, potentials=None, hard=None):
    logits = teacher_scale * teacher_z.detach() @ teacher_centers.detach().T
    q = (logits if potentials is None else logits + potentials).softmax(1)
    if hard is not None:
        q = torch.where(hard[:, None], torch.nn.functional.one_hot(q.argmax(1), q.shape[1]).to(q), q)
    return -(q * (scale * z @ centers.T).log_softmax(1)).sum(1)


def evaluate(function, rows, options, scale=10.0):
    wide = torch.promote_types(rows[0].dtype, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (*rows[:2], torch.tensor(scale, dtype=wide))]
    value = function(*leaves[:2], *rows[2:], scale=leaves[2], teacher_scale=20.0, **options)
    weights = torch.linspace(1, 2, len(value), dtype=value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, weights)]


@every_size
@every_kind
def test_the_definition(n, k, potentials, hard):
    rows, options = given(n, k, potentials=potentials, hard=hard)
    assert_matches(evaluate(distilled_prediction, rows, options), evaluate(definition, rows, options))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 3e-3)))
def test_dtypes(dtype, tolerance):
    rows, options = given(9, 5, dtype=dtype)
    actual = evaluate(distilled_prediction, rows, options)
    assert [x.dtype for x in actual] == [torch.float32, dtype, dtype, torch.float32]
    assert_matches(actual, evaluate(definition, [x.double() for x in rows], options), tolerance)


def test_of_two_views_it_is_the_swapped_prediction():
    rows, options = given(9, 5, width=6, hard=False)
    z, centers, other, _ = rows
    both = torch.stack((z, other))
    swapped = swapped_prediction(both, centers, options["potentials"].expand(2, -1), scale=10.0, plan_scale=20.0)
    scales = {"scale": 10.0, "teacher_scale": 20.0, **options}
    found = distilled_prediction(z, centers, other, centers, **scales)
    torch.testing.assert_close(found + distilled_prediction(other, centers, z, centers, **scales), swapped)


def test_a_teacher_that_is_sure_is_hard():
    rows, _ = given(9, 5)
    sure = distilled_prediction(*rows, scale=10.0, teacher_scale=1e5)
    everywhere = torch.ones(9, dtype=torch.bool)
    torch.testing.assert_close(sure, distilled_prediction(*rows, scale=10.0, teacher_scale=1.0, hard=everywhere))


def test_a_nan_stays_in_its_row():
    rows, options = given(9, 5)
    rows[2][3] = torch.nan
    options["hard"][3] = True
    value = distilled_prediction(*rows, scale=10.0, teacher_scale=1.0, **options)
    assert value.isnan().tolist() == [i == 3 for i in range(9)]


def test_autocast_rounds_the_rows():
    rows, options = given(9, 5, dtype=torch.float32)
    scales = {"scale": 10.0, "teacher_scale": 20.0}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = distilled_prediction(*rows, **scales, **options)
    assert torch.equal(actual, distilled_prediction(*(x.bfloat16() for x in rows), **scales, **options))


def test_compiles_as_one_graph(compiler):
    rows, options = given(9, 5)
    compiled = torch.compile(distilled_prediction, fullgraph=True, backend=compiler)
    assert_matches(evaluate(compiled, rows, options), evaluate(distilled_prediction, rows, options), 1e-12)


def test_gradients_of_torch_func():
    (z, *others), options = given(9, 5)

    def total(z):
        return distilled_prediction(z, *others, scale=10.0, teacher_scale=20.0, **options).sum()

    leaf = z.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(z), torch.autograd.grad(total(leaf), leaf)[0])


def test_a_second_derivative_raises():
    rows, options = given(9, 5)
    leaf = rows[0].requires_grad_()
    value = distilled_prediction(leaf, *rows[1:], scale=10.0, teacher_scale=20.0, **options)
    (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"distilled_prediction: .*double backward"):
        gradient.square().sum().backward()


def test_each_input_alone_may_require_a_gradient():
    rows, options = given(9, 5)
    expected = evaluate(definition, rows, options)[1:]
    weights = torch.linspace(1, 2, 9, dtype=torch.float64)
    for i in range(3):
        leaves = [*(x.clone() for x in rows[:2]), torch.tensor(10.0, dtype=torch.float64)]
        leaves[i].requires_grad_()
        value = distilled_prediction(*leaves[:2], *rows[2:], scale=leaves[2], teacher_scale=20.0, **options)
        torch.testing.assert_close(torch.autograd.grad(value, leaves[i], weights)[0], expected[i])


def test_errors_name_the_argument():
    (z, c, t, u), options = given(9, 5)
    for rows, more, message in (
        ((z, c[:, :3], t, u), {}, r"centers: expected shape \[rows, 6\], got \[5, 3\]"),
        ((z, c[:0], t, u[:0]), {}, r"centers: expected at least one row"),
        ((z, c, t[1:], u), {}, r"teacher_z: expected 9 rows \(those of z\), got 8"),
        ((z, c, t, u[1:]), {}, r"teacher_centers: expected 5 rows \(those of centers\), got 4"),
        ((z, c, t.float(), u), {}, r"teacher_z: expected dtype torch.float64 .*got torch.float32"),
        ((z, c, t, u), {"potentials": options["potentials"][1:]}, r"potentials: expected shape \[5\], got \[4\]"),
        ((z, c, t, u), {"hard": torch.ones(9)}, r"hard: expected bool, got torch.float32"),
        ((z, c, t, u), {"hard": torch.ones(8).bool()}, r"hard: expected shape \[9\], got \[8\]"),
        ((z, c, t, u), {"teacher_scale": "1"}, r"teacher_scale: expected a number"),
    ):
        with pytest.raises(ValueError, match=message):
            distilled_prediction(*rows, **{"scale": 1.0, "teacher_scale": 1.0} | more)


@pytest.mark.slow  # a process of its own
@pytest.mark.parametrize("n, k", [(2048, 16_384), (8192, 20_480)])
def test_memory_is_linear(n, k):
    """One forward and backward of both operators, where a single n x k array would take 128 MiB, or 640."""
    code = """
import sys
import torch
from benchmarks.harness.memory import forget_peak, status
from ccl_fast.ops import assignment_mass, distilled_prediction

def step(n, k, d=4):
    z, centers = torch.randn(n, d, requires_grad=True), torch.randn(k, d, requires_grad=True)
    teacher, hard = torch.randn(n, d), torch.arange(n) % 2 == 0
    before = forget_peak()
    loss = distilled_prediction(z, centers, teacher, centers, scale=1.0, teacher_scale=2.0, hard=hard).sum()
    (loss + assignment_mass(z, centers, scale=1.0).square().sum()).backward()
    return status("VmHWM") - before

step(512, 512)
print(step(*map(int, sys.argv[1:])))
"""
    command = [sys.executable, "-c", code, str(n), str(k)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 80 * 2**20 + OF_TORCH_2_11, f"{int(result.stdout) / 2**20:.0f} MiB"

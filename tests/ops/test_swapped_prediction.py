"""The swapped prediction of all backends against its double sum over views and plans."""

import itertools

import pytest
import torch

from ccl_fast.ops import sinkhorn, swapped_prediction
from ccl_fast.ops.transport import swapped_prediction as swapped_module
from tests.oracles.losses import assert_matches, unit

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
SIZES = ((2, 2, 9, 5), (4, 2, 5, 9), (3, 1, 7, 3), (3, 3, 1, 4), (2, 2, 6, 1), (2, 0, 4, 3))  # views, plans, n, k


def given(views, plans, n, k, d=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    z, centers = (unit(torch.randn(*s, d, generator=generator, dtype=torch.float64)) for s in ((views, n), (k,)))
    return z.to(dtype), centers.to(dtype), torch.randn(plans, k, generator=generator, dtype=torch.float64)


def definition(z, centers, potentials, scale, plan_scale):
    result = 0.0 * (z.sum((0, 2)) + centers.sum() + scale)
    for g, b in enumerate(potentials):
        q = (plan_scale * z[g].detach() @ centers.detach().T + b).softmax(1)
        for v in range(len(z)):
            if v != g:
                result = result - (q * (scale * z[v] @ centers.T).log_softmax(1)).sum(1)
    return result


def evaluate(function, z, centers, potentials, scale=10.0, **options):
    wide = torch.promote_types(z.dtype, torch.float32)
    leaves = [z.detach().requires_grad_(), centers.detach().requires_grad_(), torch.tensor(scale, dtype=wide)]
    leaves[2].requires_grad_()
    value = function(leaves[0], leaves[1], potentials, scale=leaves[2], plan_scale=20.0, **options)
    weights = torch.linspace(1, 2, len(value), dtype=value.dtype, device=value.device)
    return [x.cpu() for x in (value.detach(), *torch.autograd.grad(value, leaves, weights))]


@pytest.mark.parametrize("size", SIZES)
def test_the_definition(size, backend):
    arguments = given(*size)
    assert_matches(evaluate(swapped_prediction, *arguments, backend=backend), evaluate(definition, *arguments))


def evaluate_sum(function, z, centers, potentials, **options):
    """Value and gradients of twice the sum, as operators give it or as the sum of what is given."""
    wide = torch.promote_types(z.dtype, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (z, centers, torch.tensor(10.0, dtype=wide))]
    value = 2 * function(*leaves[:2], potentials, scale=leaves[2], plan_scale=20.0, **options).sum()
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("size", SIZES)
def test_the_sum(size, backend):
    arguments = given(*size)
    actual = evaluate_sum(swapped_prediction, *arguments, backend=backend, reduction="sum")
    assert_matches(actual, evaluate_sum(definition, *arguments))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 3e-3)))
def test_dtypes_of_the_sum(dtype, tolerance):
    z, centers, potentials = given(3, 2, 9, 5, dtype=dtype)
    actual = evaluate_sum(swapped_prediction, z, centers, potentials, reduction="sum")
    assert [x.dtype for x in actual] == [torch.float32, dtype, dtype, torch.float32]
    assert_matches(actual, evaluate_sum(definition, z.double(), centers.double(), potentials), tolerance)


def test_a_sum_without_a_gradient_keeps_none():
    z, centers, potentials = given(2, 2, 9, 5)
    with torch.no_grad():
        value = swapped_prediction(z, centers, potentials, scale=10.0, plan_scale=20.0, reduction="sum")
        found = swapped_module._sum(z, centers, potentials, torch.tensor(10.0), 20.0, False)
    torch.testing.assert_close(value, definition(z, centers, potentials, 10.0, 20.0).sum())
    assert [x.numel() for x in found] == [1, 0, 0, 1]


@pytest.mark.parametrize("size", SIZES[:3])
def test_on_the_kernels(size, kernel_device):
    arguments = given(*size, dtype=torch.float32)
    on_device = [x.to(kernel_device) for x in arguments]
    wide = [x.double() for x in arguments]
    actual = evaluate(swapped_prediction, *on_device, backend="triton")
    assert_matches(actual, evaluate(definition, *wide), 1e-3)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 3e-3)))
def test_dtypes(dtype, tolerance):
    z, centers, potentials = given(3, 2, 9, 5, dtype=dtype)
    actual = evaluate(swapped_prediction, z, centers, potentials)
    assert [x.dtype for x in actual] == [torch.float32, dtype, dtype, torch.float32]
    assert_matches(actual, evaluate(definition, z.double(), centers.double(), potentials), tolerance)


def test_autocast_rounds_points_and_centers(backend):
    z, centers, potentials = given(2, 2, 9, 5, dtype=torch.float32)
    options = {"scale": 10.0, "plan_scale": 20.0, "backend": backend}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = swapped_prediction(z, centers, potentials, **options)
    assert torch.equal(actual, swapped_prediction(z.bfloat16(), centers.bfloat16(), potentials, **options))


@pytest.mark.parametrize("scale", (1.0, 20.0, 500.0))
def test_the_potentials_of_sinkhorn_make_its_plan(scale, backend):
    # Beyond 25 another way is taken.
    z, centers, _ = given(2, 0, 13, 5)
    u, v = sinkhorn(z[0], centers, scale=scale, backend=backend)
    plan = (scale * z[0] @ centers.T + u[:, None] + v).exp()
    torch.testing.assert_close(plan, (scale * z[0] @ centers.T + v).softmax(1))
    u_dense, v_dense = sinkhorn(z[0], centers, scale=scale, backend="reference")
    torch.testing.assert_close((u[:, None] + v), (u_dense[:, None] + v_dense))


def test_compiles_as_one_graph(compiler):
    z, centers, potentials = given(2, 2, 9, 5)
    compiled = torch.compile(swapped_prediction, fullgraph=True, backend=compiler)
    assert_matches(
        evaluate(compiled, z, centers, potentials), evaluate(swapped_prediction, z, centers, potentials), 1e-12
    )


def test_second_derivative_raises_and_the_dense_one_does_not():
    z, centers, potentials = given(2, 2, 9, 5)
    z.requires_grad_()
    for backend, reduction in itertools.product(("blocked", "reference"), ("none", "sum")):
        options = {"scale": 10.0, "plan_scale": 20.0, "backend": backend, "reduction": reduction}
        loss = swapped_prediction(z, centers, potentials, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), z, create_graph=True)
        if backend == "reference":
            gradient.square().sum().backward()
        else:
            with pytest.raises(RuntimeError, match=r"swapped_prediction: .*double backward.*reference"):
                gradient.square().sum().backward()


def test_each_input_alone_may_require_a_gradient():
    z, centers, potentials = given(2, 2, 9, 5)
    expected = evaluate(definition, z, centers, potentials)[1:]
    weights = torch.linspace(1, 2, 9, dtype=torch.float64)
    for i in range(3):
        leaves = [z.clone(), centers.clone(), torch.tensor(10.0, dtype=torch.float64)]
        leaves[i].requires_grad_()
        loss = swapped_prediction(*leaves[:2], potentials, scale=leaves[2], plan_scale=20.0)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves[i], weights)[0], expected[i])


def test_errors_name_the_argument():
    z, centers, potentials = given(2, 2, 9, 5)
    for arguments, message in (
        ((z[0], centers, potentials), r"z: expected shape \[views, n, d\], got \[9, 16\]"),
        ((z.long(), centers, potentials), r"z: expected float64.*got torch.int64"),
        ((z, centers.float(), potentials), r"centers: expected dtype torch.float64 .*got torch.float32"),
        ((z, centers[:, :3], potentials), r"centers: expected shape \[rows, 16\], got \[5, 3\]"),
        ((z, centers[:0], potentials[:, :0]), r"centers: expected at least one row"),
        ((z, centers, potentials[:, :3]), r"potentials: expected shape \[rows, 5\], got \[2, 3\]"),
        ((z[:1], centers, potentials), r"potentials: expected those of at most 1 views, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            swapped_prediction(*arguments, scale=1.0, plan_scale=1.0)

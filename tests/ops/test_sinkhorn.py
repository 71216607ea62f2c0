"""Sinkhorn's potentials and the plan's average of the centres against the dense plan and lightly's sinkhorn."""

import math

import pytest
import torch

from ccl_fast.ops import barycentric_projection, sinkhorn
from tests.oracles.losses import unit
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
SIZES = ((13, 5), (5, 13), (7, 7), (1, 4), (6, 1))
every_size = pytest.mark.parametrize("n, k", SIZES)
SCALE = 20.0


def points(n, k, d=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(n + k, d, generator=generator, dtype=torch.float64)
    return unit(both).to(dtype).split((n, k))


def dense_plan(z, centers, iterations=3, scale=SCALE):
    """The paper's algorithm: the matrix exp(s), its columns scaled to mass 1 / k, then its rows to 1 / n."""
    q = (scale * (z.double() @ centers.double().T)).exp()
    for _ in range(iterations):
        q = q / (len(centers) * q.sum(0))
        q = q / (len(z) * q.sum(1, keepdim=True))
    return q * len(z)


def plan(z, centers, u, v, scale=SCALE):
    return (scale * (z.double() @ centers.double().T) + u.double()[:, None] + v.double()).exp()


@every_size
@pytest.mark.parametrize("iterations", (1, 3, 10))
def test_the_plan_is_the_dense_one_and_lightlys(n, k, iterations, backend):
    z, centers = points(n, k)
    q = plan(z, centers, *sinkhorn(z, centers, scale=SCALE, iterations=iterations, backend=backend))
    torch.testing.assert_close(q, dense_plan(z, centers, iterations), rtol=1e-11, atol=1e-13)
    peer = pytest.importorskip("lightly.loss.swav_loss")
    theirs = peer.sinkhorn(z @ centers.T, iterations=iterations, epsilon=1 / SCALE)
    torch.testing.assert_close(q, theirs, rtol=1e-11, atol=1e-13)


@every_size
def test_marginals(n, k, backend):
    z, centers = points(n, k)
    q = plan(z, centers, *sinkhorn(z, centers, scale=4.0, iterations=300, backend=backend), scale=4.0)
    torch.testing.assert_close(q.sum(1), torch.ones(n).double())
    torch.testing.assert_close(q.sum(0), torch.full((k,), n / k).double(), rtol=1e-6, atol=0)


def test_rows_are_distributions_after_any_number_of_iterations(backend):
    z, centers = points(13, 5)
    q = plan(z, centers, *sinkhorn(z, centers, scale=SCALE, iterations=1, backend=backend))
    torch.testing.assert_close(q.sum(1), torch.ones(13).double())


def test_logits_far_beyond_the_range_of_exp(backend):
    z, centers = points(9, 4, dtype=torch.float32)
    u, v = sinkhorn(z, centers, scale=2000.0, backend=backend)
    u64, v64 = sinkhorn(z.double(), centers.double(), scale=2000.0, backend="reference")
    torch.testing.assert_close(u.double(), u64, rtol=1e-5, atol=0.01)
    torch.testing.assert_close(v.double(), v64, rtol=1e-5, atol=0.01)
    assert barycentric_projection(z, centers, (u, v), scale=2000.0, backend=backend).isfinite().all()


@every_size
def test_the_average_and_its_gradient(n, k, backend):
    z, centers = points(n, k)
    centers.requires_grad_()
    u, v = sinkhorn(z, centers, scale=SCALE, backend=backend)
    assert not v.requires_grad
    average = barycentric_projection(z, centers, (u, v), scale=SCALE, backend=backend)
    q = dense_plan(z, centers.detach())
    torch.testing.assert_close(average, q @ centers, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn(n, z.shape[1], dtype=torch.float64)
    (grad,) = torch.autograd.grad(average, centers, cotangent)
    torch.testing.assert_close(grad, q.T @ cotangent, rtol=1e-10, atol=1e-12)


def test_of_some_of_the_points(backend):
    z, centers = points(13, 5)
    u, v = sinkhorn(z, centers, scale=SCALE, backend=backend)
    whole = barycentric_projection(z, centers, (u, v), scale=SCALE, backend=backend)
    torch.testing.assert_close(
        barycentric_projection(z[:4], centers, (u[:4], v), scale=SCALE, backend=backend), whole[:4]
    )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(dtype):
    backend = "blocked"  # which takes half-precision rows as they are; the reference rounds logits
    z, centers = points(13, 5, dtype=dtype)
    u, v = sinkhorn(z, centers, scale=SCALE, backend=backend)
    assert u.dtype == v.dtype == torch.float32
    exact = dense_plan(z, centers)
    assert_as_accurate(plan(z, centers, u, v), exact, exact, torch.float32, magnitude=10 * exact.norm().item())
    leaf = centers.clone().requires_grad_()
    average = barycentric_projection(z, leaf, (u, v), scale=SCALE, backend=backend)
    assert average.dtype == torch.float32
    assert_as_accurate(average, exact @ centers.double(), exact @ centers.double(), dtype)
    cotangent = 1e-4 * torch.randn(13, 6)
    (grad,) = torch.autograd.grad(average, leaf, cotangent)
    wanted = exact.T @ cotangent.double()
    assert grad.dtype == dtype
    assert_as_accurate(grad, wanted, wanted, dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_is_the_same_dtype_from_the_outset(dtype, backend):
    z, centers = points(13, 5, dtype=torch.float32)

    def average(z, centers):
        return barycentric_projection(
            z, centers, sinkhorn(z, centers, scale=SCALE, backend=backend), scale=SCALE, backend=backend
        )

    expected = average(z.to(dtype), centers.to(dtype))
    leaf = centers.requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        actual = average(z, leaf)
    torch.testing.assert_close(actual, expected)
    (grad,) = torch.autograd.grad(actual.sum(), leaf)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(
        grad.sum(0), torch.full((6,), 13.0), rtol=0.03, atol=0
    )  # the rows of the plan have the sum 1


def test_no_points():
    z, centers = points(0, 5)
    u, v = sinkhorn(z, centers, scale=SCALE)
    assert u.shape == (0,) and v.tolist() == [0.0] * 5
    leaf = centers.clone().requires_grad_()
    average = barycentric_projection(z, leaf, (u, v), scale=SCALE)
    average.sum().backward()
    assert average.shape == (0, 6) and (leaf.grad == 0).all()


def test_the_scale_may_be_a_tensor():
    z, centers = points(7, 4)
    expected = sinkhorn(z, centers, scale=SCALE)
    actual = sinkhorn(z, centers, scale=torch.tensor(SCALE, dtype=torch.float64))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"z": torch.zeros(3)}, r"z: expected shape \[rows, d\], got \[3\]"),
        ({"z": torch.zeros(3, 2, dtype=torch.int64)}, "z: expected float64"),
        ({"centers": torch.zeros(4, 5)}, r"centers: expected shape \[rows, 2\], got \[4, 5\]"),
        ({"centers": torch.zeros(4, 2).double()}, "centers: expected dtype torch.float32"),
        ({"centers": torch.zeros(0, 2)}, "centers: expected at least one row"),
        ({"iterations": 0}, "iterations: expected a positive integer, got 0"),
        ({"iterations": True}, "iterations: expected a positive integer, got True"),
        ({"backend": "magic"}, "backend"),
    ),
)
def test_errors_name_the_argument(change, message):
    arguments = {"z": torch.zeros(3, 2), "centers": torch.zeros(4, 2), "scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        sinkhorn(**arguments)


def test_errors_of_the_average():
    z, centers = torch.zeros(3, 2), torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"potentials\[1\]: expected shape \[4\], got \[3\]"):
        barycentric_projection(z, centers, (torch.zeros(3), torch.zeros(3)), scale=1.0)


def test_a_second_derivative_is_a_clear_error():
    z, centers = points(5, 3)
    centers.requires_grad_()
    average = barycentric_projection(z, centers, sinkhorn(z, centers, scale=1.0), scale=1.0)
    (grad,) = torch.autograd.grad(average.square().sum(), centers, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward.*reference"):
        grad.sum().backward()


def test_equal_points_share_the_centers():
    # All logits equal: the plan is uniform, and the potentials say so.
    u, v = sinkhorn(torch.ones(6, 2), torch.ones(3, 2), scale=1.0)
    torch.testing.assert_close(u[:, None] + v + 2.0, torch.full((6, 3), -math.log(3)))

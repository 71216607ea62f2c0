"""Optimal transport of points to centres, and what it makes of the centres, without the plan's matrix."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_matrix, check_same, check_scale, check_vector
from ccl_fast.distributed import NO_GROUP, Group, outside_of_graphs
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.backends import ContrastBackend, choose_backend
from ccl_fast.ops.differentiable import Differentiable, one_by_one
from ccl_fast.ops.logsumexp.blocked import LOG2E
from ccl_fast.ops.logsumexp.bound import logits_are_bounded
from ccl_fast.ops.logsumexp.operator import softmax_sums, streaming_logsumexp
from ccl_fast.ops.precision import in_autocast_dtype, scale_tensor, without_autocast
from ccl_fast.ops.rowwise.blocks import RowBlocks

# Of logits within it, potentials differ by twice as much at most: their exponentials and all sums of these are normal
# float32 numbers. Unit vectors are inside for an epsilon of 0.04 and above.
UNSCALED_LIMIT = 25.0
# Exponentials that stay from one iteration to the next: 16 MiB in float32. Those of further rows are computed again.
KEPT_ELEMENTS = 1 << 22


@torch.no_grad()
def sinkhorn(
    z: Tensor, centers: Tensor, *, scale: float | Tensor, iterations: int = 3, backend: ContrastBackend = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Potentials of the transport plan between n points and k centres, all centres getting the same mass.

    .. math::
        q_{ik} = e^{s_{ik} + u_i + v_k}, \qquad s_{ik} = \mathrm{scale} \cdot \langle z_i, c_k \rangle

    Starting from u = 0 each iteration scales the columns to the mass n / k and then the rows to 1,

    .. math::
        v_k = \log \frac{n}{k} - \log \sum_i e^{s_{ik} + u_i}, \qquad u_i = -\log \sum_k e^{s_{ik} + v_k},

    so the rows are distributions over the centres, exactly, and the columns have the mass n / k in the limit. (Divided
    by n it is the plan between points of mass 1 / n and centres of mass 1 / k.) Each half of an iteration is one
    streaming log-sum-exp with the other side's potential as key bias; on a CPU, where logits are small, one product
    serves both halves. Memory is linear in n and k. No gradient flows.

    Cuturi (arXiv:1306.0895); in this order and with 3 iterations SwAV, Caron et al. (arXiv:2006.09882).

    Args:
        z: ``[n, d]``, float64, float32, bfloat16 or float16.
        centers: ``[k, d]``, same dtype and device.
        scale: 1 / epsilon, the inverse of the plan's entropic regularisation.
        iterations: at least 1.
        backend: of the streaming log-sum-exp: "auto", "triton", "blocked" or "reference".

    Returns:
        u ``[n]`` and v ``[k]``, float32 (float64 for float64).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the backend cannot run here.
    """
    _check(z, centers)
    check_scale("scale", scale)
    check_count("iterations", iterations)
    v = column_potentials(z, centers, scale=scale, iterations=iterations, backend=backend)
    return -streaming_logsumexp(z, centers, scale=scale, key_bias=v, backend=backend), v


@torch.no_grad()
def column_potentials(
    z: Tensor,
    centers: Tensor,
    *,
    scale: float | Tensor,
    iterations: int,
    backend: ContrastBackend = "auto",
    group: Group = NO_GROUP,
) -> Tensor:
    """v of `sinkhorn` (0 without points): the rows' softmax with v as bias is the plan. Checks nothing.

    Of several processes ``z`` is the part of each, the centres are the same, and so is v: k numbers travel in each
    iteration.
    """
    z, centers = in_autocast_dtype(z), in_autocast_dtype(centers)
    scale = scale_tensor(scale, z)
    on_cpu = choose_backend("streaming_logsumexp", backend, z.device, z.dtype) == "blocked" and z.device.type == "cpu"
    if not group.is_null:
        return _column_potentials_of_all(z, centers, scale, iterations, backend, on_cpu, group)
    if z.shape[0] == 0:
        return scale.new_zeros(centers.shape[0])
    if on_cpu:
        return _column_potentials_on_cpu(z, centers, scale, iterations)
    return _by_logsumexp(z, centers, scale, iterations, backend, math.log(z.shape[0] / centers.shape[0]))


@outside_of_graphs
def _column_potentials_of_all(
    z: Tensor, centers: Tensor, scale: Tensor, iterations: int, backend: ContrastBackend, on_cpu: bool, group: Group
) -> Tensor:
    # All take the same way, for they meet on it.
    unbounded = not (on_cpu and logits_are_bounded(z, centers, scale, None, limit=UNSCALED_LIMIT))
    rows, unbounded = group.sum(scale.new_tensor([z.shape[0], unbounded], dtype=torch.float64))
    mass = rows / centers.shape[0]
    if on_cpu and not unbounded:
        with without_autocast(z.device):
            v = _by_products(z, centers, scale, iterations, mass, group.sum)
    else:
        v = _by_logsumexp(z, centers, scale, iterations, backend, mass.log(), group.logsumexp)
    return v.masked_fill(rows == 0, 0.0)


@torch.library.custom_op("ccl_fast::sinkhorn_column_potentials", mutates_args=())
def _column_potentials_on_cpu(z: Tensor, centers: Tensor, scale: Tensor, iterations: int) -> Tensor:
    with without_autocast(z.device):
        mass = z.shape[0] / centers.shape[0]
        if logits_are_bounded(z, centers, scale, None, limit=UNSCALED_LIMIT):
            return _by_products(z, centers, scale, iterations, mass)
        return _by_logsumexp(z, centers, scale, iterations, "blocked", math.log(mass))


_column_potentials_on_cpu.register_vmap(one_by_one(_column_potentials_on_cpu))


@_column_potentials_on_cpu.register_fake
def _(z, centers, scale, iterations):
    return scale.new_empty(centers.shape[0])


def _by_logsumexp(
    z: Tensor,
    centers: Tensor,
    scale: Tensor,
    iterations: int,
    backend: ContrastBackend,
    log_mass: float | Tensor,
    over_all: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """``log_mass`` is that of a column; ``over_all`` makes log-sum-exps over the rows of all processes of its own."""
    u = None
    for i in range(iterations):
        v = log_mass - over_all(streaming_logsumexp(centers, z, scale=scale, key_bias=u, backend=backend))
        if i + 1 < iterations:
            u = -streaming_logsumexp(z, centers, scale=scale, key_bias=v, backend=backend)
    return v


def _by_products(
    z: Tensor,
    centers: Tensor,
    scale: Tensor,
    iterations: int,
    mass: float | Tensor,
    over_all: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """With whole rows of e^s at a time, rows and columns of the plan are scaled by products with vectors."""
    blocks = RowBlocks(z.to(scale.dtype) * (scale * LOG2E), centers.to(scale.dtype))
    weights, kept = None, []  # e^v; e^s of the first rows
    for _ in range(iterations):
        columns = scale.new_zeros(centers.shape[0])
        for i, rows in enumerate(blocks):
            e = kept[i] if i < len(kept) else blocks.similarities(rows).exp2_()
            if i == len(kept) and rows.stop * centers.shape[0] <= KEPT_ELEMENTS:
                kept.append(e)
            columns += e.sum(0) if weights is None else (e @ weights).reciprocal_() @ e
        weights = mass / over_all(columns)
    assert weights is not None  # an iteration at least
    return weights.log()


def barycentric_projection(
    z: Tensor,
    centers: Tensor,
    potentials: tuple[Tensor, Tensor],
    *,
    scale: float | Tensor,
    backend: ContrastBackend = "auto",
) -> Tensor:
    r"""Project each point to its barycentre under a transport plan q: :math:`\sum_k q_{ik} c_k`, without the matrix q.

    The plan is a constant: gradients flow to ``centers`` as the values that are averaged, to nothing else. Memory is
    linear in n and k.

    Args:
        z: ``[n, d]``, points that `sinkhorn` was given: all, or some of them.
        centers: ``[k, d]``, same dtype and device.
        potentials: u ``[n]`` of these points and v ``[k]``, of `sinkhorn`.
        scale, backend: as in `sinkhorn`.

    Returns:
        ``[n, d]``, float32 (float64 for float64).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the backend cannot run here.
    """
    _check(z, centers)
    for i, rows in enumerate((z, centers)):
        check_vector(f"potentials[{i}]", potentials[i], rows.shape[0])
        check_same(f"potentials[{i}]", potentials[i], "z", z, dtype=False)
    u, v = (x.detach() for x in potentials)
    if isinstance(scale, Tensor):
        scale = scale.detach()
    return _PROJECTION(in_autocast_dtype(z.detach()), in_autocast_dtype(centers), u, v, scale, backend)


def _project(z: Tensor, centers: Tensor, u: Tensor, v: Tensor, scale: float | Tensor, backend) -> Tensor:
    # Rows of the plan have the sum 1: -u is their log-sum-exp with v as bias.
    return softmax_sums(z, centers, -u, torch.ones_like(u), scale=scale, key_bias=v, of="keys", backend=backend)


def _save(ctx, inputs, output) -> None:
    *tensors, scale, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = {"scale": scale, "backend": backend}


def _gradients(ctx, grad: Tensor):
    """sum_i q_ik grad_i. In further dimensions, where the keys are 0, queries change no logit, but are summed."""
    z, centers, u, v = ctx.saved_tensors
    (n, d), k = z.shape, centers.shape[0]
    if n == 0:
        return None, torch.zeros_like(centers), None, None, None, None
    # Of length 1 at most, and columns of mass 1 in the mean: in the range of float16, and of unshifted logits.
    largest = grad.norm(dim=1).max().clamp(min=torch.finfo(grad.dtype).tiny)
    queries = torch.cat((z, (grad / largest).to(z.dtype)), dim=1)
    keys = torch.cat((centers, torch.zeros_like(centers)), dim=1)
    sums = softmax_sums(queries, keys, -u, torch.full_like(u, k / n), key_bias=v, of="queries", **ctx.options)
    return None, (sums[:, d:] * (largest * n / k)).to(centers.dtype), None, None, None, None


_PROJECTION = Differentiable("barycentric_projection", _project, _save, _gradients)


def _check(z: Tensor, centers: Tensor) -> None:
    check_matrix("z", z)
    check_floating("z", z)
    check_matrix("centers", centers, columns=z.shape[1])
    check_same("centers", centers, "z", z)
    if centers.shape[0] == 0:
        raise ArgumentError("centers: expected at least one row, got [0, d]")

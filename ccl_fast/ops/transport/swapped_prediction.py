"""Each view's prediction of the other views' assignments to centres, without a matrix of points by centres."""

from typing import Literal

import torch
from torch import Tensor

from ccl_fast.checks import check_choice, check_floating, check_matrix, check_same, check_scale, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.backends import ContrastBackend, choose_backend
from ccl_fast.ops.differentiable import USE_REFERENCE, Differentiable, GradientOperator
from ccl_fast.ops.logsumexp.operator import streaming_logsumexp
from ccl_fast.ops.precision import accumulation_dtype, in_autocast_dtype, scale_tensor, without_autocast
from ccl_fast.ops.row_dot import row_dot
from ccl_fast.ops.rowwise.blocks import block_rows, blocks_of
from ccl_fast.ops.rowwise.half_product import factor, product
from ccl_fast.ops.transport.logit_gradients import LogitGradients
from ccl_fast.ops.transport.sinkhorn import barycentric_projection

# Arrays of a block that live at once. Each is small: fresh memory of some MiB costs more in page faults than what is
# computed in it.
ARRAYS = 4


def swapped_prediction(
    z: Tensor,
    centers: Tensor,
    potentials: Tensor,
    *,
    scale: float | Tensor,
    plan_scale: float,
    reduction: Literal["sum", "none"] = "none",
    backend: ContrastBackend = "auto",
) -> Tensor:
    r"""Cross-entropies of all views' softmax over centres with the other views' transport plans.

    .. math::
        \ell_i = \sum_{g = 1}^{G} \sum_{v \ne g} - \sum_k q^{(g)}_{ik} \log p^{(v)}_{ik}, \qquad
        q^{(g)}_i = \mathrm{softmax}_k(\mathrm{plan\_scale} \cdot \langle z^{(g)}_i, c_k \rangle + b^{(g)}_k), \qquad
        p^{(v)}_i = \mathrm{softmax}_k(\mathrm{scale} \cdot \langle z^{(v)}_i, c_k \rangle)

    The plans are constants: gradients flow to ``z``, ``centers`` and ``scale`` through the predictions p alone. Memory
    is linear in n and k; a second derivative raises (only ``backend="reference"`` has one).

    Args:
        z: ``[views, n, d]``, float64, float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype.
        centers: ``[k, d]``, same dtype and device, at least one.
        potentials: ``[G, k]``: b of the first G views, as `sinkhorn` returns them for the centres.
        scale: the inverse temperature, a number or a tensor of one element (it may require a gradient).
        plan_scale: that of the plans.
        reduction: "none", or "sum" over all rows: then "blocked" takes the gradients along with the value, as what
            comes in is one number, and keeps them, which are as large as ``z`` and ``centers``.
        backend: "auto", "triton" (CUDA: log-sum-exps, and averages by the plan), "blocked" (plain torch: some rows
            against all centres at a time) or "reference" (dense).

    Returns:
        ``[n]``, or a scalar, float32 (float64 for float64 input).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the backend cannot run here.
    """
    _check(z, centers, potentials)
    check_choice("reduction", reduction, ("sum", "none"))
    check_scale("scale", scale)
    check_scale("plan_scale", plan_scale)
    plan_scale = float(plan_scale)
    z, centers = in_autocast_dtype(z), in_autocast_dtype(centers)
    chosen = choose_backend("streaming_logsumexp", backend, z.device, z.dtype)
    scale, potentials = scale_tensor(scale, z), potentials.detach().to(accumulation_dtype(z))
    operands = z, centers, potentials, scale, plan_scale
    if chosen == "blocked":
        return _SUM(*operands, torch.is_grad_enabled())[0] if reduction == "sum" else _PREDICTION(*operands)
    losses = _dense(*operands) if chosen == "reference" else _by_logsumexp(*operands)
    return losses.sum() if reduction == "sum" else losses


def _dense(z: Tensor, centers: Tensor, potentials: Tensor, scale: Tensor, plan_scale: float) -> Tensor:
    x = (z @ centers.T).to(scale.dtype)
    q = (plan_scale * x.detach()[: potentials.shape[0]] + potentials[:, None]).softmax(2)
    log_p = (scale * x).log_softmax(2)
    return -(q * (log_p.sum(0) - log_p[: potentials.shape[0]])).sum((0, 2))


def _by_logsumexp(z: Tensor, centers: Tensor, potentials: Tensor, scale: Tensor, plan_scale: float) -> Tensor:
    """sum_k q_k log p_k is the row's product with the plan's average of the centres, less its log-sum-exp."""
    views, n, _ = z.shape
    total, result = z.sum(0, dtype=scale.dtype), 0.0
    for own, v in zip(z, potentials, strict=False):
        u = -streaming_logsumexp(own.detach(), centers.detach(), scale=plan_scale, key_bias=v, backend="triton")
        average = barycentric_projection(own, centers, (u, v), scale=plan_scale, backend="triton")
        result = result - scale * row_dot(total - own, average)
    logsumexp = streaming_logsumexp(z.flatten(0, 1), centers, scale=scale, backend="triton").view(views, n)
    return result + _times_assigned(logsumexp, potentials.shape[0]).sum(0)


def _times_assigned(x: Tensor, assigned: int) -> Tensor:
    """x [views, ...] times the number of other views that have a plan."""
    return torch.cat((x[:assigned] * (assigned - 1), x[assigned:] * assigned))


# ---- some rows against all centres at a time; operators forward and backward, opaque to what traces them ----


def _predict(
    z: Tensor, centers: Tensor, potentials: Tensor, scale: Tensor, plan_scale: float,
    gradients: LogitGradients | None = None, of_losses: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The losses [n], and the gradients of their sum, weighted by ``of_losses`` [n] if there are such."""
    views, assigned, factors = z.shape[0], potentials.shape[0], factor(centers)
    losses = scale.new_empty(z.shape[1])
    for rows in blocks_of(z.shape[1], block_rows(views * centers.shape[0], z.device, ARRAYS)):
        points = factor(z[:, rows].flatten(0, 1))
        x = product(points, factors).view(views, -1, centers.shape[0])
        plans = torch.add(potentials[:, None], x[:assigned], alpha=plan_scale).softmax(2)
        total = plans.sum(0)
        others = plans.neg_().add_(total)  # what a global view predicts; the rest predict all plans
        of_plans = row_dot(others, x[:assigned]).sum(0)
        if views > assigned:
            of_plans += row_dot(total, x[assigned:].sum(0))
        logits = x.mul_(scale)
        p = logits.softmax(2)
        # The largest of a softmax is 1 / sum of e^(s - largest s).
        logsumexp = _times_assigned(logits.amax(2) - p.amax(2).log_(), assigned).sum(0)
        losses[rows] = logsumexp - scale * of_plans
        if gradients is None:
            continue
        p[:assigned].mul_(assigned - 1).sub_(others)
        p[assigned:].mul_(assigned).sub_(total)
        gradients.add(rows, points, p if of_losses is None else p.mul_(of_losses[rows, None]))
    return losses


def _forward(z: Tensor, centers: Tensor, potentials: Tensor, scale: Tensor, plan_scale: float) -> Tensor:
    with without_autocast(z.device):
        return _predict(z, centers, potentials, scale, plan_scale)


def _empty(z, centers, potentials, scale, plan_scale):
    return scale.new_empty(z.shape[1])


def _backward(
    z: Tensor,
    centers: Tensor,
    potentials: Tensor,
    scale: Tensor,
    grad: Tensor,
    plan_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(z.device):
        gradients = LogitGradients(z, factor(centers), scale, z.dtype, needs)
        _predict(z, centers, potentials, scale, plan_scale, gradients, grad)
        return gradients.all(z.dtype)


def _empty_gradients(z, centers, potentials, scale, grad, plan_scale, needs):
    of_z, of_centers = (z.new_empty(x.shape if need else 0) for x, need in zip((z, centers), needs[:2], strict=True))
    return of_z, of_centers, torch.empty_like(scale)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.plan_scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: Tensor):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    of_z, of_centers, of_scale = (
        g if n else None for g, n in zip(_GRADIENT(*ctx.saved_tensors, grad, ctx.plan_scale, needs), needs, strict=True)
    )
    return of_z, of_centers, None, of_scale, None


def _sum(
    z: Tensor, centers: Tensor, potentials: Tensor, scale: Tensor, plan_scale: float, differentiate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the losses, and, if it may be differentiated, its gradients in accumulation precision."""
    with without_autocast(z.device):
        gradients = LogitGradients(z, factor(centers), scale, scale.dtype, [differentiate] * 3)
        losses = _predict(z, centers, potentials, scale, plan_scale, gradients if differentiate else None)
        return losses.sum(), *gradients.all(scale.dtype)


def _empty_sum(z, centers, potentials, scale, plan_scale, differentiate):
    shapes = (x.shape if differentiate else 0 for x in (z, centers))
    return torch.empty_like(scale), *(scale.new_empty(shape) for shape in shapes), torch.empty_like(scale)


def _save_gradients(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    # With what they depend on, so that a second derivative by it is refused.
    ctx.save_for_backward(*inputs[:2], inputs[3], *output[1:])


def _gradients_of_sum(ctx, grad: Tensor, *_of_gradients: None):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    of_z, of_centers, of_scale = (
        g if n else None for g, n in zip(_SCALED(*ctx.saved_tensors, grad), needs, strict=True)
    )
    return of_z, of_centers, None, of_scale, None, None


def _scaled(
    z: Tensor, centers: Tensor, scale: Tensor, to_z: Tensor, to_centers: Tensor, to_scale: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (to_z * grad).to(z.dtype), (to_centers * grad).to(centers.dtype), to_scale * grad


_PREDICTION = Differentiable("swapped_prediction", _forward, _save, _gradients, _empty)
_SUM = Differentiable("sum_of_swapped_predictions", _sum, _save_gradients, _gradients_of_sum, _empty_sum)
_GRADIENT, _SCALED = (
    GradientOperator(f"{name}_backward", function, fake, of="swapped_prediction", instead=USE_REFERENCE)
    for name, function, fake in (
        ("swapped_prediction", _backward, _empty_gradients),
        ("sum_of_swapped_predictions", _scaled, _scaled),
    )
)


def _check(z: Tensor, centers: Tensor, potentials: Tensor) -> None:
    check_tensor("z", z)
    check_floating("z", z)
    if z.ndim != 3:
        raise ArgumentError(f"z: expected shape [views, n, d], got {list(z.shape)}")
    if z.shape[0] == 0:
        raise ArgumentError(f"z: expected at least one view, got shape {list(z.shape)}")
    check_matrix("centers", centers, columns=z.shape[2])
    check_matrix("potentials", potentials, columns=centers.shape[0])
    for name, x in (("centers", centers), ("potentials", potentials)):
        check_floating(name, x)
        check_same(name, x, "z", z, dtype=name == "centers")
    if centers.shape[0] == 0:
        raise ArgumentError("centers: expected at least one row, got [0, d]")
    if potentials.shape[0] > z.shape[0]:
        raise ArgumentError(f"potentials: expected those of at most {z.shape[0]} views, got {potentials.shape[0]}")

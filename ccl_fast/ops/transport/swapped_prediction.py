"""Each view's prediction of the other views' assignments to centres, without a matrix of points by centres."""

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_matrix, check_same, check_scale, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.backends import ContrastBackend, choose_backend
from ccl_fast.ops.differentiable import Differentiable, GradientOperator
from ccl_fast.ops.logsumexp.operator import streaming_logsumexp
from ccl_fast.ops.precision import accumulation_dtype, in_autocast_dtype, scale_tensor, without_autocast
from ccl_fast.ops.row_dot import row_dot
from ccl_fast.ops.rowwise.blocks import block_rows, blocks_of
from ccl_fast.ops.rowwise.half_product import Weights, columns_of, factor, product
from ccl_fast.ops.transport.sinkhorn import barycentric_projection


def swapped_prediction(
    z: Tensor,
    centers: Tensor,
    potentials: Tensor,
    *,
    scale: float | Tensor,
    plan_scale: float,
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
        backend: "auto", "triton" (CUDA: log-sum-exps, and averages by the plan), "blocked" (plain torch: some rows
            against all centres at a time) or "reference" (dense).

    Returns:
        ``[n]`` float32 (float64 for float64 input).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the backend cannot run here.
    """
    _check(z, centers, potentials)
    check_scale("scale", scale)
    check_scale("plan_scale", plan_scale)
    plan_scale = float(plan_scale)
    z, centers = in_autocast_dtype(z), in_autocast_dtype(centers)
    chosen = choose_backend("streaming_logsumexp", backend, z.device, z.dtype)
    scale, potentials = scale_tensor(scale, z), potentials.detach().to(accumulation_dtype(z))
    if chosen == "reference":
        return _dense(z, centers, potentials, scale, plan_scale)
    if chosen == "triton":
        return _by_logsumexp(z, centers, potentials, scale, plan_scale)
    return _PREDICTION(z, centers, potentials, scale, plan_scale)


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


# ---- some rows against all centres at a time; one operator forward, one backward, opaque to what traces them ----


class _Rows:
    """Scores of the same rows of all views, in accumulation precision, and what is made of them."""

    def __init__(self, z: Tensor, centers: Tensor, potentials: Tensor, scale: Tensor, plan_scale: float):
        self.z, self.centers = z, factor(centers)
        self.potentials, self.scale, self.plan_scale = potentials, scale, plan_scale
        self.assigned = potentials.shape[0]
        self.size = block_rows(z.shape[0] * centers.shape[0], z.device)

    def __iter__(self):
        return blocks_of(self.z.shape[1], self.size)

    def points(self, rows: slice) -> Tensor:
        """Of all views one after the other, [views * rows, d]."""
        return factor(self.z[:, rows].flatten(0, 1))

    def scores(self, points: Tensor) -> Tensor:
        return product(points, self.centers).view(self.z.shape[0], -1, self.centers.shape[0])

    def plans(self, x: Tensor) -> Tensor:
        return torch.add(self.potentials[:, None], x[: self.assigned], alpha=self.plan_scale).softmax(2)


def _forward(z: Tensor, centers: Tensor, potentials: Tensor, scale: Tensor, plan_scale: float) -> Tensor:
    with without_autocast(z.device):
        block, result = _Rows(z, centers, potentials, scale, plan_scale), scale.new_empty(z.shape[1])
        for rows in block:
            x = block.scores(block.points(rows))
            logsumexp = _times_assigned((x * scale).logsumexp(2), block.assigned).sum(0)
            of_others = x.sum(0) - x[: block.assigned]
            result[rows] = logsumexp - scale * row_dot(block.plans(x), of_others).sum(0)
        return result


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
    need_z, need_centers, need_scale = needs
    with without_autocast(z.device):
        block = _Rows(z, centers, potentials, scale, plan_scale)
        of_centers = columns_of(block.centers)
        grad_z = torch.empty_like(z, memory_format=torch.contiguous_format) if need_z else z.new_empty(0)
        to_centers, to_scale = scale.new_zeros(of_centers.shape), torch.zeros_like(scale)
        for rows in block:
            points = block.points(rows)
            x = block.scores(points)
            plans = block.plans(x)
            # By the logits: p for every plan of another view, less those plans.
            w = _times_assigned(x.mul_(scale).softmax(2), block.assigned).sub_(plans.sum(0))
            w[: block.assigned] += plans
            w = Weights(w.mul_(grad[rows, None]).flatten(0, 1), points.dtype)
            if need_z or need_scale:
                by_z = w.sums_of_keys(of_centers)
                to_scale += row_dot(by_z, points).sum()
                if need_z:
                    grad_z[:, rows] = by_z.mul_(scale).view_as(z[:, rows])
            if need_centers:
                to_centers += w.sums_of_queries(columns_of(points))
        grad_centers = to_centers.T.mul(scale).to(centers.dtype).contiguous() if need_centers else z.new_empty(0)
        return grad_z, grad_centers, to_scale


def _empty_gradients(z, centers, potentials, scale, grad, plan_scale, needs):
    of_z, of_centers = (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else z.new_empty(0)
        for x, need in zip((z, centers), needs[:2], strict=True)
    )
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


_PREDICTION = Differentiable("swapped_prediction", _forward, _save, _gradients, _empty)
_GRADIENT = GradientOperator(
    "swapped_prediction_backward",
    _backward,
    _empty_gradients,
    of="swapped_prediction",
    instead=' Use backend="reference", which is dense and differentiable any number of times.',
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

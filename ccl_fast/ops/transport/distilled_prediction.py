"""A student's prediction of a teacher's assignments to prototypes, without a matrix of rows by prototypes."""

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_matrix, check_same, check_scale, check_vector
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.differentiable import Differentiable, GradientOperator
from ccl_fast.ops.precision import in_autocast_dtype, scale_tensor, without_autocast
from ccl_fast.ops.row_dot import row_dot
from ccl_fast.ops.rowwise.blocks import block_rows, blocks_of
from ccl_fast.ops.rowwise.half_product import factor, product
from ccl_fast.ops.transport.logit_gradients import LogitGradients

# Arrays of a block that live at once.
ARRAYS = 4


def distilled_prediction(
    z: Tensor,
    centers: Tensor,
    teacher_z: Tensor,
    teacher_centers: Tensor,
    *,
    scale: float | Tensor,
    teacher_scale: float,
    potentials: Tensor | None = None,
    hard: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropies of a student's softmax over prototypes with a teacher's.

    .. math::
        \ell_i = -\sum_k q_{ik} \log p_{ik}, \qquad
        p_i = \mathrm{softmax}_k(\mathrm{scale} \cdot \langle z_i, c_k \rangle), \qquad
        q_i = \mathrm{softmax}_k(\mathrm{teacher\_scale} \cdot \langle t_i, c'_k \rangle + b_k)

    It is the swapped prediction of two networks, or of two views of one, whose assignments need be no transport plan.
    Of ``hard`` rows q is the indicator of its largest entry. The teacher is a constant: gradients flow to ``z``,
    ``centers`` and ``scale`` alone. Some rows are computed at a time against all prototypes: memory is linear in n and
    k. A second derivative raises.

    Args:
        z: ``[n, d]``, float64, float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype.
        centers: c ``[k, d]``, same dtype and device, at least one.
        teacher_z: t ``[n, d']``, likewise.
        teacher_centers: c' ``[k, d']``, likewise.
        scale: the student's inverse temperature, a number or a tensor of one element (it may require a gradient).
        teacher_scale: the teacher's.
        potentials: b ``[k]``, of any floating dtype: those of a transport plan (`sinkhorn`), or what centres the
            teacher's logits. None: 0.
        hard: ``[n]`` bool. None: no row.

    Returns:
        ``[n]``, float32 (float64 for float64 input).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    _check(z, centers, teacher_z, teacher_centers, potentials, hard)
    check_scale("scale", scale)
    check_scale("teacher_scale", teacher_scale)
    z = in_autocast_dtype(z)
    scale = scale_tensor(scale, z)
    rows = (x.to(z.dtype) for x in (centers, teacher_z.detach(), teacher_centers.detach()))
    potentials = None if potentials is None else potentials.detach().to(scale.dtype)
    return _PREDICTION(z, *rows, potentials, hard, scale, float(teacher_scale))


def _check(z, centers, teacher_z, teacher_centers, potentials, hard) -> None:
    check_matrix("z", z)
    check_floating("z", z)
    check_matrix("centers", centers, columns=z.shape[1])
    if centers.shape[0] == 0:
        raise ArgumentError("centers: expected at least one row, got [0, d]")
    check_matrix("teacher_z", teacher_z)
    check_matrix("teacher_centers", teacher_centers, columns=teacher_z.shape[1])
    for name, x, like, rows in (
        ("teacher_z", teacher_z, "z", z),
        ("teacher_centers", teacher_centers, "centers", centers),
    ):
        if x.shape[0] != rows.shape[0]:
            raise ArgumentError(f"{name}: expected {rows.shape[0]} rows (those of {like}), got {x.shape[0]}")
    for name, x in (("centers", centers), ("teacher_z", teacher_z), ("teacher_centers", teacher_centers)):
        check_same(name, x, "z", z)
    if potentials is not None:
        check_vector("potentials", potentials, centers.shape[0])
        check_floating("potentials", potentials)
        check_same("potentials", potentials, "z", z, dtype=False)
    if hard is not None:
        check_vector("hard", hard, z.shape[0])
        check_same("hard", hard, "z", z, dtype=False)
        if hard.dtype != torch.bool:
            raise ArgumentError(f"hard: expected bool, got {hard.dtype}")


# ---- some rows against all prototypes at a time; one operator forward, one backward ----


def _predict(
    z: Tensor, centers: Tensor, teacher_z: Tensor, teacher_centers: Tensor, potentials: Tensor | None,
    hard: Tensor | None, scale: Tensor, teacher_scale: float,
    gradients: LogitGradients | None = None, of_losses: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The losses [n], and the gradients of their sum, weighted by ``of_losses`` [n]."""
    keys, teacher_keys = factor(centers), factor(teacher_centers)
    losses = scale.new_empty(z.shape[0])
    for rows in blocks_of(z.shape[0], block_rows(centers.shape[0], z.device, ARRAYS)):
        of_teacher = product(factor(teacher_z[rows]), teacher_keys).mul_(teacher_scale)
        q = (of_teacher if potentials is None else of_teacher.add_(potentials)).softmax(1)
        if hard is not None:
            surest = torch.zeros_like(q).scatter_(1, q.argmax(1, keepdim=True), 1.0)
            # A row with a NaN stays one.
            q = torch.where(hard[rows, None] & (q == q), surest, q)
        points = factor(z[rows])
        x = product(points, keys)
        assigned = row_dot(q, x)
        logits = x.mul_(scale)
        p = logits.softmax(1)
        # The largest of a softmax is 1 / sum of e^(s - largest s).
        losses[rows] = logits.amax(1) - p.amax(1).log_() - scale * assigned
        if gradients is not None and of_losses is not None:
            gradients.add(rows, points, p.sub_(q).mul_(of_losses[rows, None])[None])
    return losses


def _forward(
    z: Tensor,
    centers: Tensor,
    teacher_z: Tensor,
    teacher_centers: Tensor,
    potentials: Tensor | None,
    hard: Tensor | None,
    scale: Tensor,
    teacher_scale: float,
) -> Tensor:
    with without_autocast(z.device):
        return _predict(z, centers, teacher_z, teacher_centers, potentials, hard, scale, teacher_scale)


def _empty(z, centers, teacher_z, teacher_centers, potentials, hard, scale, teacher_scale):
    return scale.new_empty(z.shape[0])


def _backward(
    z: Tensor,
    centers: Tensor,
    teacher_z: Tensor,
    teacher_centers: Tensor,
    potentials: Tensor | None,
    hard: Tensor | None,
    scale: Tensor,
    grad: Tensor,
    teacher_scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    with without_autocast(z.device):
        gradients = LogitGradients(z[None], factor(centers), scale, z.dtype, needs)
        given = (z, centers, teacher_z, teacher_centers, potentials, hard, scale, teacher_scale)
        _predict(*given, gradients, grad)
        to_z, to_centers, to_scale = gradients.all(z.dtype)
        return (to_z.view(z.shape) if needs[0] else to_z), to_centers, to_scale


def _empty_gradients(
    z, centers, teacher_z, teacher_centers, potentials, hard, scale, grad, teacher_scale, needs
):  # fmt: skip
    to_z, to_centers = (z.new_empty(x.shape if need else 0) for x, need in zip((z, centers), needs[:2], strict=True))
    return to_z, to_centers, torch.empty_like(scale)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.teacher_scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: Tensor):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 6)]
    to_z, to_centers, to_scale = (
        g if n else None
        for g, n in zip(_GRADIENT(*ctx.saved_tensors, grad, ctx.teacher_scale, needs), needs, strict=True)
    )
    return to_z, to_centers, None, None, None, None, to_scale, None


_PREDICTION = Differentiable("distilled_prediction", _forward, _save, _gradients, _empty)
_GRADIENT = GradientOperator("distilled_prediction_backward", _backward, _empty_gradients, of="distilled_prediction")

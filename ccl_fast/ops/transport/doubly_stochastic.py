"""The symmetric plan of rows among themselves, all of whose rows and columns have the mass 1, without its matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ccl_fast.ops.logsumexp.operator import streaming_logsumexp
from ccl_fast.ops.precision import accumulation_dtype, without_autocast
from ccl_fast.ops.rowwise.blocks import blocks_of

if TYPE_CHECKING:
    from ccl_fast.ops.backends import ContrastBackend

# Steps of the potentials, whose error is at least halved by each, and of the solution of (I + G) x = r, whose
# condition is at most 2, so that each leaves a sixth.
STEPS = {torch.float32: 25, torch.float64: 50}
SOLVER_STEPS = {torch.float32: 10, torch.float64: 20}
CPU_ELEMENTS, DEVICE_ELEMENTS = 1 << 18, 1 << 26


def column_blocks(n: int, more: int, device: torch.device) -> list[slice]:
    """Slices of the columns, such that n and ``more`` numbers for each are few."""
    elements = CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS
    size = max(1, elements // max(n, more, 1))
    return list(blocks_of(n, size))


@torch.no_grad()
def doubly_stochastic(c: Tensor, backend: ContrastBackend = "auto") -> Tensor:
    r"""Potentials of the doubly stochastic matrix that is nearest to :math:`e^{\langle c_i, c_j \rangle}`.

    .. math::
        G_{ij} = e^{\langle c_i, c_j \rangle + f_i + f_j}, \qquad \sum_j G_{ij} = 1

    G is the entropic projection of the rows' inner products. Steps :math:`f \leftarrow (f - \log \sum_j
    e^{\langle c_i, c_j \rangle + f_j}) / 2`; as G has no eigenvalue outside of [0, 1], each halves the error at least.
    Memory is linear in n. No gradient flows.

    Args:
        c: ``[n, d]``, float64, float32, bfloat16 or float16.
        backend: of the streaming log-sum-exp.

    Returns:
        f ``[n]``, float32 (float64 for float64).
    """
    f = c.new_zeros(c.shape[0], dtype=accumulation_dtype(c))
    with without_autocast(c.device):
        for _ in range(STEPS[f.dtype]):
            f = (f - streaming_logsumexp(c, c, scale=1.0, key_bias=f, backend=backend)) / 2
    return f


def columns(c: Tensor, f: Tensor, part: slice) -> Tensor:
    """Some columns of G, ``[n, columns]``."""
    return torch.addmm(f[:, None] + f[part], c, c[part].T).exp_()


def times(c: Tensor, f: Tensor, x: Tensor) -> Tensor:
    """G x, of x ``[n, m]``."""
    result = torch.zeros_like(x)
    for part in column_blocks(c.shape[0], 1, c.device):
        result += columns(c, f, part) @ x[part]
    return result


def projection_gradient(c: Tensor, f: Tensor, to_potentials: Tensor) -> Tensor:
    r"""Gradient of c ``[n, d]`` through the potentials, given theirs ``[n]``, r.

    :math:`\sum_j G_{ij} = 1` for all i, so :math:`(I + G)\, df = -(G \circ dM) 1` with M the inner products, and
    :math:`r^T df = -\sum_{ij} \lambda_i G_{ij}\, dM_{ij}`, where :math:`(I + G) \lambda = r` by conjugate gradients.
    """
    weights = _solve(c, f, to_potentials[:, None])
    return -(weights * times(c, f, c) + times(c, f, weights * c))


def _solve(c: Tensor, f: Tensor, right: Tensor) -> Tensor:
    """(I + G)^-1 of a column [n, 1]."""
    x, residual, direction = torch.zeros_like(right), right, right
    square = residual.square().sum()
    for _ in range(SOLVER_STEPS[right.dtype]):
        image = direction + times(c, f, direction)
        length = square / (direction * image).sum().clamp(min=torch.finfo(right.dtype).tiny)
        x, residual = x + length * direction, residual - length * image
        before, square = square, residual.square().sum()
        direction = residual + square / before.clamp(min=torch.finfo(right.dtype).tiny) * direction
    return x

"""Coding rate reduction whose memberships are learned: a doubly stochastic matrix instead of cluster ids."""

from typing import TYPE_CHECKING, Unpack, cast

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_same, check_tensor, checked_temperature
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.coding_rate import log_det_plus_one
from ccl_fast.ops import segment_gram
from ccl_fast.ops.differentiable import Differentiable, GradientOperator
from ccl_fast.ops.precision import accumulation_dtype, without_autocast
from ccl_fast.ops.segment_gram import gram_by_weights, gram_by_weights_gradients
from ccl_fast.ops.transport.doubly_stochastic import column_blocks, columns, doubly_stochastic, projection_gradient

if TYPE_CHECKING:
    from ccl_fast.ops.backends import ContrastBackend


class MLCLoss(Loss):
    r"""Coding rate reduction with soft memberships, which a second head of the network learns.

    .. math::
        \ell = \frac{1}{n} \sum_j \log\det\Big(I + \frac{d}{\epsilon^2} Z^T \mathrm{diag}(G_j) Z\Big)
            - \log\det\Big(I + \frac{d}{n \epsilon^2} Z^T Z\Big), \qquad
        G = \arg\max_{G \text{ doubly stochastic}} \langle G, C C^T \rangle + T H(G)

    with z the n rows of all views and c those of the cluster head, both of unit length, and :math:`G_j` a column of
    the n x n matrix, which is projected onto by Sinkhorn's steps and never exists; the gradient goes through the
    projection to the fixed point. If G is constant on clusters it is `CodingRateLoss`; if it is constant, 0.

    Ding, Tong, Chan, Dai, Ma, Haeffele, "Unsupervised Manifold Linearizing and Clustering" (arXiv:2301.01805).

    Args:
        temperature: T of the projection, > 0; the initial value if learnable.
        eps: the precision up to which rows are coded, > 0.
        learnable_temperature, normalize, backend: as in `Loss`; the backend is that of Sinkhorn's steps. Of the
            other options of `Loss` it can honour none.

    Cost:
        operators: `segment_gram` by weights, a log-determinant for each row, LSEs of the heads.
        units: D of N x N x D, for each of 4 products; 2 N D^3; and 25 of N x N x H, forward and backward.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import MLCLoss
        >>> features, heads = torch.randn(8, 2, 16), torch.randn(8, 2, 4)
        >>> MLCLoss()(features, heads=heads).shape
        torch.Size([])
    """

    unsupported = ("reduction", "process_group", "exchange")

    def __init__(self, temperature: float = 0.1, *, eps: float = 0.5, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)
        self.eps = checked_temperature("eps", eps)  # its inverse is a number too

    def forward(self, embeddings: Tensor, *, heads: Tensor) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]`` or ``[n, views, d]``; float64, float32, bfloat16, float16.
            heads: ``[n, h]`` or ``[n, views, h]``, of the cluster head, same dtype.

        Returns:
            The loss, float32 (float64 for float64 embeddings); 0 of no rows.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        for name, x in (("embeddings", embeddings), ("heads", heads)):
            check_tensor(name, x)
            check_floating(name, x)
        if embeddings.ndim not in (2, 3):
            raise ArgumentError(f"embeddings: expected shape [n, d] or [n, views, d], got {list(embeddings.shape)}")
        if heads.shape[:-1] != embeddings.shape[:-1]:
            expected = ", ".join(map(str, (*embeddings.shape[:-1], "h")))
            raise ArgumentError(f"heads: expected shape [{expected}], got {list(heads.shape)}")
        check_same("heads", heads, "embeddings", embeddings)
        z, c = self.unit(embeddings.flatten(0, -2)), self.unit(heads.flatten(0, -2))
        dtype = accumulation_dtype(z)
        if z.shape[0] == 0:
            return z.to(dtype).sum() + c.to(dtype).sum()
        temperature = torch.as_tensor(self.temperature, dtype=dtype, device=z.device)
        scale = z.shape[1] / self.eps**2
        ids = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
        rate = log_det_plus_one(segment_gram(z, ids, 1) * (scale / z.shape[0]))[0]
        return _RATE(z.to(dtype), c.to(dtype) * temperature.rsqrt(), scale, self.backend)[0] - rate


def _mean_rate(z: Tensor, c: Tensor, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    """Mean of the rates by the columns of the projection of c's inner products, and its potentials ``[n]``."""
    f = doubly_stochastic(c, cast("ContrastBackend", backend))
    n, d = z.shape
    total = z.new_zeros(())
    with without_autocast(z.device):
        for part in column_blocks(n, d * d, z.device):
            total += log_det_plus_one(gram_by_weights(z, columns(c, f, part)) * scale).sum()
    return total / n, f


def _mean_rate_backward(z: Tensor, c: Tensor, f: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    n, d = z.shape
    grad_z, grad_c, to_potentials = torch.zeros_like(z), torch.zeros_like(c), torch.zeros_like(f)
    identity = torch.eye(d, dtype=z.dtype, device=z.device)
    with without_autocast(z.device):
        for part in column_blocks(n, d * d, z.device):
            g = columns(c, f, part)
            inverse = torch.linalg.inv_ex(gram_by_weights(z, g) * scale + identity).inverse
            to_z, to_g = gram_by_weights_gradients(z, g, inverse * (scale / n))
            to_logits = to_g.mul_(g)
            grad_z += to_z
            grad_c.addmm_(to_logits, c[part])
            grad_c[part] += to_logits.T @ c
            to_potentials += to_logits.sum(1)
            to_potentials[part] += to_logits.sum(0)
        grad_c += projection_gradient(c, f, to_potentials)
    return grad_z, grad_c


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.scale = inputs[2]


def _gradients(ctx, grad: Tensor, _):
    grad_z, grad_c = _RATE_GRADIENT(*ctx.saved_tensors, ctx.scale)
    return grad * grad_z, grad * grad_c, None, None


def _empty(z, c, scale, backend):
    return z.new_empty(()), z.new_empty(z.shape[0])


def _empty_gradients(z, c, f, scale):
    return torch.empty_like(z), torch.empty_like(c)


_RATE = Differentiable("mlc_rate", _mean_rate, _save, _gradients, _empty)
_RATE_GRADIENT = GradientOperator("mlc_rate_backward", _mean_rate_backward, _empty_gradients, of="MLCLoss")

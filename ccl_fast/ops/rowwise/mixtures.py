"""The log-sum-exp over rows that are mixed from each anchor's most similar keys, none of which is built."""

from typing import NamedTuple

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_matrix, check_same, check_scale, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.differentiable import Differentiable, GradientOperator
from ccl_fast.ops.edge_similarity import edge_similarity
from ccl_fast.ops.precision import accumulation_dtype, in_autocast_dtype, scale_tensor, without_autocast
from ccl_fast.ops.row_dot import row_dot
from ccl_fast.ops.rowwise.blocks import RowBlocks, block_rows, blocks_of
from ccl_fast.ops.rowwise.topk import largest

# Numbers that a mixture takes beside each of an anchor's similarities: its rows, their products, and their order.
NUMBERS_OF_A_MIXTURE = 4


class Mixing(NamedTuple):
    """What is mixed: places in the anchors' lists of most similar keys, of any integer dtype, and weights."""

    first: Tensor  # [n, s]
    second: Tensor  # [n, s]
    alpha: Tensor  # [n, s], of the first
    other: Tensor  # [n, s']
    beta: Tensor  # [n, s'], of the anchor


def mixture_logsumexp(q: Tensor, k: Tensor, mixing: Mixing, *, topk: int, scale: float | Tensor) -> Tensor:
    r"""Log-sum-exp over mixtures of each row's most similar keys with each other and with the row.

    .. math::
        \mathrm{LSE}_i = \log \Big( \sum_{j=1}^{s} e^{\mathrm{scale} \cdot \langle q_i, h_{ij} \rangle}
            + \sum_{j=1}^{s'} e^{\mathrm{scale} \cdot \langle q_i, h'_{ij} \rangle} \Big), \qquad
        h \propto \alpha k_a + (1 - \alpha) k_b, \quad h' \propto \beta q_i + (1 - \beta) k_c, \quad |h| = |h'| = 1

    with a, b, c on the row's list of its ``topk`` most similar keys. Mixtures are constants: a gradient flows to ``q``
    as to what they are compared with, and to ``scale``. It is taken along with the value, some rows at a time: memory
    is linear in n and m, besides the mixing. A second derivative raises.

    Args:
        q: ``[n, d]``, float64, float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype.
        k: ``[m, d]``, same dtype and device; no gradient.
        mixing: places 0 to topk - 1, the most similar key first, and weights, float32 (float64 for float64 rows). s and
            s' must not both be 0.
        topk: 1 to m.
        scale: the inverse temperature, a number or a tensor of one element (it may require a gradient).

    Returns:
        ``[n]`` float32 (float64 for float64 input).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
    """
    check_matrix("q", q)
    check_floating("q", q)
    check_matrix("k", k, columns=q.shape[1])
    check_same("k", k, "q", q)
    check_count("topk", topk)
    if topk > k.shape[0]:
        raise ArgumentError(f"topk: expected at most {k.shape[0]}, the rows of k, got {topk}")
    check_scale("scale", scale)
    _check_mixing(mixing, q)
    q = in_autocast_dtype(q)
    scale = scale_tensor(scale, q)
    return _LOGSUMEXP(q, k.detach().to(q.dtype), scale, *mixing, topk)[0]


def _check_mixing(mixing: Mixing, q: Tensor) -> None:
    for name, x in mixing._asdict().items():
        check_tensor(f"mixing.{name}", x)
        check_same(f"mixing.{name}", x, "q", q, dtype=False)
        like = mixing.first if name in ("first", "second", "alpha") else mixing.other
        shape = [q.shape[0], like.shape[-1] if like.ndim else 0]
        if list(x.shape) != shape:
            raise ArgumentError(f"mixing.{name}: expected shape {shape}, got {list(x.shape)}")
    if mixing.first.shape[1] + mixing.other.shape[1] == 0:
        raise ArgumentError("mixing: expected a mixture of each row at least, got none")


# ---- one operator forward, one backward: two opaque nodes for what traces them ----


def _forward(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    first: Tensor,
    second: Tensor,
    alpha: Tensor,
    other: Tensor,
    beta: Tensor,
    topk: int,
) -> tuple[Tensor, Tensor]:
    """The log-sum-exps, and each row's mean of the mixtures, weighted by their softmax."""
    with without_autocast(q.device):
        blocks, wide = RowBlocks(q, k), accumulation_dtype(q)
        q, k = q.to(wide), k.to(wide)
        square = row_dot(k, k)
        logsumexp, mean = _empty(q, k, scale, first, second, alpha, other, beta, topk)
        numbers = k.shape[0] + NUMBERS_OF_A_MIXTURE * (first.shape[1] + other.shape[1])
        for rows in blocks_of(q.shape[0], block_rows(numbers, q.device)):
            own, similarity, hard = q[rows], *largest(blocks.similarities(rows), topk)
            a, b, c = (x[rows].long() for x in (first, second, other))
            alphas, betas = alpha[rows], beta[rows]

            a_key, b_key, c_key = (hard.gather(1, x) for x in (a, b, c))
            of_two = square[a_key], square[b_key], _similarity_at(k, a_key, b_key)
            inverse_of_two = _inverse_length(alphas, *of_two)
            to_own, to_c = row_dot(own, own)[:, None], similarity.gather(1, c)
            inverse_of_own = _inverse_length(betas, to_own, square[c_key], to_c)

            # Of each mixture the weights of what it consists of.
            of_a, of_b = alphas * inverse_of_two, (1 - alphas) * inverse_of_two
            of_own, of_c = betas * inverse_of_own, (1 - betas) * inverse_of_own
            two = of_a * similarity.gather(1, a) + of_b * similarity.gather(1, b)
            logits = torch.cat((two, of_own * to_own + of_c * to_c), dim=1).mul_(scale)
            logsumexp[rows] = total = logits.logsumexp(1)
            p, p_own = logits.sub_(total[:, None]).exp_().split((a.shape[1], c.shape[1]), dim=1)

            by_place = torch.zeros_like(similarity)
            for place, weight in ((a, of_a.mul_(p)), (b, of_b.mul_(p)), (c, of_c.mul_(p_own))):
                by_place.scatter_add_(1, place, weight)
            mean[rows] = torch.nn.functional.embedding_bag(hard, k, per_sample_weights=by_place, mode="sum")
            mean[rows] += own * (of_own * p_own).sum(1, keepdim=True)
        return logsumexp, mean


def _inverse_length(weight: Tensor, x: Tensor, y: Tensor, both: Tensor) -> Tensor:
    """1 / |w x + (1 - w) y|, given <x, x>, <y, y> and <x, y>."""
    rest = 1 - weight
    return (weight**2 * x + rest**2 * y + 2 * weight * rest * both).clamp_(min=1e-12).rsqrt_()


def _similarity_at(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """<x_a, x_b> of index pairs of any shape, by the row of a."""
    first, order = a.flatten().sort()
    ends = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    rows = ends.index_add_(0, first + 1, torch.ones_like(first)).cumsum_(0)
    found = edge_similarity(x, x, rows, b.flatten()[order])
    return torch.empty_like(found).index_copy_(0, order, found).view(a.shape)


def _empty(q, k, scale, first, second, alpha, other, beta, topk):
    wide = accumulation_dtype(q)
    return q.new_empty(q.shape[0], dtype=wide), q.new_empty(q.shape, dtype=wide)


def _backward(q: Tensor, scale: Tensor, mean: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    with without_autocast(q.device):
        return (mean * (grad * scale)[:, None]).to(q.dtype), torch.dot(grad, row_dot(mean, q))


def _empty_gradients(q, scale, mean, grad):
    return q.new_empty(q.shape), torch.empty_like(scale)


def _save(ctx, inputs, output) -> None:
    q, _, scale, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, scale, output[1])


def _gradients(ctx, grad: Tensor, _grad_mean: None):
    grads = _GRADIENT(*ctx.saved_tensors, grad)
    of_q, of_scale = (g if ctx.needs_input_grad[i] else None for i, g in zip((0, 2), grads, strict=True))
    return of_q, None, of_scale, *[None] * 6


_LOGSUMEXP = Differentiable("mixture_logsumexp", _forward, _save, _gradients, _empty)
_GRADIENT = GradientOperator("mixture_logsumexp_backward", _backward, _empty_gradients, of="mixture_logsumexp")

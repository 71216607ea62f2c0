"""The contrast of a batch that is one tile: dense, and a single node of autograd.

Of a small batch the number of operations is the cost, not the arithmetic. Here the whole loss is one node, from the
embeddings to the mean. Rows have length 1 and the scale a bound, so exponentials need no maximum taken off: each is
computed once, for both of its rows, and no sum of them over- or underflows. The forward makes of them the derivatives
by the logits, which are symmetric where rows meet rows, so that the backward is a single product. On a CPU it is known
without waiting whether there are rows without positives, or with only one: what such rows need is done where there are
any. On a GPU it is always done.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ccl_fast.ops import contrast_cpu
from ccl_fast.ops.differentiable import (
    are_transforms_active,
    differentiable_once,
    is_traced,
    refuse_forward_mode,
    savable,
)
from ccl_fast.ops.normalize import unit_rows, unit_rows_gradient
from ccl_fast.ops.precision import accumulation_dtype, without_autocast

# Elements of the matrix of logits, 1,024 rows or 724 and as many centres: beyond, arrays of them leave the caches.
MAX_ELEMENTS = 2**20
# With both a row's sum of exponentials, divided by the smallest one, is a float32: 4096 e^80.
MAX_SCALE, MAX_KEYS = 40.0, 4096

DEVICES = ("cpu", "cuda")
NAME = "contrast of one tile"


def fits(x: Tensor, keys: int, *scales: float | Tensor | None) -> bool:
    """Tell whether rows [n, d] of length 1, times these scales, against so many keys are one tile of plain tensors."""
    if is_traced(x) or are_transforms_active() or x.device.type not in DEVICES:
        return False
    n, d = x.shape
    is_tile = n > 1 and d > 0 and n * keys <= MAX_ELEMENTS and keys <= MAX_KEYS
    return is_tile and all(_is_small(scale) for scale in scales)


def _is_small(scale: float | Tensor | None) -> bool:
    """Tell whether a scale is known, and in the bound."""
    if isinstance(scale, Tensor):
        return is_known(scale) and bool((scale.detach() <= MAX_SCALE).all())
    return scale is None or scale <= MAX_SCALE


def self_contrast(
    x: Tensor,
    ids: Tensor,
    *,
    scale: float | Tensor,
    centers: Tensor | None = None,
    center_scale: float | Tensor | None = None,
    center_weight: float = 1.0,
    inside: bool = False,
    mean: bool = True,
) -> Tensor:
    r"""Cross-entropy of every row's softmax over the other rows, and centres, with its positives: those of its id.

    .. math::
        \ell_i = \log \sum_{j \ne i} e^{s_{ij}} - \sum_j T_{ij} s_{ij}, \quad
        \ell_i = \log \sum_{j \ne i} e^{s_{ij}} - \log \sum_{j \in P(i)} e^{s_{ij}} \quad \text{(inside)}

    T has equal weights on the rows of P(i), and ``center_weight`` on the centre i belongs to, and sums to 1. A positive
    that is the only one is left out of the sum and comes back by log(1 + x), as in `cross_entropy`. Rows and
    centres are brought to length 1 first.

    Args:
        x: ``[n, d]``; see `fits`.
        ids: int64 ``[n]``; a row's centre is that of its id, if there is one.
        scale: the inverse temperature.
        centers: ``[k, d]``; no gradient.
        center_scale: their inverse temperature, a number or ``[k]``, without a gradient; None: ``scale``.
        center_weight: > 0; 1 if inside.
        inside: the sum over positives is inside of the logarithm.
        mean: of the rows that have a positive, instead of the sum; the others have 0.

    Returns:
        A scalar.
    """
    if centers is not None and centers.requires_grad:
        centers = centers.detach()
    return _SelfContrast.apply(savable(x), centers, scale, center_scale, ids, center_weight, inside, mean)


def tower_contrast(q: Tensor, k: Tensor, *, scale: float | Tensor, symmetric: bool, mean: bool = True) -> Tensor:
    """Cross-entropy of every query with its own key, among all keys; and of every key among the queries if symmetric.

    Args:
        q, k: ``[n, d]``, brought to length 1 first; see `fits`.
        scale: the inverse temperature.
        symmetric: in both directions.
        mean: of all losses, instead of the sum.

    Returns:
        A scalar.
    """
    return _TowerContrast.apply(savable(q), savable(k), scale, symmetric, mean)


def views_contrast(
    first: Tensor,
    second: Tensor | None = None,
    *,
    scale: float | Tensor,
    mean: bool = True,
) -> Tensor:
    """Cross-entropy of every row with that of the other view, among all other rows (NT-Xent).

    Args:
        first, second: ``[n, d]`` each, or both views as ``[n, 2, d]``, brought to length 1 first; see `fits`.
        scale: the inverse temperature.
        mean: of all losses, instead of the sum.

    Returns:
        A scalar.
    """
    return _ViewsContrast.apply(savable(first), None if second is None else savable(second), scale, mean)


def _unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, rounded as rows of their dtype are, in the precision of the sums; the inverse of their lengths.

    Autocast is off here and rounds nothing: a tile is at least as exact under it as without.
    """
    given, wide = x.dtype, accumulation_dtype(x)
    x, inverse = unit_rows(x if given == wide else x.to(wide))
    return x if given == wide else x.to(given).to(wide), inverse


def is_known(x: Tensor) -> bool:
    """Tell whether the host knows what x holds without waiting for it."""
    return x.device.type == "cpu"


def _gradient(to_unit: Tensor, unit: Tensor, inverse: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """Of embeddings, given that of their unit rows; times a factor."""
    to_x = unit_rows_gradient(to_unit, unit, inverse * factor)
    return to_x if to_x.dtype == like.dtype else to_x.to(like.dtype)


def _number(scale: float | Tensor) -> float | Tensor:
    return scale.detach() if isinstance(scale, Tensor) else scale


def _tensor(scale: float | Tensor) -> Tensor | None:
    return scale if isinstance(scale, Tensor) else None


class _Contrast(NamedTuple):
    """Of a tile [n, m]."""

    losses: Tensor
    # Their sum's derivatives by the logits; at a pair of rows those of both of its logits, which are one number.
    slopes: Tensor
    absent: Tensor | None = None  # which rows have no positive, if there may be any


def _reduced(losses: Tensor, mean: bool, absent: Tensor | None = None) -> tuple[Tensor, float | Tensor]:
    """The losses reduced, and the factor that it gives their gradients."""
    if not mean:
        return losses.sum(), 1.0
    if absent is None:
        return losses.mean(), 1 / losses.numel()
    factor = absent.logical_not().sum(dtype=losses.dtype).clamp_(min=1.0).reciprocal_()
    return losses.sum() * factor, factor


class _SelfContrast(torch.autograd.Function):
    jvp = staticmethod(refuse_forward_mode(NAME))

    @staticmethod
    def forward(ctx, x, centers, scale, center_scale, ids, center_weight, inside, mean):
        n, rows = x.shape[0], x
        with without_autocast(x.device):
            if centers is not None:
                wide = accumulation_dtype(x)
                rows = torch.cat((x if x.dtype == wide else x.to(wide), centers.to(wide)))
            m = rows.shape[0]
            unit, inverse = _unit_rows(rows)
            if center_scale is None:
                keys = unit * scale
            else:
                of_centers = center_scale.view(-1, 1) if isinstance(center_scale, Tensor) else center_scale
                keys = torch.cat((unit[:n] * scale, unit[n:] * of_centers))
            if m > n:
                unit, inverse = unit[:n], inverse[:n]
            slopes = unit @ keys.T
            if contrast_cpu.serves(slopes):
                options = {"center_weight": center_weight, "inside": inside, "mean": mean}
                losses, ctx.factor = contrast_cpu.supervised(slopes, ids, **options)
            else:
                positive = ids[:, None] == torch.cat((ids, torch.arange(m - n, device=ids.device)))
                positive.fill_diagonal_(False)
                found = _inside(slopes, positive) if inside else _outside(slopes, positive, center_weight)
                slopes, (losses, ctx.factor) = found.slopes, _reduced(found.losses, mean, found.absent)
        ctx.scale = _number(scale)
        ctx.scaled_keys = n if center_scale is not None else m  # those that the scale multiplies
        ctx.save_for_backward(x, unit, inverse, keys, slopes, _tensor(scale))
        return losses

    @staticmethod
    def backward(ctx, grad):
        x, unit, inverse, keys, slopes, scale = ctx.saved_tensors
        to_scale = None
        with torch.no_grad(), without_autocast(x.device):
            factor = grad * ctx.factor
            to_unit = slopes @ keys
            if ctx.needs_input_grad[2]:
                to_scale = _to_scale(slopes, unit, keys, ctx.scaled_keys) * (factor / ctx.scale)
            to_x = _gradient(to_unit, unit, inverse, factor, x)
        to_x, to_scale = differentiable_once(NAME, (x, scale, grad), to_x, to_scale)
        return to_x, None, to_scale, *[None] * 5


def _to_scale(slopes: Tensor, unit: Tensor, keys: Tensor, scaled: int) -> Tensor:
    """The sum of the first logits of each row times their derivatives; those of a pair of rows stand for both."""
    n = unit.shape[0]
    of_rows = torch.linalg.vecdot(slopes[:, :n] @ keys[:n], unit).sum() / 2
    if scaled == n:
        return of_rows
    return of_rows + torch.linalg.vecdot(slopes[:, n:] @ keys[n:], unit).sum()


def _both(of_row: Tensor, columns: int) -> Tensor:
    """A value of each row, as the sum over the rows of a pair; centres add nothing."""
    n = of_row.shape[0]
    return of_row[:, None] + (of_row if columns == n else pad(of_row, (0, columns - n)))


def _outside(logits: Tensor, positive: Tensor, center_weight: float) -> _Contrast:
    n, m = logits.shape
    targets = positive.to(logits.dtype)
    count = total = targets.sum(1)
    if center_weight != 1 and m > n:
        targets[:, n:] *= center_weight
        total = targets.sum(1)
    fewest, absent = count.min().item() if is_known(count) else 0, None
    weight = total.reciprocal()
    if fewest == 0:
        absent = count == 0
        weight.masked_fill_(absent, 0.0)
    mean = torch.linalg.vecdot(targets, logits).mul_(weight)
    exponentials = logits.exp_().fill_diagonal_(0.0)
    sums = exponentials.sum(1)
    losses, share = sums.log() - mean, sums.reciprocal()
    if fewest <= 1:
        # All but the only positive of a row is a sum that does not round where the positive prevails.
        single = count == 1
        rest = exponentials.masked_fill_(positive & single[:, None], 0.0).sum(1)
        losses = torch.where(single, (rest / mean.exp()).log1p_(), losses)
        weight = torch.where(single, rest * share * weight, weight)
    if absent is not None:
        losses.masked_fill_(absent, 0.0)
        share.masked_fill_(absent, 0.0)
    slopes = exponentials.mul_(_both(share, m)).addcmul_(targets, _both(weight, m), value=-1)
    return _Contrast(losses, slopes, absent)


def _inside(logits: Tensor, positive: Tensor) -> _Contrast:
    m = logits.shape[1]
    others = logits.exp_().fill_diagonal_(0.0)
    own = others * positive
    others.sub_(own)
    of_own, rest = own.sum(1), others.sum(1)
    ratio, share, absent = rest / of_own, (rest + of_own).reciprocal_(), None
    if not is_known(of_own) or of_own.min().item() == 0:
        absent = of_own == 0
        ratio.masked_fill_(absent, 0.0)
        share.masked_fill_(absent, 0.0)
    slopes = others.mul_(_both(share, m)).addcmul_(own, _both(share * ratio, m), value=-1)
    return _Contrast(ratio.log1p(), slopes, absent)


def _views_losses(slopes: Tensor, n: int) -> Tensor:
    """The losses [2, n] of logits [2 n, 2 n], which become their sum's derivatives."""
    above, below = slopes.diagonal(n), slopes.diagonal(-n)
    own = above.exp()
    slopes.exp_().view(2, n, 2, n).diagonal(0, 1, 3).zero_()  # itself and its other view
    rest = slopes.sum(1).view(2, n)
    share = (rest + own).reciprocal_()
    of_row = share.view(-1)
    slopes.mul_(of_row[:, None] + of_row)
    by_own = (rest * share).sum(0).neg_()
    above.copy_(by_own)
    below.copy_(by_own)
    return (rest / own).log1p_()


def _tower_losses(slopes: Tensor, symmetric: bool) -> Tensor:
    """The same of logits [n, n] of two towers: [2, n], or [n] of one direction."""
    diagonal = slopes.diagonal()
    own = diagonal.exp()
    slopes.exp_().fill_diagonal_(0.0)
    rest = slopes.sum(1)
    if symmetric:
        rest = torch.stack((rest, slopes.sum(0)))
    share = (rest + own).reciprocal_()
    by_own = (rest * share).neg_()
    if symmetric:
        slopes.mul_(share[0][:, None] + share[1])
        diagonal.copy_(by_own.sum(0))
    else:
        slopes.mul_(share[:, None])
        diagonal.copy_(by_own)
    return (rest / own).log1p_()


class _ViewsContrast(torch.autograd.Function):
    jvp = staticmethod(refuse_forward_mode(NAME))

    @staticmethod
    def forward(ctx, first, second, scale, mean):
        n = first.shape[0]
        with without_autocast(first.device):
            # All first views before all second ones.
            x = first.transpose(0, 1).flatten(0, 1) if second is None else torch.cat((first, second))
            unit, inverse = _unit_rows(x)
            keys = unit * scale
            slopes = unit @ keys.T
            if contrast_cpu.serves(slopes):
                ctx.factor = 1 / len(slopes) if mean else 1.0
                losses = contrast_cpu.contrast(slopes, shift=n, both=True, factor=ctx.factor)
            else:
                losses, ctx.factor = _reduced(_views_losses(slopes, n), mean)
        ctx.scale = _number(scale)
        ctx.save_for_backward(first, second, unit, inverse, keys, slopes, _tensor(scale))
        return losses

    @staticmethod
    def backward(ctx, grad):
        first, second, unit, inverse, keys, slopes, scale = ctx.saved_tensors
        n, to_scale = first.shape[0], None
        with torch.no_grad(), without_autocast(unit.device):
            factor = grad * ctx.factor
            to_unit = slopes @ keys
            if ctx.needs_input_grad[2]:
                to_scale = torch.linalg.vecdot(to_unit, unit).sum() * (factor / (2 * ctx.scale))
            to_x = _gradient(to_unit, unit, inverse, factor, first)
            to_first, to_second = (to_x.view(2, n, -1).transpose(0, 1), None) if second is None else to_x.split(n)
        inputs = (first, second, scale, grad)
        return *differentiable_once(NAME, inputs, to_first, to_second, to_scale), None


class _TowerContrast(torch.autograd.Function):
    jvp = staticmethod(refuse_forward_mode(NAME))

    @staticmethod
    def forward(ctx, q, k, scale, symmetric, mean):
        n = q.shape[0]
        with without_autocast(q.device):
            unit, inverse = _unit_rows(torch.cat((q, k)))
            q_keys, k_unit = unit[:n] * scale, unit[n:]
            slopes = q_keys @ k_unit.T
            if contrast_cpu.serves(slopes):
                ctx.factor = 1 / (n * (1 + symmetric)) if mean else 1.0
                losses = contrast_cpu.contrast(slopes, shift=0, both=symmetric, factor=ctx.factor)
            else:
                losses, ctx.factor = _reduced(_tower_losses(slopes, symmetric), mean)
        ctx.scale = _number(scale)
        ctx.save_for_backward(q, k, unit, inverse, q_keys, slopes, _tensor(scale))
        return losses

    @staticmethod
    def backward(ctx, grad):
        q, k, unit, inverse, q_keys, slopes, scale = ctx.saved_tensors
        n, to_scale = q.shape[0], None
        with torch.no_grad(), without_autocast(unit.device):
            factor = grad * ctx.factor
            to_keys = slopes @ unit[n:]
            if ctx.needs_input_grad[2]:
                to_scale = torch.linalg.vecdot(to_keys, unit[:n]).sum() * factor
            to_unit = torch.cat((to_keys.mul_(ctx.scale), slopes.T @ q_keys))
            to_q, to_k = _gradient(to_unit, unit, inverse, factor, q).split(n)
            to_k = to_k.to(k.dtype)
        to_q, to_k, to_scale = differentiable_once(NAME, (q, k, scale, grad), to_q, to_k, to_scale)
        return to_q, to_k, to_scale, None, None

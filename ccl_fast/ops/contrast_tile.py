"""The contrast of a batch that is one tile: dense, and a single node of autograd.

Of a small batch the number of operations is the cost, not the arithmetic. Here the whole loss is one node, from the
embeddings to the mean; what it keeps for the backward are arrays of a tile at most. On a CPU it is known without
waiting whether rows have unusual lengths, or no positives, or only one: what such rows need is done where there are
any. On a GPU it is always done.
"""

from typing import Literal

import torch
from torch import Tensor

from ccl_fast.checks import product_dtype
from ccl_fast.ops.differentiable import (
    USE_REFERENCE,
    are_transforms_active,
    is_traced,
    refuse_double_backward,
    refuse_forward_mode,
)
from ccl_fast.ops.normalize import SHORTEST, lengths_are_usual
from ccl_fast.ops.precision import accumulation_dtype, without_autocast

# Elements of the matrix of logits: 512 rows and as many centres.
MAX_ELEMENTS = 2**19
# The logit of what is no candidate: finite, so that products with 0 are.
EMPTY = -1e37
# Below it a share of a sum has lost digits in float32.
TINY = 1e-30

DEVICES = ("cpu", "cuda")
NAME = "contrast of one tile"

Reduction = Literal["mean", "sum", "none"]


def fits(x: Tensor, keys: int) -> bool:
    """Tell whether rows [n, d] against so many keys are one tile, of plain tensors."""
    if is_traced(x) or are_transforms_active() or x.device.type not in DEVICES:
        return False
    n, d = x.shape
    return n > 1 and d > 0 and n * keys <= MAX_ELEMENTS


def self_contrast(
    x: Tensor,
    ids: Tensor,
    *,
    scale: float | Tensor,
    centers: Tensor | None = None,
    center_scale: float | Tensor | None = None,
    center_weight: float = 1.0,
    inside: bool = False,
    normalize: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of every row's softmax over the other rows, and centres, with its positives: those of its id.

    .. math::
        \ell_i = \log \sum_{j \ne i} e^{s_{ij}} - \sum_j T_{ij} s_{ij}, \quad
        \ell_i = \log \sum_{j \ne i} e^{s_{ij}} - \log \sum_{j \in P(i)} e^{s_{ij}} \quad \text{(inside)}

    T has equal weights on the rows of P(i), and ``center_weight`` on the centre i belongs to, and sums to 1. A positive
    that is the only one is left out of the sum and comes back by log(1 + x), as in `cross_entropy`.

    Args:
        x: ``[n, d]``; see `fits`.
        ids: int64 ``[n]``; a row's centre is that of its id, if there is one.
        scale: the inverse temperature.
        centers: ``[k, d]``; no gradient.
        center_scale: their inverse temperature, a number or ``[k]``, without a gradient; None: ``scale``.
        center_weight: > 0; 1 if inside.
        inside: the sum over positives is inside of the logarithm.
        normalize: rows and centres are brought to length 1 first.
        reduction: of the rows that have a positive; the others have 0.

    Returns:
        A scalar, or ``[n]``.
    """
    if centers is not None and centers.requires_grad:
        centers = centers.detach()
    return _SelfContrast.apply(x, centers, scale, center_scale, ids, center_weight, inside, normalize, reduction)


def tower_contrast(
    q: Tensor, k: Tensor, *, scale: float | Tensor, symmetric: bool, normalize: bool, reduction: Reduction = "mean"
) -> Tensor:
    r"""Cross-entropy of every query with its own key, among all keys; and of every key among the queries if symmetric.

    Args:
        q, k: ``[n, d]``; see `fits`.
        scale: the inverse temperature.
        symmetric: in both directions.
        normalize: rows are brought to length 1 first.
        reduction: of all losses.

    Returns:
        A scalar, or ``[n]``, or ``[n, 2]`` if symmetric.
    """
    return _TowerContrast.apply(q, k, scale, symmetric, normalize, reduction)


def views_contrast(
    first: Tensor,
    second: Tensor | None = None,
    *,
    scale: float | Tensor,
    normalize: bool,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of every row with that of the other view, among all other rows (NT-Xent).

    Args:
        first, second: ``[n, d]`` each, or both views as ``[n, 2, d]``; see `fits`.
        scale: the inverse temperature.
        normalize: rows are brought to length 1 first.
        reduction: of all losses.

    Returns:
        A scalar, or ``[n, 2]``.
    """
    return _ViewsContrast.apply(first, second, scale, normalize, reduction)


def _rows(x: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Embeddings in the precision of their products, held in that of the sums; the inverse of their lengths."""
    wide, products = accumulation_dtype(x), product_dtype(x)
    if x.dtype != wide:
        x = x.to(wide)
    inverse = None
    if normalize:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        if is_known(x) and lengths_are_usual(norm):
            inverse = norm.reciprocal_()
            x = x * inverse
        else:
            x, inverse = _unit_of_any_length(x)
    return x if products == wide else x.to(products).to(wide), inverse


def _unit_of_any_length(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, or 0; no square over- or underflows. The inverse is that for the gradient, which is bounded."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True)
    is_zero = largest == 0
    x = x / largest.masked_fill(is_zero, 1.0)  # a component is 1 now, if not all are 0
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_(min=1.0)
    inverse = (largest * norm).reciprocal_().clamp_(max=2.0**-SHORTEST).masked_fill_(is_zero, 0.0)
    return x.div_(norm), inverse


def is_known(x: Tensor) -> bool:
    """Tell whether the host knows what x holds without waiting for it."""
    return x.device.type == "cpu"


def _gradient(to_unit: Tensor, unit: Tensor, inverse: Tensor | None, factor: float | Tensor, like: Tensor) -> Tensor:
    """Of embeddings, given that of what they are contrasted as; times a factor."""
    if inverse is None:
        return (to_unit * factor).to(like.dtype)
    along = torch.linalg.vecdot(to_unit, unit).unsqueeze(1)
    to_x = torch.addcmul(to_unit, unit, along, value=-1).mul_(inverse * factor)
    return to_x if to_x.dtype == like.dtype else to_x.to(like.dtype)


def _number(scale: float | Tensor) -> float | Tensor:
    return scale.detach() if isinstance(scale, Tensor) else scale


def _once(inputs: tuple[Tensor | None, ...], *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients, which refuse to be differentiated where a graph of them is made (create_graph)."""
    return _Once.apply(len(inputs), *inputs, *gradients) if torch.is_grad_enabled() else gradients


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count, *inputs_and_gradients):
        return inputs_and_gradients[count:]

    backward = staticmethod(refuse_double_backward(NAME, USE_REFERENCE))


def _reduced(
    losses: Tensor, reduction: Reduction, absent: Tensor | None = None
) -> tuple[Tensor, float | Tensor | None]:
    """The losses reduced, and the factor of their gradients that follows; None: each has its own."""
    if reduction == "none":
        return losses, None
    if reduction == "sum":
        return losses.sum(), 1.0
    if absent is None:
        return losses.mean(), 1 / losses.numel()
    factor = absent.logical_not().sum(dtype=losses.dtype).clamp_(min=1.0).reciprocal_()
    return losses.sum() * factor, factor


class _SelfContrast(torch.autograd.Function):
    jvp = staticmethod(refuse_forward_mode(NAME))

    @staticmethod
    def forward(ctx, x, centers, scale, center_scale, ids, center_weight, inside, normalize, reduction):
        n, rows = x.shape[0], x
        with without_autocast(x.device):
            if centers is not None:
                wide = accumulation_dtype(x)
                rows = torch.cat((x if x.dtype == wide else x.to(wide), centers.to(wide)))
            m = rows.shape[0]
            unit, inverse = _rows(rows, normalize)
            column_ids = ids
            if m > n:
                column_ids = torch.cat((ids, torch.arange(m - n, device=ids.device)))
            if center_scale is None:
                keys = unit * scale
            else:
                of_centers = center_scale.view(-1, 1) if isinstance(center_scale, Tensor) else center_scale
                keys = torch.cat((unit[:n] * scale, unit[n:] * of_centers))
            if m > n:
                unit, inverse = unit[:n], None if inverse is None else inverse[:n]
            logits, positive = unit @ keys.T, ids[:, None] == column_ids
            logits.fill_diagonal_(EMPTY)
            positive.fill_diagonal_(False)
            of_form = _inside if inside else _outside
            losses, slopes, absent = of_form(logits, positive, n, center_weight)
            if absent is not None:
                losses.masked_fill_(absent, 0.0)
                slopes.masked_fill_(absent[:, None], 0.0)
            losses, ctx.factor = _reduced(losses, reduction, absent)
        ctx.scale = _number(scale)
        ctx.scaled_keys = n if center_scale is not None else m  # those that the scale multiplies
        ctx.save_for_backward(x, unit, inverse, keys, slopes)
        return losses

    @staticmethod
    def backward(ctx, grad):
        x, unit, inverse, keys, slopes = ctx.saved_tensors
        n, m, to_scale = unit.shape[0], keys.shape[0], None
        with torch.no_grad(), without_autocast(x.device):
            factor = 1.0 if ctx.factor is None else grad * ctx.factor
            if ctx.factor is None:
                slopes = slopes * grad[:, None]
            among = slopes if m == n else slopes[:, :n]
            if ctx.needs_input_grad[2]:
                scaled = slice(ctx.scaled_keys)
                to_scale = torch.linalg.vecdot(slopes[:, scaled] @ keys[scaled], unit).sum() * (factor / ctx.scale)
            to_unit = (slopes + slopes.T) @ keys if m == n else torch.addmm(slopes @ keys, among.T, keys[:n])
            to_x = _gradient(to_unit, unit, inverse, factor, x)
        to_x, to_scale = _once((x, grad), to_x, to_scale)
        return to_x, None, to_scale, *[None] * 6


def _outside(logits: Tensor, positive: Tensor, n: int, center_weight: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses, their derivatives with respect to the logits, and which rows have no positive (None: all have)."""
    targets = positive.to(logits.dtype)
    count = total = targets.sum(1, keepdim=True)
    if center_weight != 1 and targets.shape[1] > n:
        targets[:, n:] *= center_weight
        total = targets.sum(1, keepdim=True)
    fewest, absent = count.min().item() if is_known(count) else 0, None
    if fewest == 0:
        empty = count == 0
        absent, total = empty.squeeze(1), total.masked_fill(empty, 1.0)
    targets.div_(total)
    logs = logits.log_softmax(1)
    losses = torch.linalg.vecdot(targets, logs).neg_()
    softmax = logs.exp_()
    if fewest <= 1:
        # All but the only positive of a row is a sum that does not round where the positive prevails.
        single = count == 1
        rest = softmax.masked_fill_(positive & single, 0.0).sum(1, keepdim=True)
        losses = torch.where(single.squeeze(1), _loss_of(rest.squeeze(1), losses), losses)
        targets.mul_(torch.where(single, rest, 1.0))
    return losses, softmax.sub_(targets), absent


def _inside(logits: Tensor, positive: Tensor, n: int, center_weight: float) -> tuple[Tensor, Tensor, Tensor | None]:
    if not is_known(logits):
        return _inside_by_logarithms(logits, positive)
    softmax = logits.softmax(1)
    own = torch.where(positive, softmax, 0.0)
    share = own.sum(1, keepdim=True)
    if share.min().item() < TINY:
        return _inside_by_logarithms(logits, positive)
    others = softmax.sub_(own)
    rest = others.sum(1, keepdim=True)
    slopes = others.addcmul_(own, rest / share, value=-1)
    return _loss_of(rest.squeeze(1), share.squeeze(1).log_().neg_()), slopes, None


def _inside_by_logarithms(logits: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where some row has no positives, or such as vanish beside the others."""
    logs, own_logs = logits.log_softmax(1), logits.masked_fill(~positive, EMPTY).log_softmax(1)
    own = own_logs.exp()
    # The positives' share of the sum, by a difference that is the same for each of them.
    losses = torch.linalg.vecdot(own, own_logs.sub_(logs))
    softmax = logs.exp_()
    rest = softmax.masked_fill(positive, 0.0).sum(1)
    return _loss_of(rest, losses), softmax.sub_(own), ~positive.any(1)


def _loss_of(rest: Tensor, loss: Tensor) -> Tensor:
    """-log of the positive's softmax, by the sum of all others' where it prevails."""
    if is_known(rest) and rest.min().item() >= 0.5:
        return loss
    return torch.where(rest < 0.5, torch.log1p(-rest).neg_(), loss)


class _ViewsContrast(torch.autograd.Function):
    jvp = staticmethod(refuse_forward_mode(NAME))

    @staticmethod
    def forward(ctx, first, second, scale, normalize, reduction):
        n = first.shape[0]
        with without_autocast(first.device):
            # All first views before all second ones.
            x = first.transpose(0, 1).flatten(0, 1) if second is None else torch.cat((first, second))
            unit, inverse = _rows(x, normalize)
            scaled = unit * scale
            logits = unit @ scaled.T
            logits.fill_diagonal_(EMPTY)
            logs = logits.log_softmax(1)
            above, below = logs.diagonal(n), logs.diagonal(-n)
            losses = torch.cat((above, below)).neg_()
            slopes = logs.exp_()
            above.zero_()
            below.zero_()
            rest = slopes.sum(1)
            above.sub_(rest[:n])
            below.sub_(rest[n:])
            losses, ctx.factor = _reduced(_loss_of(rest, losses), reduction)
        ctx.scale = _number(scale)
        ctx.save_for_backward(first, second, unit, inverse, scaled, slopes)
        return losses if ctx.factor is not None else losses.view(2, n).T

    @staticmethod
    def backward(ctx, grad):
        first, second, unit, inverse, scaled, slopes = ctx.saved_tensors
        n = first.shape[0]
        with torch.no_grad(), without_autocast(unit.device):
            factor, to_scale = 1.0 if ctx.factor is None else grad * ctx.factor, None
            if ctx.factor is None:
                slopes = slopes * grad.T.reshape(-1, 1)
            if ctx.needs_input_grad[2]:
                to_scale = torch.linalg.vecdot(slopes @ unit, unit).sum() * factor
            to_x = _gradient((slopes + slopes.T) @ scaled, unit, inverse, factor, first)
            to_first = to_x.view(2, n, -1).transpose(0, 1) if second is None else to_x[:n]
            to_second = None if second is None else to_x[n:]
        to_first, to_second, to_scale = _once((first, second, grad), to_first, to_second, to_scale)
        return to_first, to_second, to_scale, None, None


class _TowerContrast(torch.autograd.Function):
    jvp = staticmethod(refuse_forward_mode(NAME))

    @staticmethod
    def forward(ctx, q, k, scale, symmetric, normalize, reduction):
        n = q.shape[0]
        with without_autocast(q.device):
            unit, inverse = _rows(torch.cat((q, k)), normalize)
            q_unit, k_unit = unit.split(n)
            scaled = q_unit * scale
            logits = scaled @ k_unit.T
            found = [_with_own(logits, dim) for dim in ((1, 0) if symmetric else (1,))]
            losses, slopes = zip(*found, strict=True)
            losses = torch.stack(losses, 1) if symmetric else losses[0]
            losses, ctx.factor = _reduced(losses, reduction)
            if reduction != "none" and symmetric:
                slopes = (slopes[0].add_(slopes[1]),)
        ctx.scale = _number(scale)
        ctx.save_for_backward(q, k, unit, q_unit, k_unit, inverse, scaled, *slopes)
        return losses

    @staticmethod
    def backward(ctx, grad):
        q, k, unit, q_unit, k_unit, inverse, scaled, *slopes = ctx.saved_tensors
        with torch.no_grad(), without_autocast(unit.device):
            factor = 1.0 if ctx.factor is None else grad * ctx.factor
            of_logits = slopes[0]
            if ctx.factor is None and len(slopes) == 1:
                of_logits = of_logits * grad[:, None]
            elif ctx.factor is None:
                of_logits = of_logits * grad[:, :1] + slopes[1] * grad[:, 1]
            to_scaled, to_scale = of_logits @ k_unit, None
            if ctx.needs_input_grad[2]:
                to_scale = torch.linalg.vecdot(to_scaled, q_unit).sum() * factor
            to_unit = torch.cat((to_scaled.mul_(ctx.scale), of_logits.T @ scaled))
            to_q, to_k = _gradient(to_unit, unit, inverse, factor, q).split(q.shape[0])
            to_k = to_k.to(k.dtype)
        to_q, to_k, to_scale = _once((q, k, grad), to_q, to_k, to_scale)
        return to_q, to_k, to_scale, None, None, None


def _with_own(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Cross-entropies with the diagonal along a dimension, and their derivatives by the logits."""
    logs = logits.log_softmax(dim)
    losses = logs.diagonal().neg()
    slopes = logs.exp_()
    own = slopes.diagonal()
    own.zero_()
    rest = slopes.sum(dim)
    own.sub_(rest)
    return _loss_of(rest, losses), slopes

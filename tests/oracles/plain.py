"""What a user writes without a library: the plain formulas, dense, with no more operations than they need.

The baseline of the benchmarks; `losses` has the definitions that the library is held to.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize


def _unit(x: Tensor) -> Tensor:
    """Normalised in float32 at least, multiplied in the dtype given."""
    return normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)


def _logits(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    return (q @ k.T).to(torch.promote_types(q.dtype, torch.float32)) / temperature


def supervised(x: Tensor, ids: Tensor, centers: Tensor | None, *, temperature: float, inside: bool = False) -> Tensor:
    """SupCon of rows [n, d] or views [n, views, d]; with centres [k, d], positives of their ids alone, CCL."""
    if x.ndim == 3:
        x, ids = x.flatten(0, 1), ids.repeat_interleave(x.shape[1])
    keys = rows = _unit(x)
    key_ids = ids
    if centers is not None:
        keys = torch.cat((rows, _unit(centers).to(rows.dtype)))
        key_ids = torch.cat((ids, torch.arange(len(centers), device=ids.device)))
    logits = _logits(rows, keys, temperature)
    itself = torch.eye(len(x), len(keys), dtype=torch.bool, device=x.device)
    positive = (ids[:, None] == key_ids) & ~itself
    total = logits.masked_fill(itself, -torch.inf).logsumexp(1)
    count = positive.sum(1)
    if inside:
        losses = total - logits.masked_fill(~positive, -torch.inf).logsumexp(1)
        losses = losses.masked_fill(count == 0, 0.0)
    else:
        losses = (total - (logits * positive).sum(1) / count.clamp(min=1)) * (count > 0)
    return losses.sum() / (count > 0).sum()


def nt_xent(views: Tensor, *, temperature: float) -> Tensor:
    """NT-Xent of [n, 2, d]."""
    n = len(views)
    z = _unit(torch.cat((views[:, 0], views[:, 1])))
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    logits = _logits(z, z, temperature).masked_fill(itself, -torch.inf)
    return cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def clip(towers: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE of [n, 2, d] in both directions."""
    logits = _logits(_unit(towers[:, 0]), _unit(towers[:, 1]), temperature)
    own = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2

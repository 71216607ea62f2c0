"""The dense forms of losses that take a few pairs of each row: whole matrices, of which the pairs are taken."""

import torch
from torch import Tensor

from tests.oracles.losses import unit
from tests.oracles.matrices import over_rows, scaled


def list_contrast(
    embeddings: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    z = scaled(embeddings, embeddings, normalize)
    s = z @ z.T / temperature
    listed = [s.gather(1, x.long().clamp(min=0)).masked_fill(x < 0, -torch.inf) for x in (positives, negatives)]
    has_positive = (positives >= 0).any(1)
    both = torch.cat(listed, 1).masked_fill(~has_positive[:, None], 0.0).logsumexp(1)
    losses = both - listed[0].masked_fill(~has_positive[:, None], 0.0).logsumexp(1)
    return over_rows(losses, reduction, has_positive)


def subspace_margin(
    embeddings: Tensor,
    labels: Tensor,
    cluster_ids: Tensor | None = None,
    *,
    boundary: float = 1.2,
    margin: float = 0.2,
    least_distance: float = 0.5,
    num_slices: int = 1,
    reduction: str = "mean",
) -> Tensor:
    cluster_ids = torch.zeros_like(labels) if cluster_ids is None else cluster_ids
    slices = unit(embeddings.unflatten(1, (num_slices, -1)))
    n = len(labels)
    z = slices[torch.arange(n, device=labels.device), cluster_ids.clamp(min=0)]
    square = 2 - 2 * z @ z.T
    distance = square.clamp(min=1e-12).sqrt()
    together = (cluster_ids[:, None] == cluster_ids) & (cluster_ids >= 0)
    same = (labels[:, None] == labels) & (labels >= 0)
    itself = torch.eye(n, dtype=torch.bool, device=z.device)
    positive = together & same & ~itself
    negative = together & ~same & ~itself & (square >= least_distance**2)
    nearest = distance.masked_fill(~negative, torch.inf).amin(1) if n else distance.sum(1)
    of_negative = (boundary - nearest + margin).clamp(min=0)
    pairs = ((distance - boundary + margin).clamp(min=0) + of_negative[:, None]).masked_fill(~positive, 0.0)
    if reduction == "none":
        return pairs.sum(1)
    return pairs.sum() / (positive.sum().clamp(min=1) if reduction == "mean" else 1)

"""The dense forms of losses whose pairs have terms, masks and gates of their own: whole matrices, and [n, n, d]."""

import torch
from torch import Tensor

from tests.oracles.matrices import over_rows, scaled


def conr(
    embeddings: Tensor,
    targets: Tensor,
    predictions: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    window: float = 1.0,
    push: float = 0.01,
    count_masked: bool = False,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    z = scaled(embeddings, embeddings, normalize)
    s = z @ z.T / temperature
    h = torch.ones_like(z.sum(1)) if weights is None else weights
    distance, of_predictions = ((x[:, None] - x).abs() for x in (targets, predictions))
    positive = (distance <= window) & ~torch.eye(len(z), dtype=torch.bool, device=z.device)
    negative = (distance > window) & (of_predictions <= window)
    logits = s.masked_fill(~positive, -torch.inf)
    pushed = (s + push * distance + h.log()[:, None]).masked_fill(~negative, -torch.inf)
    masked = (~positive).sum(1, keepdim=True).to(s.dtype).log() if count_masked else s[:, :0]
    count = positive.sum(1)
    counts = (count > 0) & negative.any(1)
    total = torch.cat((logits, pushed, masked), 1).masked_fill(~counts[:, None], 0.0).logsumexp(1)
    losses = h * (total - s.masked_fill(~positive, 0.0).sum(1) / count.clamp(min=1)).masked_fill(~counts, 0.0)
    return over_rows(losses, reduction)


def gated_pairs(
    embeddings: Tensor,
    labels: Tensor,
    partner_labels: Tensor,
    gates: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
) -> Tensor:
    """With the keys gated for each row, [n, n, d]."""
    anchors, keys = gates * embeddings, gates[:, None] * embeddings
    lengths = anchors.norm(dim=1, keepdim=True) * keys.norm(dim=2)
    products = (anchors[:, None] * keys).sum(2)
    s = torch.where(lengths > 0, products / torch.where(lengths > 0, lengths, 1.0), 0.0 * products) / temperature
    positive = (labels == partner_labels[:, None]) & (labels >= 0)
    left_out = positive | ((labels == labels[:, None]) & (labels >= 0))
    negatives = torch.cat((s.masked_fill(left_out, -torch.inf), torch.full_like(s[:, :1], -1e30)), 1).logsumexp(1)
    pairs = torch.nn.functional.softplus(negatives[:, None] - s, threshold=700).masked_fill(~positive, 0.0)
    if reduction == "none":
        return pairs.sum(1)
    return pairs.sum() / (positive.sum().clamp(min=1) if reduction == "mean" else 1)

"""Nearest centres by definition: every distance, in float64."""

import torch
from torch import Tensor

# Largest number of float64 entries of one block of differences.
BLOCK_ENTRIES = 1 << 24


class Rows:
    """Rows [problems, rows, d], and their nearest centres by definition."""

    def __init__(self, x: Tensor, metric: str):
        self.x, self.metric = x.double(), metric

    def nearest(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Labels int64 [problems, rows], and how many rows were in doubt and re-checked, int64 [2]: none."""
        block = max(1, BLOCK_ENTRIES // max(1, centers.shape[1] * centers.shape[2]))
        labels = [
            torch.cat([_argmin(exact_scores(part[:, None], c[None], self.metric)) for part in x.split(block)])
            for x, c in zip(self.x, centers.double(), strict=True)
        ]
        return torch.stack(labels), torch.zeros(2, dtype=torch.int64, device=centers.device)


def exact_scores(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    """What orders a row's centres: ``|x - c|^2``, or ``-<x, c> / |c|`` (0 for a zero centre), over the last axis."""
    if metric == "euclidean":
        return (x - centers).square().sum(-1)
    length = centers.norm(dim=-1)
    return torch.where(length > 0, -(x * centers).sum(-1) / length.clamp(min=torch.finfo(length.dtype).tiny), 0.0)


def _argmin(scores: Tensor) -> Tensor:
    """The lowest index of the lowest score (torch's argmin does not promise which of several)."""
    index = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    lowest = scores == scores.amin(1, keepdim=True)
    return index.masked_fill(~lowest, scores.shape[1]).amin(1)

"""Gram matrices of the rows of every cluster by definition: all outer products, in float64."""

import torch
from torch import Tensor


def segment_gram(
    z: Tensor, ids: Tensor | None = None, n_clusters: int | None = None, *, weights: Tensor | None = None
) -> Tensor:
    """As `segment_gram.segment_gram` says, in O(n d^2 + n K) memory; differentiable any number of times."""
    if weights is None:
        assert ids is not None and n_clusters is not None
        weights = (ids[:, None] == torch.arange(n_clusters, device=ids.device)).to(z.dtype)
    outer = z[:, :, None] * z[:, None, :]
    return torch.einsum("nk,nde->kde", weights, outer)

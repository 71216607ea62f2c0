"""How clusters compare with classes."""

from __future__ import annotations

import warnings

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics.functional.clustering import normalized_mutual_info_score


def cluster_quality(ids: Tensor, classes: Tensor) -> dict[str, float]:
    """Measure how well clusters match classes.

    Args:
        ids: cluster of every sample, int ``[n]``.
        classes: class of every sample, int ``[n]``.

    Returns:
        ``{"nmi", "accuracy", "same_class"}``, all in [0, 1]: normalised mutual information (arithmetic mean of the
        entropies); the share of samples in the class that their cluster stands for, where every class has at most one
        cluster and every cluster one class, chosen so that the share is largest (Hungarian method); and the share of
        a sample's cluster-mates that are of its class, mean over the samples that have some (1 if none has).
    """
    ids, classes = (x.cpu().unique(return_inverse=True)[1] for x in (ids, classes))  # whatever their numbers
    with warnings.catch_warnings():  # torchmetrics builds a sparse tensor, of which torch warns
        warnings.filterwarnings("ignore", message="Sparse invariant checks")
        nmi = normalized_mutual_info_score(ids, classes).item()
    together = torch.zeros(int(ids.max()) + 1, int(classes.max()) + 1, dtype=torch.int64)
    together.index_put_((ids, classes), torch.ones_like(ids), accumulate=True)
    rows, columns = linear_sum_assignment(together.numpy(), maximize=True)
    sizes, mates = together.sum(1, keepdim=True), (together * (together - 1)).double()
    same = (mates / (sizes - 1).clamp(min=1)).sum() / sizes[sizes > 1].sum() if (sizes > 1).any() else torch.ones(())
    return {
        "nmi": nmi,
        "accuracy": together.numpy()[rows, columns].sum().item() / len(ids),
        "same_class": same.item(),
    }

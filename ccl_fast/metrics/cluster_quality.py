"""How clusters compare with classes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ccl_fast.checks import check_has_values, check_tensor
from ccl_fast.errors import ArgumentError, packages_of_training


def cluster_quality(cluster_ids: Tensor, labels: Tensor) -> dict[str, float]:
    r"""Compare clusters with classes.

    With :math:`n_{kc}` the samples of cluster k and class c, :math:`n_k, n_c` their sums, n all:

    .. math::
        \text{nmi} = \frac{2 I}{H_k + H_c}, \quad I = \sum_{kc} \frac{n_{kc}}{n} \log \frac{n\, n_{kc}}{n_k n_c}, \qquad
        \text{accuracy} = \max_\pi \frac{1}{n} \sum_k n_{k \pi(k)}, \qquad
        \text{purity} = \frac{1}{n} \sum_k \max_c n_{kc}, \qquad
        \text{same class} = \frac{\sum_{kc} n_{kc} (n_{kc} - 1) / (n_k - 1)}{\sum_{k: n_k > 1} n_k}

    Args:
        cluster_ids: cluster of every sample, integers ``[n]`` of any values, at least one.
        labels: class of every sample, likewise.

    Returns:
        ``{"nmi", "accuracy", "purity", "same_class"}``, all in [0, 1]: normalised mutual information (arithmetic mean
        of the entropies; needs torchmetrics); the share of samples in the class that their cluster stands for, where
        every class has at most one cluster and every cluster one class, chosen so that the share is largest
        (one-to-one, Hungarian method: with more clusters than classes some stand for none, and perfect clusters are
        below 1); the same where every cluster stands for its most frequent class (many-to-one: it grows with the number
        of clusters); and the share of a sample's cluster-mates that are of its class, mean over the samples that have
        some (1 if none has).

    Raises:
        ValueError: an argument has the wrong type or shape.

    Example:
        >>> import torch
        >>> from ccl_fast.metrics import cluster_quality
        >>> cluster_quality(torch.tensor([1, 1, 0, 0]), torch.tensor([5, 5, 7, 7]))
        {'nmi': 1.0, 'accuracy': 1.0, 'purity': 1.0, 'same_class': 1.0}
    """
    # These take long to import.
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    with packages_of_training():
        from torchmetrics.functional.clustering import normalized_mutual_info_score

    check_tensor("cluster_ids", cluster_ids)
    for name, x in (("cluster_ids", cluster_ids), ("labels", labels)):
        check_tensor(name, x)
        check_has_values(name, x, "which are counted")
        if x.is_complex() or (x.is_floating_point() and x.element_size() < 2):
            raise ArgumentError(f"{name}: expected integers [n], got {x.dtype}")
        if x.ndim != 1 or x.shape != cluster_ids.shape or not len(x):
            raise ArgumentError(f"{name}: expected shape [n] with n of at least 1, got {list(x.shape)}")
    # Whatever their numbers.
    ids, classes = (x.cpu().unique(return_inverse=True)[1] for x in (cluster_ids, labels))
    # torchmetrics builds, on the default device, a sparse tensor, of which torch warns.
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse invariant checks")
        nmi = normalized_mutual_info_score(ids, classes).item()
    counts = contingency_matrix(ids, classes)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    together = torch.from_numpy(counts)
    sizes, mates = together.sum(1, keepdim=True), (together * (together - 1)).double()
    same = (
        (mates / (sizes - 1).clamp(min=1)).sum() / sizes[sizes > 1].sum()
        if (sizes > 1).any()
        else torch.ones((), device="cpu")
    )
    return {
        "nmi": nmi,
        "accuracy": counts[rows, columns].sum().item() / len(ids),
        "purity": together.amax(1).sum().item() / len(ids),
        "same_class": same.item(),
    }

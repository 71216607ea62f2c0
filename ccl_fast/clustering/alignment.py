"""Rename the clusters of one clustering after those of another."""

from __future__ import annotations

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_integer, check_same, check_tensor, check_vector
from ccl_fast.errors import ArgumentError


def align_clusters(cluster_ids: Tensor, reference_ids: Tensor, n_clusters: int) -> Tensor:
    r"""Find the renaming of clusters that is most like another clustering of the same rows.

    .. math::
        \pi = \arg\max_{\pi \text{ a permutation}} \; |\{i : \pi(y_i) = z_i\}|

    found by the Hungarian method. ``align_clusters(y, z, k)[y]`` are the ids renamed; the share of rows where they
    differ from ``z`` is how much the clustering changed. ``centers[alignment.argsort()]`` puts centres in that order.

    Memory grows with the square of the number of clusters.

    Args:
        cluster_ids: y, ``[n]``, int64 or int32 in ``[0, n_clusters)``.
        reference_ids: z, likewise (for instance the labels of the last epoch, or of classes).
        n_clusters: k; if the two clusterings have different numbers of clusters, the larger.

    Returns:
        ``[n_clusters]`` int64, a permutation: the new name of every cluster, on the device of cluster_ids.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.

    Paper: Kuhn, "The Hungarian method for the assignment problem", 1955.
    """
    from scipy.optimize import linear_sum_assignment

    check_count("n_clusters", n_clusters)
    check_tensor("cluster_ids", cluster_ids)
    check_vector("cluster_ids", cluster_ids, cluster_ids.numel())
    check_vector("reference_ids", reference_ids, len(cluster_ids))
    check_same("reference_ids", reference_ids, "cluster_ids", cluster_ids, dtype=False)
    for name, ids in (("cluster_ids", cluster_ids), ("reference_ids", reference_ids)):
        check_integer(name, ids)
        if len(ids) and not 0 <= ids.min() <= ids.max() < n_clusters:
            raise ArgumentError(
                f"{name}: expected ids in [0, {n_clusters}), got {ids.min().item()} to {ids.max().item()}"
            )
    joint = cluster_ids.long() * n_clusters + reference_ids.long()
    overlap = joint.bincount(minlength=n_clusters * n_clusters).view(n_clusters, n_clusters)
    names = linear_sum_assignment(overlap.cpu().numpy(), maximize=True)[1]
    return torch.from_numpy(names).to(cluster_ids.device)

"""Measure how tight each cluster is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ccl_fast.checks import check_choice, check_finite, check_floating, check_ids, check_matrix
from ccl_fast.clustering.shards import digest
from ccl_fast.distributed import open_group
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.kmeans.assign import METRICS, Metric
from ccl_fast.ops.kmeans.distance import center_distance
from ccl_fast.ops.kmeans.update import sum_by_cluster
from ccl_fast.ops.precision import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The share of clusters at either end whose concentration is clipped.
CLIPPED_SHARE = 0.1


@torch.no_grad()
def concentration(
    x: Tensor,
    cluster_ids: Tensor,
    centers: Tensor,
    *,
    metric: Metric = "cosine",
    smoothing: float = 10.0,
    mean: float | None = None,
    process_group: ProcessGroup | str | None = None,
) -> Tensor:
    r"""Measure the concentration of every cluster, the larger the looser: PCL's per-cluster temperature.

    .. math::
        \phi_k = \frac{\sum_{i: y_i = k} \delta(x_i, \mu_k)}{n_k \log(n_k + \alpha)}

    with :math:`\delta = |x - \mu|` between unit vectors (cosine) or between the vectors as they are (euclidean). A
    cluster of fewer than two rows has none of its own and gets the largest of the others. As in the
    paper's code, values are then clipped to their 10th and 90th percentile.

    They are positive, as temperatures have to be: a cluster whose rows lie on its centre gets the smallest of those
    that have a spread, and if no cluster has any (collapsed features), all get ``mean``, or 1 without it. (The paper's
    code divides 0 by 0 there.)

    Args:
        x: features ``[n, d]``, floating point.
        cluster_ids: ``[n]``, int64 or int32 in ``[0, k)``.
        centers: ``[k, d]``.
        metric: "cosine" or "euclidean".
        smoothing: alpha, which keeps small clusters from looking tight.
        mean: scale the result to this mean, for instance the loss's temperature; None: leave it.
        process_group: whose processes each pass some of the rows, and the same centres: a torch.distributed process
            group, "world" (the default group), or None: all rows are here. The result is that of all the rows, the
            same bits on every process.

    Returns:
        ``[k]`` float32 (float64 for float64 x), positive.

    Raises:
        ValueError: no cluster has two rows; an argument has a wrong shape or value. With a process group on every
            process, also if arguments other than the rows differ.

    Paper: Li et al., "Prototypical contrastive learning of unsupervised representations", 2021, section 3.3.
    """
    group = open_group(process_group)
    with group.together():
        _check(x, cluster_ids, centers, metric, smoothing, mean)
    counts = group.check_everywhere(
        lambda: len(x),
        same=lambda: {
            "x.dtype": str(x.dtype),
            "centers": digest(centers),
            "metric": metric,
            "smoothing": smoothing,
            "mean": mean,
        },
    )
    k, ids = len(centers), cluster_ids.long()[None]
    centers = centers.to(accumulation_dtype(x))
    square = center_distance(x[None], centers[None], ids, metric=metric)
    # |x - c|^2 = 2 (1 - cos) between unit vectors.
    distance = (2 * square if metric == "cosine" else square).sqrt()
    sums = sum_by_cluster(distance[..., None], ids, k, None, "auto")
    total, count = group.sums(*sums)
    total, count = total[0, :, 0], count[0]
    usable = count >= 2
    if not usable.any():
        got = f"{sum(counts)} rows in {k} clusters"
        raise ArgumentError(f"cluster_ids: expected a cluster of at least two rows, got {got}")
    phi = total / (count * torch.log(count + smoothing)).clamp(min=1)
    phi = torch.where(usable, phi, phi[usable].max())
    if not phi.any():
        return torch.full_like(phi, 1.0 if mean is None else mean, dtype=centers.dtype)
    low, high = phi.quantile(torch.tensor([CLIPPED_SHARE, 1 - CLIPPED_SHARE], dtype=phi.dtype, device=phi.device))
    low = low.clamp(min=phi[phi > 0].min())
    phi = phi.clamp(low, high.clamp(min=low))
    if mean is not None:
        phi = phi * (mean / phi.mean())
    return phi.to(centers.dtype)


def _check(x: Tensor, cluster_ids: Tensor, centers: Tensor, metric: str, smoothing: float, mean: float | None) -> None:
    if not smoothing >= 1:
        raise ArgumentError(f"smoothing: expected a number >= 1, got {smoothing!r}")
    if mean is not None and not mean > 0:
        raise ArgumentError(f"mean: expected a positive number, got {mean!r}")
    check_choice("metric", metric, METRICS)
    check_matrix("x", x)
    check_floating("x", x)
    check_finite("x", x)
    check_ids("cluster_ids", cluster_ids, x)
    check_matrix("centers", centers, columns=x.shape[1])
    check_finite("centers", centers)
    k = len(centers)
    if len(x) and not 0 <= cluster_ids.min() <= cluster_ids.max() < k:
        got = f"{cluster_ids.min().item()} to {cluster_ids.max().item()}"
        raise ArgumentError(f"cluster_ids: expected ids in [0, {k}), got {got}")

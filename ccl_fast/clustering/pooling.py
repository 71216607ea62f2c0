"""Fewer vectors for each sequence: the means of its clusters."""

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_ids, check_matrix, check_seed
from ccl_fast.clustering.kmeans import KMeans
from ccl_fast.ops.ids import consecutive_ids
from ccl_fast.ops.normalize import normalize_rows
from ccl_fast.ops.precision import accumulation_dtype


def pool_by_clusters(x: Tensor, ids: Tensor, n_clusters: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Replace the vectors of each sequence by the means of its clusters, of spherical k-means.

    Gradients flow through the means to all vectors; which cluster a vector belongs to is constant. A sequence of
    ``n_clusters`` vectors or fewer keeps them as they are. All sequences are clustered at once, padded to the longest.

    CRISP, Veneroso et al. (arXiv:2505.11471), has 4 or 8 clusters for a query and 32 or 8 for a document; what it
    contrasts them by is :class:`ccl_fast.losses.MaxSimLoss`.

    Args:
        x: ``[n, d]``, finite; float64, float32, bfloat16 or float16.
        ids: ``[n]``, int32 or int64: the sequence of each vector; vectors whose id is below 0 are left out.
        n_clusters: of each sequence, at least 1.
        seed: of k-means.

    Returns:
        Means ``[m, d]``, in the dtype of x, those of a sequence together, and their ids ``[m]``, int64, in ascending
        order.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.clustering import pool_by_clusters
        >>> means, ids = pool_by_clusters(torch.randn(50, 16), torch.arange(50) // 25, 4)
        >>> means.shape, ids.tolist()
        (torch.Size([8, 16]), [0, 0, 0, 0, 1, 1, 1, 1])
    """
    check_matrix("x", x)
    check_floating("x", x)
    check_ids("ids", ids, x)
    check_count("n_clusters", n_clusters)
    check_seed("seed", seed)
    if (ids < 0).any():
        x, ids = x[ids >= 0], ids[ids >= 0]
    order = ids.long().sort(stable=True).indices
    x, ids = x[order], ids.long()[order]
    counts = ids.unique_consecutive(return_counts=True)[1]
    group = _clusters(x.detach(), counts, n_clusters, seed)
    number = int(group.max()) + 1 if len(group) else 0
    wide = x.to(accumulation_dtype(x))  # in half precision a sum overflows, and a count stops growing
    sums = wide.new_zeros(number, x.shape[1]).index_add(0, group, wide)
    of_group = torch.zeros(number, dtype=torch.int64, device=x.device).index_copy(0, group, ids)
    return (sums / group.bincount(minlength=number)[:, None]).to(x.dtype), of_group


def _clusters(x: Tensor, counts: Tensor, n_clusters: int, seed: int) -> Tensor:
    """Numbers of the clusters, 0, 1, ... over all sequences, of rows that are in their order."""
    sequence = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
    place = torch.arange(len(x), device=x.device) - (counts.cumsum(0) - counts)[sequence]
    cluster = place.clone()
    long = (counts > n_clusters)[sequence]
    if long.any():
        problem, rows = consecutive_ids(sequence[long]), place[long]
        padded = x.new_zeros(int(problem.max()) + 1, int(counts.max()), x.shape[1])
        padded[problem, rows] = normalize_rows(x[long]).to(x.dtype)
        weights = torch.zeros(padded.shape[:2], device=x.device).index_put_(
            (problem, rows), torch.ones(len(rows), device=x.device)
        )
        kmeans = KMeans(n_clusters, metric="cosine", random_state=seed, empty_cluster="keep")
        cluster[long] = kmeans.fit(padded, sample_weight=weights).labels_[problem, rows]
    return consecutive_ids(sequence * max(int(counts.max()) if len(counts) else 1, n_clusters) + cluster)

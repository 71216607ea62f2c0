"""The update step of k-means: sums of rows by cluster, the same bits every time."""

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_integer, check_same, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.backends import KMeansBackend, choose_backend, chosen_module
from ccl_fast.ops.kmeans.update_blocked import KEPT_ENTRIES, sum_kept
from ccl_fast.ops.precision import accumulation_dtype


def kmeans_update(
    x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None = None, *, backend: KMeansBackend = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Weighted sums of the rows of every cluster, and the clusters' total weights.

    .. math::
        S_k = \sum_{i: y_i = k} w_i x_i, \qquad W_k = \sum_{i: y_i = k} w_i

    Sums are float64's from the first row, so they hardly depend on how rows are parted, and not at all where their
    digits suffice, as for float32 rows of similar magnitude. No atomics: the same input gives the same bits. No
    gradient flows.

    Args:
        x: ``[n, d]``, or ``[b, n, d]`` for b independent problems; float64, float32, bfloat16 or float16.
        labels: ``[n]`` or ``[b, n]``, int64 or int32 in ``[0, n_clusters)``.
        n_clusters: k.
        weights: ``[n]`` or ``[b, n]``, floating point; 1 by default.
        backend: "auto", "cuda" or "cpu" (the extensions), "blocked" (plain torch, any device) or "reference" (float64).

    Returns:
        ``sums`` float64 ``[k, d]`` (``[b, k, d]``), zero for empty clusters; ``total_weights`` float64 ``[k]``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the backend cannot run here.
    """
    check_tensor("x", x)
    check_floating("x", x)
    if x.ndim not in (2, 3):
        raise ArgumentError(f"x: expected shape [rows, d] or [problems, rows, d], got {list(x.shape)}")
    for name, rows in (("labels", labels), ("weights", weights)):
        if rows is None:
            continue
        check_tensor(name, rows)
        check_same(name, rows, "x", x, dtype=False)
        if rows.shape != x.shape[:-1]:
            raise ArgumentError(f"{name}: expected shape {list(x.shape[:-1])}, got {list(rows.shape)}")
    check_integer("labels", labels)
    check_count("n_clusters", n_clusters)
    if labels.numel() and not 0 <= labels.min() <= labels.max() < n_clusters:
        raise ArgumentError(
            f"labels: expected labels in [0, {n_clusters}), got {labels.min().item()} to {labels.max().item()}"
        )
    if weights is not None:
        check_floating("weights", weights)
    if x.ndim == 3:
        return sum_by_cluster(x, labels, n_clusters, weights, backend)
    sums, total_weights = sum_by_cluster(
        x[None], labels[None], n_clusters, None if weights is None else weights[None], backend
    )
    return sums[0], total_weights[0]


def sum_by_cluster(
    x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """As :func:`kmeans_update`, for [problems, rows, d], without its checks: it does not make the host wait.

    A backend's own takes rows [n, d] and the clusters 0 ... count - 1 of all problems.
    """
    problems, _, d = x.shape
    if weights is not None:
        weights = weights.detach().to(accumulation_dtype(x)).flatten()
    clusters = labels.long()
    if problems > 1:
        clusters = clusters + n_clusters * torch.arange(problems, device=x.device)[:, None]
    clusters = clusters.flatten()
    module = chosen_module("kmeans_update", backend, x.device, x.dtype)
    rows = x.detach().reshape(-1, d)
    sums, total_weights = module.sum_by_cluster(rows, clusters, problems * n_clusters, weights)
    return sums.view(problems, n_clusters, d), total_weights.view(problems, n_clusters)


class Sums:
    """Rows [problems, rows, d] that are summed by many labellings, one after the other.

    Args:
        weights: of a row in the sum of its cluster, [problems, rows]; None is 1.
        counts: of a row in the total weight of its cluster, likewise; not None if weights is not.
    """

    def __init__(self, x: Tensor, weights: Tensor | None, counts: Tensor | None, backend: str):
        self.x, self.weights, self.counts, self.backend = x, weights, counts, backend
        module = choose_backend("kmeans_update", backend, x.device, x.dtype)
        # Few rows of a single problem on a CPU take several labellings at once.
        self.are_few = module in ("cpu", "blocked") and x.device.type == "cpu" and x.numel() <= KEPT_ENTRIES
        self.kept: Tensor | None = None  # as they are summed, and what they count
        if self.are_few and module == "blocked":
            self.kept = torch.empty(*x.shape[:2], x.shape[2] + 1, dtype=torch.float64)
            self.kept[..., :-1] = x
            if weights is not None:
                self.kept[..., :-1].mul_(weights[..., None])
            self.kept[..., -1] = 1.0 if counts is None else counts

    def by_cluster(self, labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
        """The sums of the clusters, float64 [problems, n_clusters, d], and their total weights [problems, n_clusters].

        Where rows `are_few`, there may be several labellings of a single problem: [sets, rows].
        """
        if self.kept is not None:
            sums = sum_kept(self.kept, labels, n_clusters)
            return sums[..., :-1], sums[..., -1]
        if len(labels) > len(self.x):
            sums, totals = zip(*(self._by_cluster(own[None], n_clusters) for own in labels), strict=True)
            return torch.cat(sums), torch.cat(totals)
        return self._by_cluster(labels, n_clusters)

    def _by_cluster(self, labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
        sums, totals = sum_by_cluster(self.x, labels, n_clusters, self.weights, self.backend)
        if self.counts is not self.weights:
            counts = self.counts
            if counts is None:
                counts = torch.ones_like(labels, dtype=accumulation_dtype(self.x))
            totals = sum_by_cluster(counts[..., None], labels, n_clusters, None, self.backend)[0][..., 0]
        return sums, totals

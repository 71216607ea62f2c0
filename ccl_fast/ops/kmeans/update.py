"""The update step of k-means: sums of rows by cluster, the same bits every time."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ccl_fast.kernels import extension
from ccl_fast.kernels.extension import address
from ccl_fast.ops.backends import choose_backend
from ccl_fast.ops.validation import check_floating, check_integer, check_same, check_tensor

# In the order in which "auto" prefers them; each names its obstacles on a device and dtype.
BACKENDS = {
    "cuda": extension.obstacles,
    "blocked": lambda device, dtype: [],
    "reference": lambda device, dtype: [],
}
# Rows that are summed in the working precision before float64 takes over.
PIECE_ROWS = 256
# Entries that are summed in float64 from the start, at once: on a CPU they should stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 17, 1 << 25


def kmeans_update(
    x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Weighted sums of the rows of every cluster, and the clusters' total weights.

    .. math::
        S_k = \sum_{i: y_i = k} w_i x_i, \qquad W_k = \sum_{i: y_i = k} w_i

    Rows are sorted by cluster and summed in that order, at most 256 at a time in float32 and then in float64: no
    atomics, so the same input gives the same bits. No gradient flows.

    Args:
        x: ``[n, d]``, or ``[b, n, d]`` for b independent problems; float64, float32, bfloat16 or float16.
        labels: ``[n]`` or ``[b, n]``, int64 or int32 in ``[0, n_clusters)``.
        n_clusters: k.
        weights: ``[n]`` or ``[b, n]``, floating point; 1 by default.
        backend: "auto", "cuda" (the extension), "blocked" (plain torch, any device) or "reference" (float64).

    Returns:
        ``sums`` float64 ``[k, d]`` (``[b, k, d]``), zero for empty clusters; ``total_weights`` float64 ``[k]``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the backend cannot run here.
    """
    check_tensor("x", x)
    check_floating("x", x)
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected shape [rows, d] or [problems, rows, d], got {list(x.shape)}")
    for name, rows in (("labels", labels), ("weights", weights)):
        if rows is None:
            continue
        check_tensor(name, rows)
        check_same(name, rows, "x", x, dtype=False)
        if rows.shape != x.shape[:-1]:
            raise ValueError(f"{name}: expected shape {list(x.shape[:-1])}, got {list(rows.shape)}")
    check_integer("labels", labels)
    if not isinstance(n_clusters, int) or n_clusters < 1:
        raise ValueError(f"n_clusters: expected a positive integer, got {n_clusters!r}")
    if labels.numel() and not 0 <= labels.min() <= labels.max() < n_clusters:
        raise ValueError(
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
    x: Tensor, labels: Tensor, n_clusters: int, weights: Tensor | None, backend: str, *, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """As :func:`kmeans_update`, for [problems, rows, d], without its checks: it does not make the host wait.

    ``wide`` sums are float64 from the first row (but for the extension's): they hardly depend on how rows are parted,
    and not at all where their digits suffice, as for float32 rows of similar magnitude.
    """
    problems, _, d = x.shape
    if weights is not None:
        weights = weights.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten()
    shift = n_clusters * torch.arange(problems, device=x.device)
    clusters = (labels.long() + shift[:, None]).flatten()
    chosen = choose_backend("kmeans_update", BACKENDS, backend, x.device, x.dtype)
    run = {"cuda": _cuda, "blocked": _wide if wide else _blocked, "reference": _reference}[chosen]
    sums, total_weights = run(x.detach().reshape(-1, d), clusters, problems * n_clusters, weights)
    return sums.view(problems, n_clusters, d), total_weights.view(problems, n_clusters)


def _reference(x: Tensor, clusters: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    weights = torch.ones(len(x), dtype=torch.float64, device=x.device) if weights is None else weights.double()
    sums = torch.zeros(count, x.shape[1], dtype=torch.float64, device=x.device)
    total_weights = torch.zeros(count, dtype=torch.float64, device=x.device)
    return sums.index_add_(0, clusters, weights[:, None] * x.double()), total_weights.index_add_(0, clusters, weights)


def _segments(clusters: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers sorted by cluster; where each cluster begins, in rows and in pieces, [count + 1] each."""
    in_order, order = clusters.sort(stable=True)
    offsets = torch.searchsorted(in_order, torch.arange(count + 1, device=clusters.device))
    pieces = (offsets.diff() + PIECE_ROWS - 1) // PIECE_ROWS
    return order, offsets, F.pad(pieces.cumsum(0), (1, 0))


def _blocked(x: Tensor, clusters: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(count, x.shape[1], dtype=torch.float64, device=x.device)
    if len(x) == 0:
        return sums, sums.sum(1)
    order, offsets, piece_offsets = _segments(clusters, count)
    cluster = torch.repeat_interleave(torch.arange(count, device=x.device), piece_offsets.diff())
    piece = torch.arange(len(cluster), device=x.device) - piece_offsets[cluster]
    starts = offsets[cluster] + PIECE_ROWS * piece

    def add(rows: Tensor, totals: Tensor, row_weights: Tensor | None) -> Tensor:
        partial = F.embedding_bag(order, rows, starts, mode="sum", per_sample_weights=row_weights)
        for i in range(int(piece_offsets.diff().max())):  # one piece of every cluster after the other
            present = (piece_offsets.diff() > i).nonzero()[:, 0]
            totals[present] += partial[piece_offsets[present] + i]
        return totals

    rows = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()  # other strides would take other kernels
    if weights is None:
        return add(rows, sums, None), offsets.diff().double()
    total_weights = torch.zeros(count, 1, dtype=torch.float64, device=x.device)
    return add(rows, sums, weights[order]), add(weights[:, None].double(), total_weights, None)[:, 0]


def _wide(x: Tensor, clusters: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(count, x.shape[1], dtype=torch.float64, device=x.device)
    total_weights = torch.zeros(count, dtype=torch.float64, device=x.device)

    def add(total: Tensor, to: Tensor, rows: Tensor) -> None:
        if x.device.type == "cpu":
            total.index_add_(0, to, rows)  # row after row
        else:
            total.index_put_((to,), rows, accumulate=True)  # sorted, while index_add_ would use atomics

    size = max(1, (CPU_ENTRIES if x.device.type == "cpu" else DEVICE_ENTRIES) // max(1, x.shape[1]))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        rows = x[part].double()
        if weights is None:
            weight = torch.ones_like(rows[:, 0])
        else:
            weight = weights[part].double()
            rows = rows * weight[:, None]
        add(sums, clusters[part], rows)
        add(total_weights, clusters[part], weight)
    return sums, total_weights


def _cuda(x: Tensor, clusters: Tensor, count: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    x, d = x.contiguous(), x.shape[1]
    weights = None if weights is None else weights.contiguous()
    order, offsets, piece_offsets = _segments(clusters, count)
    pieces = -(-len(x) // PIECE_ROWS) + count  # at most: how many there are is known to the device alone
    partial = torch.empty(pieces, d, dtype=torch.float32, device=x.device)
    partial_weight = torch.empty(pieces, dtype=torch.float64, device=x.device)
    sums = torch.empty(count, d, dtype=torch.float64, device=x.device)
    total_weight = torch.empty(count, dtype=torch.float64, device=x.device)
    extension.module.kmeans_update(
        address(x), extension.dtype_code(x.dtype), count, d, address(order), address(offsets), address(piece_offsets),
        pieces, address(weights), address(partial), address(partial_weight), address(sums), address(total_weight),
        *extension.where(x),
    )  # fmt: skip
    return sums, total_weight

"""The rows of a k-means fit, read in chunks on the computing device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ccl_fast.checks import check_finite
from ccl_fast.clustering.shards import Whole
from ccl_fast.ops.kmeans.assign import Metric, Rows, prepare_rows
from ccl_fast.ops.kmeans.distance import center_distance
from ccl_fast.ops.kmeans.update import sum_by_cluster
from ccl_fast.ops.normalize import normalize_rows
from ccl_fast.ops.precision import accumulation_dtype

if TYPE_CHECKING:
    from ccl_fast.ops.backends import KMeansBackend

# Entries of a block whose moments are taken at once: on a CPU it should stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 18, 1 << 26


class Chunk(NamedTuple):
    """Some rows of every problem, on the computing device."""

    part: slice  # of the rows
    x: Tensor  # [problems, rows, d]
    rows: Rows  # x, prepared for assignments
    sum_weight: Tensor | None  # [problems, rows], of a row in its cluster's sum; None is 1


class Sweep(NamedTuple):
    """What one pass over the rows finds for given centres; of the rows of all processes, but for the labels."""

    labels: Tensor  # int64 [problems, n], of the own rows
    sums: Tensor  # float64 [problems, k, d], of the rows of each cluster
    weights: Tensor  # float64 [problems, k]
    changed: Tensor  # int64 [problems], how many labels are not those of before
    rechecked: Tensor  # int64 [2], how many rows were in doubt, and how many of them were re-checked


class Data:
    """Rows [problems, n, d] and their weights [problems, n] (None is 1).

    A chunk is ``batch_size`` rows of every problem, brought to ``device`` when its turn comes; without ``batch_size``
    there is one chunk, which stays there, prepared for all assignments. For the cosine metric a row counts in its
    cluster's sum by its direction: its weight there is divided by its length, and no normalised copy is made.

    With the ``shards`` of several processes these rows are one of them, and what is found is of all of them. Then every
    method that is not said to be local is a collective.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Tensor | None,
        metric: Metric,
        batch_size: int | None,
        device: torch.device,
        backend: KMeansBackend,
        shards: Whole | None = None,
    ):
        self.x, self.device = x, device
        self.metric: Metric = metric
        self.backend: KMeansBackend = backend
        self.problems, self.n, self.d = x.shape
        self.shards = shards or Whole(self.n)
        self.dtype = accumulation_dtype(x)
        self.weights = self._weight_unit = None
        if weights is not None:  # at most 1, so that no sum overflows; clusters are the same for every unit of weight
            weights = weights.to(device).double()
            self._weight_unit = self.shards.largest(weights)
            self.weights = (weights / self._weight_unit).to(self.dtype)
        self._size = min(batch_size or self.n, self.n)

    def only(self, problem: int) -> Data:
        """Return the rows of one problem."""
        if self.problems == 1:
            return self
        one = slice(problem, problem + 1)
        weights = None if self.weights is None else self.weights[one]
        return Data(self.x[one], weights, self.metric, self._size, self.device, self.backend, self.shards)

    def chunks(self) -> Iterator[Chunk]:
        """Load the rows of this process chunk by chunk; none if there are no rows."""
        if self.x.numel() == 0:
            return
        if self._size == self.n:
            yield self._whole
            return
        for start in range(0, self.n, self._size):
            yield self._load(slice(start, min(start + self._size, self.n)))

    def sweep(self, centers: Tensor, before: Tensor | None = None) -> Sweep:
        """Assign every row to its nearest centre [problems, k, d], and sum the clusters' rows.

        ``before`` are labels [problems, n] to compare with.
        """
        labels, found = [], None
        for chunk in self.chunks():
            own, *here = self._sweep(chunk, centers)
            labels.append(own)
            found = here if found is None else [total.add_(more) for total, more in zip(found, here, strict=True)]
        labels = self._join(labels, torch.int64)
        changed = labels.new_zeros(self.problems) if before is None else (labels != before).sum(1)
        sums, weights, rechecked = found or self._nothing(centers)
        return Sweep(labels, *self.shards.sum(sums, weights, changed, rechecked))

    def nearest(self, centers: Tensor) -> Tensor:
        """Return the nearest centre of every row: int64 [problems, n]. Local."""
        return self._join([chunk.rows.nearest(centers)[0] for chunk in self.chunks()], torch.int64)

    def nearest_distance(self, centers: Tensor) -> Tensor:
        """Return the distance of every row to the nearest centre: [problems, n]. Local."""
        return self._distance(centers, lambda chunk: chunk.rows.nearest(centers)[0])

    def distance(self, centers: Tensor, labels: Tensor) -> Tensor:
        """Return the distance of every row to the centre of its label: [problems, n]. Local."""
        return self._distance(centers, lambda chunk: labels[:, chunk.part])

    def inertia(self, centers: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted sum of the distances, float64 [problems]."""
        distance = self.distance(centers, labels).double()
        weighted = (
            distance
            if self.weights is None or self._weight_unit is None
            else distance * self.weights * self._weight_unit
        )
        return self.shards.sum(weighted.sum(1))[0]

    def take(self, rows: Tensor) -> Tensor:
        """Return rows by number, [problems, m] -> [problems, m, d], as centres are: of length 1 for the cosine."""
        pairs = zip(self.x, rows.to(self.x.device), strict=True)
        taken = torch.stack([self.shards.place(numbers, lambda own, x=x: x[own]) for x, numbers in pairs])
        (taken,) = self.shards.sum(taken.to(self.device).to(self.dtype))
        return normalize_rows(taken) if self.metric == "cosine" else taken

    def largest(self) -> float:
        """Return the largest magnitude of all entries. Waits for the device."""
        own = [chunk.x.abs().amax().view(1, 1) for chunk in self.chunks()]
        nothing = torch.zeros(1, 1, dtype=self.x.dtype, device=self.device)
        return self.shards.largest(torch.cat([nothing, *own], 1)).item()

    def variance(self) -> Tensor:
        """Return the variance of every feature (for the cosine, of the directions), float64 [problems, d].

        Raises:
            ValueError: a row is not finite.
        """
        mean = self._mean(lambda x: x).to(self.dtype)[:, None]
        if not mean.isfinite().all():  # unless finite values overflowed
            with self.shards.together():
                for chunk in self.chunks():
                    check_finite("x", chunk.x)
        return self._mean(lambda x: (x - mean).double().square_())

    def _mean(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        entries = CPU_ENTRIES if self.device.type == "cpu" else DEVICE_ENTRIES
        dtype = torch.float64 if self.shards.wide else None
        total = torch.zeros(self.problems, self.d, dtype=torch.float64, device=self.device)
        with self.shards.together():  # the backend may refuse the rows, which it meets here first
            for chunk in self.chunks():
                for x in chunk.x.split(max(1, entries // (self.problems * self.d)), dim=1):
                    wide = x.to(self.dtype)
                    if self.metric == "cosine":
                        wide = normalize_rows(wide)
                    total += function(wide).sum(1, dtype=dtype).double()
        return self.shards.sum(total)[0] / self.shards.total

    def _sweep(self, chunk: Chunk, centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return labels, and of these rows the sums, the weights, and how many rows were in doubt and re-checked."""
        labels, rechecked = chunk.rows.nearest(centers)
        sums, weights = self._sum_by_cluster(chunk.x, labels, centers.shape[1], chunk.sum_weight)
        if self.metric == "cosine":  # the rows count in the sums by another weight than their own
            own = torch.ones_like(labels, dtype=self.dtype) if self.weights is None else self.weights[:, chunk.part]
            weights = self._sum_by_cluster(own[..., None], labels, centers.shape[1], None)[0][..., 0]
        return labels, sums, weights, rechecked

    def _nothing(self, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums, weights and the numbers of doubtful and re-checked rows where there are no rows."""
        sums = torch.zeros_like(centers, dtype=torch.float64)
        return sums, sums.sum(2), torch.zeros(2, dtype=torch.int64, device=centers.device)

    def _sum_by_cluster(self, x: Tensor, labels: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        return sum_by_cluster(x, labels, k, weights, self.backend, wide=self.shards.wide)

    def _join(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Join the chunks' [problems, rows]."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, 1) if parts else torch.empty(self.problems, self.n, dtype=dtype, device=self.device)

    def _distance(self, centers: Tensor, labels_of) -> Tensor:
        parts = [
            center_distance(chunk.x, centers, labels_of(chunk), metric=self.metric, backend=self.backend)
            for chunk in self.chunks()
        ]
        return self._join(parts, self.dtype)

    @cached_property
    def _whole(self) -> Chunk:
        return self._load(slice(0, self.n))

    def _load(self, part: slice) -> Chunk:
        x = self.x[:, part].to(self.device, non_blocking=True)
        weight = None if self.weights is None else self.weights[:, part]
        if self.metric == "cosine":
            length = torch.linalg.vector_norm(x, dim=2, dtype=torch.float64)  # the squares of float32 may overflow it
            # That of a subnormal length would overflow.
            inverse = torch.where(length > 0, 1 / length, 0.0).clamp(max=torch.finfo(self.dtype).max).to(self.dtype)
            weight = inverse if weight is None else weight * inverse
        return Chunk(part, x, prepare_rows(x, metric=self.metric, backend=self.backend), weight)

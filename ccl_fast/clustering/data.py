"""The rows of a k-means fit, read in chunks on the computing device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ccl_fast.ops.center_distance import center_distance
from ccl_fast.ops.kmeans_assign import Rows, prepare_rows
from ccl_fast.ops.kmeans_update import sum_by_cluster
from ccl_fast.ops.unit import unit
from ccl_fast.ops.validation import check_finite

# Entries of a block whose moments are taken at once: on a CPU it should stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 18, 1 << 26


class Chunk(NamedTuple):
    """Some rows of every problem, on the computing device."""

    part: slice  # of the rows
    x: Tensor  # [problems, rows, d]
    rows: Rows  # x, prepared for assignments
    sum_weight: Tensor | None  # [problems, rows], of a row in its cluster's sum; None is 1


class Sweep(NamedTuple):
    """What one pass over the rows finds for given centres."""

    labels: Tensor  # int64 [problems, n]
    sums: Tensor  # float64 [problems, k, d], of the rows of each cluster
    weights: Tensor  # float64 [problems, k]
    rechecked: Tensor  # how many rows were decided in higher precision


class Data:
    """Rows [problems, n, d] and their weights [problems, n] (None is 1).

    A chunk is ``batch_size`` rows of every problem, brought to ``device`` when its turn comes; without ``batch_size``
    there is one chunk, which stays there, prepared for all assignments. For the cosine metric a row counts in its
    cluster's sum by its direction: its weight there is divided by its length, and no normalised copy is made.
    """

    def __init__(
        self, x: Tensor, weights: Tensor | None, metric: str, batch_size: int | None, device: torch.device, backend: str
    ):
        self.x, self.metric, self.device, self.backend = x, metric, device, backend
        self.problems, self.n, self.d = x.shape
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.weights = self._weight_unit = None
        if weights is not None:  # at most 1, so that no sum overflows; clusters are the same for every unit of weight
            self._weight_unit = weights.amax(1, keepdim=True).double().to(device)
            self.weights = (weights.to(device).double() / self._weight_unit).to(self.dtype)
        self._size = min(batch_size or self.n, self.n)

    def only(self, problem: int) -> Data:
        """The rows of one problem."""
        if self.problems == 1:
            return self
        one = slice(problem, problem + 1)
        weights = None if self.weights is None else self.weights[one]
        return Data(self.x[one], weights, self.metric, self._size, self.device, self.backend)

    def chunks(self) -> Iterator[Chunk]:
        if self._size == self.n:
            yield self._whole
            return
        for start in range(0, self.n, self._size):
            yield self._load(slice(start, min(start + self._size, self.n)))

    def sweep(self, centers: Tensor) -> Sweep:
        """Assign every row to its nearest centre [problems, k, d], and sum the clusters' rows."""
        parts = []
        for chunk in self.chunks():
            labels, rechecked = chunk.rows.nearest(centers)
            sums, weights = sum_by_cluster(chunk.x, labels, centers.shape[1], chunk.sum_weight, self.backend)
            if self.metric == "cosine":
                weights = self._weight_by_cluster(chunk, labels, centers.shape[1])
            if parts:
                sums, weights = parts[-1].sums.add_(sums), parts[-1].weights.add_(weights)
            parts.append(Sweep(labels, sums, weights, rechecked))
        labels = torch.cat([part.labels for part in parts], 1) if len(parts) > 1 else parts[0].labels
        return parts[-1]._replace(labels=labels, rechecked=sum(part.rechecked for part in parts))

    def nearest(self, centers: Tensor) -> Tensor:
        """The nearest centre of every row: int64 [problems, n]."""
        labels = [chunk.rows.nearest(centers)[0] for chunk in self.chunks()]
        return torch.cat(labels, 1) if len(labels) > 1 else labels[0]

    def nearest_distance(self, centers: Tensor) -> Tensor:
        """Distance of every row to the nearest centre: [problems, n]."""
        return self._distance(centers, lambda chunk: chunk.rows.nearest(centers)[0])

    def distance(self, centers: Tensor, labels: Tensor) -> Tensor:
        """Distance of every row to the centre of its label: [problems, n]."""
        return self._distance(centers, lambda chunk: labels[:, chunk.part])

    def inertia(self, centers: Tensor, labels: Tensor) -> Tensor:
        """Weighted sum of the distances, float64 [problems]."""
        distance = self.distance(centers, labels).double()
        return (distance if self.weights is None else distance * self.weights * self._weight_unit).sum(1)

    def take(self, rows: Tensor) -> Tensor:
        """Rows by number, [problems, m] -> [problems, m, d], as centres are: of length 1 for the cosine."""
        home = rows.to(self.x.device)
        taken = torch.stack([x[r] for x, r in zip(self.x, home, strict=True)]).to(self.device).to(self.dtype)
        return unit(taken) if self.metric == "cosine" else taken

    def variance(self) -> Tensor:
        """Of every feature (of the rows' directions for the cosine metric), float64 [problems, d].

        Raises:
            ValueError: a row is not finite.
        """
        mean = self._mean(lambda x: x).to(self.dtype)[:, None]
        if not mean.isfinite().all():  # unless finite values overflowed
            for chunk in self.chunks():
                check_finite("x", chunk.x)
        return self._mean(lambda x: (x - mean).double().square_())

    def _mean(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        entries = CPU_ENTRIES if self.device.type == "cpu" else DEVICE_ENTRIES
        total = torch.zeros(self.problems, self.d, dtype=torch.float64, device=self.device)
        for chunk in self.chunks():
            for x in chunk.x.split(max(1, entries // (self.problems * self.d)), dim=1):
                wide = x.to(self.dtype)
                total += function(unit(wide) if self.metric == "cosine" else wide).sum(1).double()
        return total / self.n

    def _weight_by_cluster(self, chunk: Chunk, labels: Tensor, k: int) -> Tensor:
        """Where the rows count in the sums by another weight than their own."""
        weights = torch.ones_like(labels, dtype=self.dtype) if self.weights is None else self.weights[:, chunk.part]
        return sum_by_cluster(weights[..., None], labels, k, None, self.backend)[0][..., 0]

    def _distance(self, centers: Tensor, labels_of) -> Tensor:
        backend = "blocked" if self.backend == "reference" else self.backend
        parts = [
            center_distance(chunk.x, centers, labels_of(chunk), metric=self.metric, backend=backend)
            for chunk in self.chunks()
        ]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

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

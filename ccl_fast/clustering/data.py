"""Passes over the rows of a k-means fit, chunk by chunk on the computing device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ccl_fast.checks import check_finite
from ccl_fast.clustering.shards import Shards
from ccl_fast.distributed import NO_GROUP
from ccl_fast.ops.kmeans.assign import Metric, Rows, prepare_rows
from ccl_fast.ops.kmeans.distance import center_distance
from ccl_fast.ops.kmeans.update import Sums
from ccl_fast.ops.kmeans.update_blocked import KEPT_ENTRIES
from ccl_fast.ops.normalize import normalize_rows
from ccl_fast.ops.precision import accumulation_dtype

if TYPE_CHECKING:
    from ccl_fast.ops.backends import KMeansBackend

# Entries of a block whose moments are taken at once: on a CPU it should stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 16, 1 << 26


@dataclass
class Chunk:
    """Some rows of every problem, on the computing device."""

    part: slice  # of the rows
    x: Tensor  # [problems, rows, d]
    weight: Tensor | None  # [problems, rows]; None is 1
    sum_weight: Tensor | None  # likewise, of a row in its cluster's sum
    metric: Metric
    backend: KMeansBackend

    @cached_property
    def rows(self) -> Rows:
        """The rows prepared for assignments, which not every pass needs."""
        return prepare_rows(self.x, metric=self.metric, backend=self.backend)

    @cached_property
    def sums(self) -> Sums:
        """The rows to be summed by cluster."""
        return Sums(self.x, self.sum_weight, self.weight, self.backend)

    def times(self, starts: int) -> Chunk:
        """Return the rows of the one problem as those of several, which share what is prepared."""
        x, weight, sum_weight = (_times(rows, starts) for rows in (self.x, self.weight, self.sum_weight))
        several = replace(self, x=x, weight=weight, sum_weight=sum_weight)
        several.rows, several.sums = self.rows, self.sums
        return several


class Sweep(NamedTuple):
    """Result of a pass over the rows with given centres; all but the labels is of the rows of all processes."""

    labels: Tensor  # int64 [problems, n], of the own rows
    sums: Tensor  # float64 [problems, k, d], of the rows of each cluster
    weights: Tensor  # float64 [problems, k]
    changed: Tensor  # int64 [problems], how many labels are not those of before
    rechecked: Tensor  # int64 [2], how many rows were in doubt, and how many of them were re-checked


class Data:
    """Rows [problems, n, d], their weights [problems, n] (None is 1), and labels that are fixed (below 0: free).

    A chunk is ``batch_size`` rows of every problem, brought to ``device`` when its turn comes; without ``batch_size``
    there is one chunk, which stays there, prepared for all assignments. For the cosine metric a row counts in its
    cluster's sum by its direction: its weight there is divided by its length, and no normalised copy is made.

    With a group, these rows are a shard of those of all its processes, and results are those of all of them: every
    method whose docstring does not say "Local" is a collective.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Tensor | None,
        metric: Metric,
        batch_size: int | None,
        device: torch.device,
        backend: KMeansBackend,
        shards: Shards | None = None,
        fixed: Tensor | None = None,
    ):
        self.x, self.device = x, device
        self.metric: Metric = metric
        self.backend: KMeansBackend = backend
        self.problems, self.n, self.d = x.shape
        self.shares_rows = False  # whether all problems have the same rows
        self.shards = shards or Shards(NO_GROUP, [self.n])
        self.group = self.shards.group
        self.dtype = accumulation_dtype(x)
        self.fixed = None if fixed is None else fixed.to(device).clamp(min=-1)
        self.weights = self._weight_unit = None
        if weights is not None:  # at most 1, so that no sum overflows; clusters are the same for every unit of weight
            weights = weights.to(device).double()
            largest = weights.amax(1, keepdim=True) if self.n else weights.new_zeros(self.problems, 1)
            self._weight_unit = self.group.max(largest)
            self.weights = (weights / self._weight_unit).to(self.dtype)
        self._size = min(batch_size or self.n, self.n)
        self._whole: Chunk | None = None  # all rows, once they are loaded, if they make one chunk

    def only(self, problem: int) -> Data:
        """Return the rows of one problem."""
        if self.problems == 1:
            return self
        one = slice(problem, problem + 1)
        weights, fixed = (None if rows is None else rows[one] for rows in (self.weights, self.fixed))
        return Data(self.x[one], weights, self.metric, self._size, self.device, self.backend, self.shards, fixed)

    def starts_at_once(self, k: int) -> int:
        """Return how many starts of k clusters can go on together: several for few rows of one problem on a CPU."""
        if self.problems > 1 or not self.group.is_null or self._size < self.n or not next(self.chunks()).sums.are_few:
            return 1
        return max(1, KEPT_ENTRIES // max(self.n, k * self.d))

    def times(self, starts: int) -> Data:
        """Return the one problem as several, which differ in their centres alone."""
        several = copy.copy(self)
        several.problems, several.shares_rows = starts, starts > 1
        several.x, several.weights, several.fixed = (_times(x, starts) for x in (self.x, self.weights, self.fixed))
        several._whole = next(self.chunks()).times(starts)
        return several

    def chunks(self) -> Iterator[Chunk]:
        """Load the rows of this process chunk by chunk; none if there are no rows."""
        if self.x.numel() == 0:
            return
        if self._size == self.n:
            self._whole = self._whole or self._load(slice(0, self.n))
            yield self._whole
            return
        for start in range(0, self.n, self._size):
            yield self._load(slice(start, min(start + self._size, self.n)))

    def sweep(self, centers: Tensor, before: Tensor | None = None) -> Sweep:
        """Assign every row to its nearest centre [problems, k, d], or by its fixed label, and sum the clusters' rows.

        ``before`` are labels [problems, n] to compare with.
        """
        k, labels, found = centers.shape[1], [], None
        for chunk in self.chunks():
            own, rechecked = chunk.rows.nearest(centers)
            if self.fixed is not None:
                fixed = self.fixed[:, chunk.part]
                own = torch.where(fixed < 0, own, fixed)
            labels.append(own)
            here = *chunk.sums.by_cluster(own, k), rechecked
            found = here if found is None else tuple(a.add_(b) for a, b in zip(found, here, strict=True))
        if found is None:  # no rows
            sums = torch.zeros_like(centers, dtype=torch.float64)
            found = sums, sums.sum(2), torch.zeros(2, dtype=torch.int64, device=centers.device)
        labels = self._join(labels, torch.int64)
        changed = labels.new_zeros(self.problems) if before is None else (labels != before).sum(1)
        sums, weights, rechecked = found
        return Sweep(labels, *self.group.sums(sums, weights, changed, rechecked))

    def labelled_means(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the means of the rows of each fixed label, as centres are, [problems, k, d], and these rows' weights.

        The weights are float64 [problems, k]; without weight a mean is 0.
        """
        assert self.fixed is not None
        sums = torch.zeros(self.problems, k + 1, self.d, dtype=torch.float64, device=self.device)
        weights = torch.zeros_like(sums[..., 0])
        for chunk in self.chunks():
            here = chunk.sums.by_cluster(self.fixed[:, chunk.part] + 1, k + 1)  # the first: of free rows
            sums, weights = sums + here[0], weights + here[1]
        sums, weights = (x[:, 1:] for x in self.group.sums(sums, weights))
        means = sums / weights.where(weights > 0, 1.0)[..., None]
        return (normalize_rows(means) if self.metric == "cosine" else means).to(self.dtype), weights

    def nearest(self, centers: Tensor) -> Tensor:
        """Return the nearest centre of every row: int64 [problems, n]. Local."""
        return self._join([chunk.rows.nearest(centers)[0] for chunk in self.chunks()], torch.int64)

    def distance(self, centers: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the distance of every row to the centre of its label, or to the nearest: [problems, n]. Local."""
        distances = []
        for chunk in self.chunks():
            own = chunk.rows.nearest(centers)[0] if labels is None else labels[:, chunk.part]
            distances.append(center_distance(chunk.x, centers, own, metric=self.metric, backend=self.backend))
        return self._join(distances, self.dtype)

    def doubts(self, centers: Tensor) -> Tensor:
        """Return how many rows are in doubt with these centres, and how many are re-checked: int64 [2]. Local."""
        return torch.stack([chunk.rows.nearest(centers)[1] for chunk in self.chunks()]).sum(0)

    def inertia(self, centers: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted sum of the distances, float64 [problems]."""
        distance = self.distance(centers, labels).double()
        weighted = (
            distance
            if self.weights is None or self._weight_unit is None
            else distance * self.weights * self._weight_unit
        )
        return self.group.sum(weighted.sum(1))

    def take(self, rows: Tensor) -> Tensor:
        """Return rows by number, [problems, m] -> [problems, m, d], as centres are: of length 1 for the cosine."""
        pairs = zip(self.x, rows.to(self.x.device), strict=True)
        taken = torch.stack([self.shards.place(numbers, lambda own, x=x: x[own]) for x, numbers in pairs])
        taken = self.group.sum(taken.to(self.device).to(self.dtype))
        return normalize_rows(taken) if self.metric == "cosine" else taken

    def largest(self) -> float:
        """Return the largest magnitude of all entries. Waits for the device."""
        nothing = torch.zeros((), dtype=self.x.dtype, device=self.device)
        own = torch.stack([nothing, *(chunk.x.abs().amax() for chunk in self.chunks())]).amax()
        return self.group.max(own.double()).item()

    def variance(self) -> Tensor:
        """Return the variance of every feature (for the cosine, of the directions), float64 [problems, d].

        Raises:
            ValueError: a row is not finite.
        """
        mean = self.mean().to(self.dtype)[:, None]
        if not mean.isfinite().all():  # unless finite values overflowed
            with self.group.together():
                for chunk in self.chunks():
                    check_finite("X", chunk.x)
        return self._moment(mean)

    def mean(self) -> Tensor:
        """Return the mean of the rows (for the cosine, of the directions), float64 [problems, d]."""
        return self._moment()

    def _moment(self, origin: Tensor | None = None) -> Tensor:
        """Return the mean of the rows, or of their squared differences from an origin, float64 [problems, d]."""
        entries = CPU_ENTRIES if self.device.type == "cpu" else DEVICE_ENTRIES
        total = torch.zeros(self.problems, self.d, dtype=torch.float64, device=self.device)
        with self.group.together():
            for chunk in self.chunks():
                if origin is None:
                    _ = chunk.rows  # the backend may refuse them, and here all processes learn of it
                for x in chunk.x.split(max(1, entries // (self.problems * self.d)), dim=1):
                    terms = x.to(self.dtype)
                    if self.metric == "cosine":
                        terms = normalize_rows(terms)
                    if origin is not None:
                        terms = (terms - origin).double().square_()
                    total += terms.sum(1, dtype=torch.float64)
        return self.group.sum(total) / self.shards.total

    def _join(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Join the chunks' [problems, rows]."""
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, 1) if parts else torch.empty(self.problems, self.n, dtype=dtype, device=self.device)

    def _load(self, part: slice) -> Chunk:
        x = self.x[:, part].to(self.device, non_blocking=True)
        weight = sum_weight = None if self.weights is None else self.weights[:, part]
        if self.metric == "cosine":
            length = torch.linalg.vector_norm(x, dim=2, dtype=torch.float64)  # the squares of float32 may overflow it
            # That of a subnormal length would overflow.
            inverse = torch.where(length > 0, 1 / length, 0.0).clamp(max=torch.finfo(self.dtype).max).to(self.dtype)
            sum_weight = inverse if weight is None else weight * inverse
        return Chunk(part, x, weight, sum_weight, self.metric, self.backend)


def _times(rows: Tensor | None, starts: int) -> Tensor | None:
    return None if rows is None else rows[:1].expand(starts, *rows.shape[1:])

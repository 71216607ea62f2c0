"""Lloyd's iterations."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ccl_fast.clustering import empty_clusters
from ccl_fast.clustering.data import Sweep
from ccl_fast.ops.normalize import normalize_rows

if TYPE_CHECKING:
    from ccl_fast.clustering.data import Data

# Starts whose inertia differs by less end in the same clusters, numbered otherwise: which is lower, rounding decides.
SAME_INERTIA = 1e-6
# Roundings of a mean direction, in units of the dtype's.
DIRECTION_ROUNDINGS = 4


class Solution(NamedTuple):
    """Solution of every problem; the labels are of this process's rows, and belong to the centres."""

    centers: Tensor  # [problems, k, d]
    labels: Tensor  # int64 [problems, n]
    inertia: Tensor  # float64 [problems]
    n_iter: Tensor  # int64 [problems]
    filled: Tensor  # int64 [problems], clusters that have rows
    rechecked: Tensor  # int64 [2], as in Sweep, of the last assignment of all problems

    def or_better(self, other: Solution) -> Solution:
        """Return problem by problem the solution with the lower inertia, the first where rounding decides."""
        better = other.inertia < (1 - SAME_INERTIA) * self.inertia

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(better.view(-1, *[1] * (mine.ndim - 1)), theirs, mine)

        rechecked = other.rechecked if better.all() else self.rechecked
        return Solution(*map(choose, self[:5], other[:5]), rechecked=rechecked)

    def each(self) -> list[Solution]:
        """Return the solutions of the problems one by one; `rechecked` is still that of all."""
        parts = zip(*(x.split(1) for x in self[:5]), strict=True)
        return [Solution(*part, rechecked=self.rechecked) for part in parts]


def lloyd(
    data: Data,
    centers: Tensor,
    *,
    max_iter: int,
    tol: float,
    variance: Tensor,
    empty_cluster: empty_clusters.Policy,
    progress,
) -> Solution:
    """Move the centres [problems, k, d] to the means of their clusters until they rest.

    A problem rests when no label changes, or when its centres' squared movement is at most ``tol`` times the mean of
    the ``variance`` [problems, d]. In the first case the iteration that would find it so counts too, as in
    scikit-learn. ``progress(changed)`` is called after every iteration with the number of labels that changed
    [problems].
    """
    variance = variance.nan_to_num(nan=0.0, posinf=0.0)  # of values near the end of their range
    tolerance = tol * variance.mean(1)
    deviation = variance.sqrt().to(centers.dtype)
    n_iter = torch.full((data.problems,), max_iter, device=data.device)
    moving = torch.ones(data.problems, dtype=torch.bool, device=data.device)
    any_moving = LateFlag(data.device)
    sweep, resting = data.sweep(centers), _Resting(data)
    for i in range(max_iter):
        new_centers = _update(data, centers, sweep, deviation, empty_cluster)
        new_sweep = data.sweep(new_centers, before=sweep.labels)
        movement = (new_centers - centers).square_().sum((1, 2), dtype=torch.float64)
        if any_moving.late or (data.problems > 1 and not data.shares_rows):  # problems at rest stay as they are
            keep = moving[:, None]
            new_centers = torch.where(keep[..., None], new_centers, centers)
            new_sweep = new_sweep._replace(
                labels=torch.where(keep, new_sweep.labels, sweep.labels),
                sums=torch.where(keep[..., None], new_sweep.sums, sweep.sums),
                weights=torch.where(keep, new_sweep.weights, sweep.weights),
            )
        centers, sweep = new_centers, new_sweep
        progress(new_sweep.changed)
        far = movement > tolerance
        go_on = far & (new_sweep.changed > 0)
        if not any_moving.late and go_on.all():  # most often
            continue
        count = far + (i + 1) if i + 1 < max_iter else max_iter
        n_iter = torch.where(moving & ~go_on, count, n_iter)
        moving = moving & go_on
        if not any_moving.read(moving.any()):
            break
        if data.shares_rows and not moving.all():
            data, centers, sweep, n_iter = resting.leave(moving, centers, sweep, n_iter)
            moving = moving[moving]
    data, centers, sweep, n_iter = resting.join(centers, sweep, n_iter)
    filled = (sweep.weights > 0).sum(1)
    return Solution(centers, sweep.labels, data.inertia(centers, sweep.labels), n_iter, filled, sweep.rechecked)


class _Resting:
    """Starts of one problem that rest, and need no further iterations, while others move."""

    def __init__(self, data: Data):
        self.data = data
        self.moving = torch.arange(data.problems, device=data.device)  # their numbers
        self.numbers, self.found = [], []

    def leave(
        self, moving: Tensor, centers: Tensor, sweep: Sweep, n_iter: Tensor
    ) -> tuple[Data, Tensor, Sweep, Tensor]:
        """Put aside those that do not move, and return the others."""
        self.numbers.append(self.moving[~moving])
        self.found.append(_choose(~moving, centers, sweep, n_iter))
        self.moving = self.moving[moving]
        return self.data.times(len(self.moving)), *_choose(moving, centers, sweep, n_iter)

    def join(self, centers: Tensor, sweep: Sweep, n_iter: Tensor) -> tuple[Data, Tensor, Sweep, Tensor]:
        """Return all, in their order."""
        if not self.found:
            return self.data, centers, sweep, n_iter
        order = torch.cat([*self.numbers, self.moving]).argsort()
        every = [*self.found, (centers, sweep, n_iter)]
        parts = [(c, *s[:4], i) for c, s, i in every]
        centers, *of_sweep, n_iter = (torch.cat(part)[order] for part in zip(*parts, strict=True))
        return self.data, centers, Sweep(*of_sweep, rechecked=sweep.rechecked), n_iter


def _choose(which: Tensor, centers: Tensor, sweep: Sweep, n_iter: Tensor) -> tuple[Tensor, Sweep, Tensor]:
    return centers[which], Sweep(*(x[which] for x in sweep[:4]), rechecked=sweep.rechecked), n_iter[which]


def _update(data: Data, centers: Tensor, sweep: Sweep, deviation: Tensor, empty_cluster: str) -> Tensor:
    if empty_cluster == "error":
        empty_clusters.check(sweep)
    elif empty_cluster == "farthest":
        sweep = empty_clusters.relocate_to_farthest(data, centers, sweep)
    if data.metric == "cosine":
        means, defined = normalize_rows(sweep.sums), (sweep.sums != 0).any(2)  # rows may cancel
    else:
        defined = sweep.weights > 0
        means = sweep.sums / sweep.weights[..., None]
    means = means.to(centers.dtype)
    complete = not means.is_cuda and bool(defined.all())  # asking would make a GPU wait
    if not complete:
        means = torch.where(defined[..., None], means, centers)
    # A mean that differs from the centre by its own rounding is that centre: of copies of a row it is that row.
    rounding = data.shards.total * 2.0**-53
    if data.metric == "cosine":
        rounding += DIRECTION_ROUNDINGS * torch.finfo(centers.dtype).eps
    if rounding > torch.finfo(centers.dtype).eps / 2:  # else less than the next number is away
        means = torch.where((means - centers).abs() <= rounding * centers.abs(), centers, means)
    if empty_cluster == "split":
        if not complete:
            means = empty_clusters.split(means, sweep.weights, deviation)
        if data.metric == "cosine":
            means = normalize_rows(means)
    return means


class LateFlag:
    """A flag computed on the device, read without making it wait: on a GPU one call late.

    Until the first one has arrived, the answer is True.
    """

    def __init__(self, device: torch.device):
        self.late = device.type == "cuda"
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, flag: Tensor) -> bool:
        if not self.late:
            return bool(flag)
        arriving = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(flag.device))
        previous, self._pending = self._pending, (arriving, event)
        if previous is None:
            return True
        previous[1].synchronize()
        return bool(previous[0])

"""Choose starting centres: rows of the data, none of them twice, beside means of the labelled rows, if there are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ccl_fast.errors import ArgumentError
from ccl_fast.ops.matmul import factor_rounding
from ccl_fast.ops.normalize import normalize_rows
from ccl_fast.ops.precision import without_autocast

if TYPE_CHECKING:
    from ccl_fast.clustering.data import Data

# A row's chance to be drawn when only copies of chosen rows are left, next to nothing before.
LAST_RESORT = 1e-200
# Roundings of a distance, in units of the dtype's, below which a row counts as a copy of a centre.
ROUNDINGS = 16
# Given centres whose distances from all rows are computed at once.
GIVEN_AT_ONCE = 16
# Of rows of a single problem, their weights float64 [n], a number m, a generator, and centres [l, d] that there are
# already (None: none): the numbers of m rows.
RowChoice = Callable[["Data", Tensor, int, torch.Generator, Tensor | None], Tensor]


def starting_centers(data: Data, k: int, generators: list[torch.Generator], rows_of: RowChoice) -> Tensor:
    """Choose centres for every problem by ``rows_of``: [problems, k, d].

    Of clusters with labelled rows they are the means of these; the others are chosen beside them, of the free rows.
    """
    if data.fixed is None:
        rows = [rows_of(data.only(i), row_weights(data, i), k, of, None) for i, of in enumerate(generators)]
        return data.take(torch.stack(rows))
    centers, weights = data.labelled_means(k)
    for i, generator in enumerate(generators):
        free = row_weights(data, i) * (data.fixed[i] < 0)
        missing = (weights[i] == 0).nonzero()[:, 0]
        count, number = int(data.group.sum((free > 0).sum())), len(missing)
        if count < number:
            raise ArgumentError(f"labels: expected a free row for each of {number} unlabelled clusters, got {count}")
        if number:
            one, given = data.only(i), centers[i, weights[i] > 0]
            rows = rows_of(one, free, number, generator, given if len(given) else None)
            centers[i, missing] = one.take(rows[None])[0]
    return centers


def random_rows(data: Data, k: int, generators: list[torch.Generator]) -> Tensor:
    """Draw k different rows of every problem, without replacement by their weights: [problems, k, d]."""
    return starting_centers(data, k, generators, lambda one, weights, m, of, given: draw_distinct(one, weights, m, of))


def k_means_plus_plus(data: Data, k: int, generators: list[torch.Generator]) -> Tensor:
    """Choose centres by greedy k-means++ for every problem: [problems, k, d].

    For each centre 2 + log k rows are drawn with probability proportional to weight times distance from the centres
    before it; the one that leaves the smallest sum of weights times distances becomes a centre. Papers: Arthur and
    Vassilvitskii, "k-means++: the advantages of careful seeding", 2007; Bhattacharya, Eube, Röglin, Schmidt, "Noisy,
    greedy and not so greedy k-means++", 2020.
    """
    return starting_centers(data, k, generators, greedy_rows)


def greedy_rows(one: Data, weights: Tensor, k: int, generator: torch.Generator, given: Tensor | None = None) -> Tensor:
    """Return the numbers of the rows, [k], of a single problem with weights float64 [n].

    The host learns nothing on the way, so that it never waits for a GPU.

    Args:
        given: centres that there are already, [m, d]; the first row is then chosen as the others are.
    """
    shards, distances = one.shards, Distances(one)
    chosen = draw_distinct(one, weights, 0 if given is not None else 1, generator)
    share = torch.rand(k, 2 + int(math.log(k)), dtype=torch.float64, generator=generator, device="cpu").to(one.device)
    every, last_resort = [chosen], LAST_RESORT * weights
    of_sum = None if one.weights is None and given is None else weights.to(distances.dtype)
    potential = distances.to_nearest(one.take(chosen[None])[0] if given is None else given)
    for shares in share[len(chosen) :]:
        # Copies of a centre have no distance but for rounding, and the centre itself has no last resort either.
        potential = torch.where(potential > distances.rounding, potential, 0.0)
        own = shards.local(chosen)
        potential.index_fill_(0, own, 0.0)
        last_resort.index_fill_(0, own, 0.0)
        cumulative = torch.addcmul(last_resort, potential.double(), weights).cumsum_(0)
        candidates = shards.draw(cumulative, shards.ends(cumulative), shares)
        potentials = torch.minimum(distances.to(one.take(candidates[None])[0]), potential)
        sums = potentials.sum(1) if of_sum is None else potentials @ of_sum
        best = one.group.sum(sums).argmin(0, keepdim=True)
        chosen, potential = candidates[best], potentials[best][0]
        every.append(chosen)
    return torch.cat(every)


class Distances:
    """Distances of all rows of a single problem to a few at a time, by one product of matrices.

    A row x and a centre c get columns more, so that the product is the distance: ``[x, |x|^2, 1] [-2c, 1, |c|^2]`` or,
    of unit vectors, ``[x, 1] [-c, 1]``. Rows are moved to their mean, and scaled so that no square overflows. All is
    float64 where torch rounds the factors of float32 products, and with a group: how float32 rounds may depend on
    where in a matrix a row is, and so on the shards.

    Attributes:
        rounding: a distance that is rounding alone, of every row: [n].
    """

    def __init__(self, one: Data):
        in_float32 = one.group.is_null and not factor_rounding(one.device, one.dtype)
        self.one, self.dtype = one, one.dtype if in_float32 else torch.float64
        self._euclidean = one.metric == "euclidean"
        self._rows: Tensor | None = None  # of all chunks, if there is one
        eps = torch.finfo(self.dtype).eps
        if not self._euclidean:
            self.rounding = torch.full((one.n,), ROUNDINGS * eps, dtype=self.dtype, device=one.device)
            return
        largest = [torch.zeros((), device=one.device), *(chunk.x.abs().amax() for chunk in one.chunks())]
        exponent = torch.frexp(one.group.max(torch.stack(largest).amax().to(self.dtype))).exponent
        most = 1021 if self.dtype == torch.float64 else 125
        self._scale = torch.exp2(-1 - exponent.clamp(-most, most).to(self.dtype))
        # The mean of huge values overflows; any origin is right.
        self._origin = one.mean()[0].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(self.dtype) * self._scale
        square = [self._placed(chunk.x[0]).square_().sum(1) for chunk in one.chunks()]
        self.rounding = ROUNDINGS * eps * (torch.cat(square) if square else self._origin.new_zeros(0))

    def to(self, centers: Tensor) -> Tensor:
        """Return the distances [m, n] to centres [m, d]; scaled, for the Euclidean ones."""
        c = self._placed(centers)
        one = torch.ones_like(c[:, :1])
        columns = [-2 * c, one, c.square().sum(1, keepdim=True)] if self._euclidean else [-c, one]
        c = torch.cat(columns, 1)
        with without_autocast(self.one.device):
            parts = [c @ rows.mT for rows in self._every()]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, 1) if parts else c.new_zeros(len(c), 0)

    def to_nearest(self, centers: Tensor) -> Tensor:
        """Return the distances [n] to the nearest of centres [m, d]."""
        return functools.reduce(torch.minimum, (self.to(some).amin(0) for some in centers.split(GIVEN_AT_ONCE)))

    def _placed(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return (x * self._scale).sub_(self._origin) if self._euclidean else normalize_rows(x)

    def _every(self):
        if self._rows is not None:
            yield self._rows
            return
        for chunk in self.one.chunks():
            x = self._placed(chunk.x[0])
            one = torch.ones_like(x[:, :1])
            rows = torch.cat([x, x.square().sum(1, keepdim=True), one] if self._euclidean else [x, one], 1)
            if len(rows) == self.one.n:
                self._rows = rows
            yield rows


def row_weights(data: Data, problem: int) -> Tensor:
    """Return the weights of a problem's rows, float64 [n]."""
    if data.weights is None:
        return torch.ones(data.n, dtype=torch.float64, device=data.device)
    return data.weights[problem].double()


def draw_distinct(data: Data, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw the numbers of ``count`` different rows, one after the other with probabilities proportional to the weights.

    The rows whose exponential clocks, of rates ``weights``, ring first (Efraimidis and Spirakis, 2006).
    """
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=weights.device)
    uniform = data.shards.uniform(generator).to(weights.device)
    clocks = (-torch.log1p(-uniform) / weights).nan_to_num(nan=torch.inf)
    return data.shards.topk(clocks, count, largest=False)[1]

"""Plain k-means++ by rejection sampling: a pass over the rows for many centres."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ccl_fast.clustering.seeding import draw_distinct, starting_centers

if TYPE_CHECKING:
    from ccl_fast.clustering.data import Data

# Candidates that are drawn at once; at the start as many as there are centres.
MIN_CANDIDATES, MAX_CANDIDATES = 8, 256


def plain_k_means_plus_plus(data: Data, k: int, generators: list[torch.Generator]) -> Tensor:
    """Choose centres by plain k-means++ for every problem: [problems, k, d].

    Each centre is a row drawn with probability proportional to its weight times its distance from the centres before
    it. One pass over the data for each centre would cost as much as many iterations, so candidates are drawn many at a
    time from the distances of the last pass; the next candidate is accepted with probability (its distance now) /
    (its distance then). That is rejection sampling of just the distribution that one pass for each centre would have,
    and a pass is needed only once for many centres. Papers: Arthur and Vassilvitskii, "k-means++: the advantages of
    careful seeding", 2007; Cohen-Addad et al., "Fast and accurate k-means++ via rejection sampling", 2020.
    """
    return starting_centers(data, k, generators, plus_plus_rows)


def plus_plus_rows(
    one: Data, weights: Tensor, k: int, generator: torch.Generator, given: Tensor | None = None
) -> Tensor:
    """Return the numbers of the rows, [k], of a single problem with weights float64 [n].

    Every process has the distances of its own rows, and all draw the same candidates.

    Args:
        given: centres that there are already, [m, d]; the first row is then chosen as the others are.
    """
    shards = one.shards

    def potential_to(centers: Tensor) -> Tensor:
        # Distances that overflow float32 count as very large ones, whose sum is finite.
        return (weights * one.distance(centers)[0]).clamp(max=torch.finfo(torch.float64).max / shards.total)

    chosen = draw_distinct(one, weights, 0 if given is not None else 1, generator)
    potential = potential_to(one.take(chosen[None]) if given is None else given[None])
    while len(chosen) < k:
        potential[shards.local(chosen)] = 0.0
        cumulative = potential.cumsum(0)
        ends = shards.ends(cumulative)
        if not ends[-1] > 0:  # only copies of chosen rows are left: any of them, but none twice
            free = weights.index_fill(0, shards.local(chosen), 0.0)
            return torch.cat([chosen, draw_distinct(one, free, k - len(chosen), generator)])
        count = min(MAX_CANDIDATES, max(MIN_CANDIDATES, len(chosen)))
        draw = torch.rand(2, count, dtype=torch.float64, generator=generator, device="cpu")
        candidates = shards.draw(cumulative, ends, draw[0].to(one.device))
        rows = one.take(candidates[None])
        then, weight = _of(candidates, one, potential, weights)
        among = weight[:, None] * _pairwise(rows[0], one.metric)
        among[candidates[:, None] == candidates] = 0.0  # a row drawn twice, whatever the rounding of its cosine
        accepted = _accept(then.cpu().numpy(), among.cpu().numpy(), draw[1].numpy(), k - len(chosen))
        if not accepted:
            continue
        accepted = torch.tensor(accepted, device=one.device)
        chosen = torch.cat([chosen, candidates[accepted]])
        if len(chosen) < k:
            potential = torch.minimum(potential, potential_to(rows[:, accepted]))
    return chosen


def _accept(then: np.ndarray, among: np.ndarray, draw: np.ndarray, max_accepted: int) -> list[int]:
    """Choose candidates to accept, one after the other: each by its potential after those accepted before it.

    then [m]: the potentials they were drawn by; among [m, m]: that of each if only the other were a centre.
    """
    now = then.copy()
    accepted: list[int] = []
    for i in range(len(then)):
        if draw[i] * then[i] < now[i] and len(accepted) < max_accepted:
            accepted.append(i)
            now = np.minimum(now, among[:, i])
    return accepted


def _pairwise(rows: Tensor, metric: str) -> Tensor:
    """Return the distances between rows, float64 [m, m]."""
    rows = rows.double()
    if metric == "cosine":
        return (1 - rows @ rows.T).clamp_(min=0)
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square_()


def _of(rows: Tensor, one: Data, *values: Tensor) -> tuple[Tensor, ...]:
    """Return the entries of each of the values [n] at the rows [m], wherever these are."""
    return one.group.sums(*(one.shards.place(rows, lambda own, x=x: x[own]) for x in values))

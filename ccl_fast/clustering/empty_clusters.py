"""Treat clusters that no row is nearest to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ccl_fast.clustering.data import Data, Sweep

Policy = Literal["split", "farthest", "keep", "error"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
# How far "split" puts the new centre from the old one, in standard deviations of the data.
SPLIT_DISTANCE = 1 / 64


def check(sweep: Sweep) -> None:
    """Raise an error if a cluster is empty (policy "error"). Waits for the device."""
    empty = (sweep.weights == 0).nonzero()[:, 1]
    if len(empty):
        raise RuntimeError(f"{len(empty)} empty clusters, the first of them {int(empty[0])}; see empty_cluster")


def split(centers: Tensor, weights: Tensor, deviation: Tensor) -> Tensor:
    """Move every empty centre [problems, k, d] beside that of a large cluster, the largest first.

    Beside is: a little along the diagonal of the data's standard deviations [problems, d]. The large cluster's own
    centre stays, so no row's distance to its nearest centre grows.
    """
    empty = weights == 0
    if not (empty.is_cuda or empty.any()):  # asking would make a GPU wait
        return centers
    largest = weights.argsort(dim=1, descending=True, stable=True)
    donor = largest.gather(1, (empty.cumsum(1) - 1).clamp(min=0))
    sign = 1 - 2 * (torch.arange(centers.shape[2], device=centers.device) % 2)
    beside = centers.gather(1, donor[..., None].expand_as(centers)) + SPLIT_DISTANCE * (sign * deviation[:, None])
    usable = empty & (weights.gather(1, donor) > 0)
    return torch.where(usable[..., None], beside, centers)


def relocate_to_farthest(data: Data, centers: Tensor, sweep: Sweep) -> Sweep:
    """Let every empty cluster take over one of the rows farthest from their own centres. Waits for the device.

    Returns the sweep with the sums and weights after that; the labels stay as they are.
    """
    empty = sweep.weights == 0
    if not empty.any():
        return sweep
    shards, k = data.shards, centers.shape[1]
    # A cosine of rows of one direction is off by the rounding of a direction squared, or of a sum.
    on_center = 2 * torch.finfo(centers.dtype).eps ** 2 + 2.0**-50 if data.metric == "cosine" else 0.0
    sums, weights = sweep.sums.clone(), sweep.weights.clone()
    own_weights = torch.ones_like(sweep.labels, dtype=torch.float64) if data.weights is None else data.weights.double()
    held = own_weights == 0 if data.fixed is None else (own_weights == 0) | (data.fixed >= 0)
    distance = data.distance(centers, sweep.labels).masked_fill(held, 0.0)  # those fill no cluster
    for problem in empty.any(1).nonzero()[:, 0].tolist():
        labels, row_weights = sweep.labels[problem], own_weights[problem]
        clusters = empty[problem].nonzero()[:, 0]
        far, rows = shards.topk(distance[problem], len(clusters), largest=True)
        rows = rows[far > on_center]  # fewer if there are fewer distinct rows than clusters
        taken = data.only(problem).take(rows[None])[0].double()
        previous, weight, size = data.group.sums(
            shards.place(rows, lambda own, labels=labels: labels[own]),
            shards.place(rows, lambda own, row_weights=row_weights: row_weights[own]),
            labels[row_weights > 0].bincount(minlength=k),
        )
        size = size.tolist()
        for cluster, left, w, x in zip(clusters.tolist(), previous.tolist(), weight, taken, strict=False):
            sums[problem, cluster], weights[problem, cluster] = w * x, w
            size[left] -= 1
            # An emptied cluster has neither weight nor sum, not the rounding of a difference.
            sums[problem, left] = sums[problem, left] - w * x if size[left] else 0.0
            weights[problem, left] = weights[problem, left] - w if size[left] else 0.0
    return sweep._replace(sums=sums, weights=weights)

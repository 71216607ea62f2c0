"""What a k-means run is judged by: labels against those of float64 by definition, centres, inertia."""

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.clustering.cases import CASES, Rows
from benchmarks.clustering.contenders import KMeansContender
from benchmarks.harness.contender import Size
from benchmarks.losses.correctness import ROWS
from ccl_fast.ops.kmeans.assign import prepare_rows
from ccl_fast.ops.kmeans.distance import center_distance
from ccl_fast.ops.kmeans.update import kmeans_update

CLUSTERS = 64  # at most, where a contender is admitted
# Differences in float64 that the truth of one size may take; beyond, it has evenly spaced rows only.
CPU_WORK, DEVICE_WORK = 1 << 34, 1 << 37


class Truth(NamedTuple):
    """Exactly nearest given centres of some rows, from all float64 differences."""

    rows: Tensor  # [checked]
    labels: Tensor  # int64 [checked]

    def wrong_labels(self, labels: Tensor) -> int:
        return int((labels[self.rows] != self.labels).sum())


def truth(inputs: Rows) -> Truth:
    x, centers = inputs
    limit = CPU_WORK if x.device.type == "cpu" else DEVICE_WORK
    rows = torch.arange(0, len(x), -(-len(x) * centers.numel() // limit), device=x.device)
    nearest = prepare_rows(x[rows][None], metric="euclidean", backend="reference").nearest(centers[None].float())[0]
    return Truth(rows, nearest[0])


def inertia(x: Tensor, centers: Tensor) -> float:
    """Sum in float64 of the squared distances from the nearest of these centres."""
    centers = centers.float()[None]
    labels = prepare_rows(x[None], metric="euclidean", backend="blocked").nearest(centers)[0]
    return sum(
        center_distance(x[None, part].double(), centers.double(), labels[:, part], metric="euclidean").sum().item()
        for part in torch.arange(len(x), device=x.device).split(1 << 16)
    )


def relative_error(contender: KMeansContender, size: Size, device: torch.device) -> float:
    """Of labels and centres of an iteration on at most 2048 rows: at a near tie any of the nearest is right.

    The larger of (squared distance from the chosen centre - from the nearest) / (that from the nearest), and of the
    relative error of the new centres, in the 2-norm, as means of the chosen labels' rows. For ours, a label that is
    not exactly the nearest is an infinite error.
    """
    small = replace(size, n=min(size.n, ROWS), clusters=min(size.clusters, CLUSTERS))
    return _relative_error(contender, small, device)


@functools.cache
def _relative_error(contender: KMeansContender, size: Size, device: torch.device) -> float:
    case = CASES["k-means iteration"]
    x, centers = inputs = case.inputs(size, device, seed=1)
    nearest, chosen = truth(inputs).labels, contender.assign(x, centers)
    if contender.ours and not chosen.equal(nearest):
        return float("inf")

    def distance(labels: Tensor) -> Tensor:
        return (x.double() - centers.double()[labels]).square().sum(1)

    lowest = distance(nearest)
    excess = ((distance(chosen) - lowest) / lowest.clamp(min=lowest.mean())).max()
    sums, sizes = kmeans_update(x.double(), chosen, len(centers), backend="reference")
    means = sums / sizes[:, None]
    of_centers = (contender.build(case)(inputs).centers.double() - means).norm() / means.norm()
    return torch.stack([excess, of_centers]).amax().nan_to_num(nan=torch.inf).item()

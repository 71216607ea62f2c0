"""Distances of rows to centres by the CPU extension, where they are sums of squares."""

import torch
from torch import Tensor

from ccl_fast.kernels import cpu_extension
from ccl_fast.kernels.extension import address
from ccl_fast.ops.kmeans import distance_blocked
from ccl_fast.ops.kmeans.update_cpu import ENTRIES
from ccl_fast.ops.threads import for_each_block


def center_distance(x: Tensor, centers: Tensor, labels: Tensor, metric: str) -> Tensor:
    """As `distance.center_distance`."""
    if metric != "euclidean":
        return distance_blocked.center_distance(x, centers, labels, metric)
    cpu, (problems, n, d) = cpu_extension.best(), x.shape
    distance = torch.empty(labels.shape, dtype=centers.dtype, device=x.device)
    centers, labels = centers.contiguous(), labels.contiguous()
    for problem in range(problems):

        def work(part: slice, problem: int = problem) -> None:
            rows = cpu_extension.rows_of(x[problem, part])
            cpu.distance(
                address(rows), rows.stride(0), len(rows), d, address(centers[problem]), address(labels[problem, part]),
                address(distance[problem, part]),
            )  # fmt: skip

        for_each_block(n, max(1, ENTRIES // d), work, x.device)
    return distance

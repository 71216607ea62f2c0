"""The distance of every row to the centre of its cluster."""

import torch
from torch import Tensor

from ccl_fast.kernels import extension
from ccl_fast.kernels.extension import address
from ccl_fast.ops.backends import choose_backend
from ccl_fast.ops.normalize import unit
from ccl_fast.ops.threads import for_each_block

BACKENDS = {"cuda": extension.obstacles, "blocked": lambda device, dtype: []}

# Largest number of entries of one block of differences: on a CPU it should stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 16, 1 << 26


def center_distance(x: Tensor, centers: Tensor, labels: Tensor, *, metric: str, backend: str = "auto") -> Tensor:
    """``|x - c|^2`` or ``1 - cos(x, c)`` (1 if either is zero), from differences, so that nothing cancels.

    x [problems, rows, d], centers [problems, k, d] in float32 (float64 for float64 x), labels int64 [problems, rows]
    -> [problems, rows] in the dtype of centers.
    """
    if choose_backend("center_distance", BACKENDS, backend, x.device, x.dtype) == "cuda":
        if len(x) > extension.MOST_PROBLEMS:
            raise ValueError(f"x: expected at most {extension.MOST_PROBLEMS} problems, got {len(x)}")
        x, centers, labels = x.contiguous(), centers.contiguous(), labels.contiguous()
        distance = torch.empty(labels.shape, dtype=torch.float32, device=x.device)
        extension.module.kmeans_distance(
            address(x), extension.dtype_code(x.dtype), address(centers), address(labels),
            x.shape[0], x.shape[1], centers.shape[1], x.shape[2], extension.metric_code(metric), address(distance),
            *extension.where(x),
        )  # fmt: skip
        return distance
    size = max(1, (CPU_ENTRIES if x.device.type == "cpu" else DEVICE_ENTRIES) // max(1, x.shape[2]))
    distance = torch.empty(labels.shape, dtype=centers.dtype, device=x.device)
    for problem in range(len(x)):

        def work(part: slice, problem: int = problem) -> None:
            nearest = centers[problem][labels[problem, part]]
            distance[problem, part] = _distance(x[problem, part].to(centers.dtype), nearest, metric)

        for_each_block(x.shape[1], size, work, x.device)
    return distance


def _distance(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    if metric == "euclidean":
        return (x - centers).square_().sum(1)
    return (1 - (unit(x.double()) * unit(centers.double())).sum(1)).clamp_(min=0)

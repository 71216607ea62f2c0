"""Distances of rows to centres by the CUDA extension."""

import torch
from torch import Tensor

from ccl_fast.errors import ArgumentError
from ccl_fast.kernels import extension
from ccl_fast.kernels.extension import address


def center_distance(x: Tensor, centers: Tensor, labels: Tensor, metric: str) -> Tensor:
    """As `distance.center_distance`."""
    if len(x) > extension.MAX_PROBLEMS:
        raise ArgumentError(f"x: expected at most {extension.MAX_PROBLEMS} problems, got {len(x)}")
    x, centers, labels = x.contiguous(), centers.contiguous(), labels.contiguous()
    distance = torch.empty(labels.shape, dtype=torch.float32, device=x.device)
    extension.compiled().kmeans_distance(
        address(x), extension.dtype_code(x.dtype), address(centers), address(labels),
        x.shape[0], x.shape[1], centers.shape[1], x.shape[2], extension.metric_code(metric), address(distance),
        *extension.where(x),
    )  # fmt: skip
    return distance

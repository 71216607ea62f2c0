"""The distance of every row to the centre of its cluster."""

from torch import Tensor

from ccl_fast.ops.backends import chosen_module


def center_distance(x: Tensor, centers: Tensor, labels: Tensor, *, metric: str, backend: str = "auto") -> Tensor:
    """``|x - c|^2`` or ``1 - cos(x, c)`` (1 if either is zero), from differences, so that nothing cancels.

    x [problems, rows, d], centers [problems, k, d] in float32 (float64 for float64 x), labels int64 [problems, rows]
    -> [problems, rows] in the dtype of centers.
    """
    module = chosen_module("center_distance", backend, x.device, x.dtype)
    return module.center_distance(x, centers, labels, metric)

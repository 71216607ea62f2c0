"""The assignment step of k-means: its contract and its backends."""

from typing import Literal, Protocol, get_args, overload

import torch
from torch import Tensor

from ccl_fast.checks import check_choice, check_finite, check_floating, check_same, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.backends import KMeansBackend, chosen_module
from ccl_fast.ops.kmeans.distance import center_distance
from ccl_fast.ops.precision import accumulation_dtype

Metric = Literal["euclidean", "cosine"]
METRICS: tuple[Metric, ...] = get_args(Metric)


class Rows(Protocol):
    """Rows [problems, rows, d], prepared once by a backend and then compared with many sets of centres."""

    def nearest(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Labels int64 [problems, rows] for centers [problems, k, d], and two numbers, int64 [2].

        These are how many rows the fast product left in doubt, and how many of them were re-checked, that is compared
        with all centres again.
        """
        ...


@overload
def kmeans_assign(
    x: Tensor,
    centers: Tensor,
    *,
    metric: Metric = "euclidean",
    backend: KMeansBackend = "auto",
    return_rechecked: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def kmeans_assign(
    x: Tensor,
    centers: Tensor,
    *,
    metric: Metric = "euclidean",
    backend: KMeansBackend = "auto",
    return_rechecked: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...


def kmeans_assign(
    x: Tensor,
    centers: Tensor,
    *,
    metric: Metric = "euclidean",
    backend: KMeansBackend = "auto",
    return_rechecked: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    r"""The nearest centre of every row, exactly, without the matrix of distances.

    .. math::
        y_i = \min \arg\min_k d(x_i, \mu_k), \qquad
        d(x, \mu) = |x - \mu|^2 \ \text{(euclidean)}, \quad 1 - \langle x, \mu \rangle / |x| |\mu| \ \text{(cosine)}

    The labels are those of distances in float64, and of several equal distances the lowest index, in every backend
    and dtype: a fast matrix product finds the label of most rows together with a bound of its own rounding error; the
    rows where that bound leaves a doubt are decided in higher precision. No gradient flows.

    Args:
        x: ``[n, d]``, or ``[b, n, d]`` for b independent problems; float64, float32, bfloat16 or float16, finite.
        centers: ``[k, d]`` or ``[b, k, d]``; the dtype of x, or float32 beside half precision.
        metric: "euclidean" or "cosine". The cosine with a zero row or centre is 0.
        backend: "auto", "cuda" or "cpu" (the extensions), "blocked" (plain torch, any device) or "reference" (dense,
            float64).
        return_rechecked: return also how many rows were in doubt, and how many of them were re-checked, that is
            compared with all centres again; the cuda backend decides most doubtful rows between two centres.

    Returns:
        ``labels`` int64 ``[n]`` (``[b, n]``) and ``distance``, the same shape, float32 (float64 for float64); with
        ``return_rechecked`` also these two numbers, int64 ``[2]``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or is not finite; the backend cannot run.
    """
    check_tensor("x", x)
    check_floating("x", x)
    check_tensor("centers", centers)
    if x.ndim not in (2, 3):
        raise ArgumentError(f"x: expected shape [rows, d] or [problems, rows, d], got {list(x.shape)}")
    expected = (*x.shape[:-2], centers.shape[-2] if centers.ndim > 1 else 0, x.shape[-1])
    if centers.shape != expected or not centers.shape[-2] or not x.shape[-1]:
        leading = "".join(f"{size}, " for size in x.shape[:-2])
        raise ArgumentError(f"centers: expected shape [{leading}at least 1, {x.shape[-1]}], got {list(centers.shape)}")
    compute_dtype = accumulation_dtype(x)
    if centers.dtype not in (x.dtype, compute_dtype):
        raise ArgumentError(f"centers: expected dtype {x.dtype} (that of x) or {compute_dtype}, got {centers.dtype}")
    check_same("centers", centers, "x", x, dtype=False)
    check_choice("metric", metric, METRICS)
    check_finite("x", x)
    check_finite("centers", centers)

    x, centers = x.detach(), centers.detach().to(compute_dtype)
    batched = x.ndim == 3
    if not batched:
        x, centers = x[None], centers[None]
    if x.shape[0] * x.shape[1] == 0:
        labels = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
        rechecked = torch.zeros(2, dtype=torch.int64, device=x.device)
    else:
        labels, rechecked = prepare_rows(x, metric=metric, backend=backend).nearest(centers)
    distance = center_distance(x, centers, labels, metric=metric, backend=backend)
    if not batched:
        labels, distance = labels[0], distance[0]
    return (labels, distance, rechecked) if return_rechecked else (labels, distance)


def prepare_rows(x: Tensor, *, metric: str, backend: str = "auto") -> Rows:
    """Rows [problems, rows, d], not empty and finite, made ready for ``nearest`` by the chosen backend."""
    return chosen_module("kmeans_assign", backend, x.device, x.dtype).Rows(x, metric)

"""NumPy in, NumPy out: what scikit-learn takes for rows becomes a tensor, and results become what the rows were."""

from __future__ import annotations

import warnings
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils import check_array
from torch import Tensor

from ccl_fast.checks import shown
from ccl_fast.errors import ArgumentError

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

# Others become the first of them.
ARRAY_DTYPES: Any = [np.float64, np.float32, np.float16]
# Of labels.
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def rows_of(X: Any, estimator: BaseEstimator) -> Tensor:
    """Check rows, and return them as [problems, rows, d], detached; those of an array are not copied if C has it so."""
    if isinstance(X, Tensor):
        if X.layout != torch.strided:
            raise ArgumentError(f"X: expected dense rows, got {X.layout}: X.to_dense() has them")
        if X.ndim not in (2, 3) or not X.is_floating_point() or X.element_size() < 2:
            expected = "a floating-point tensor [rows, d] or [problems, rows, d]"
            raise ArgumentError(f"X: expected {expected}, got {X.dtype} {list(X.shape)}")
        x = X.detach()
    else:
        batched = is_batched(X)
        # Whether all are finite the first pass over the rows tells.
        x = tensor_of(_array(X, "X", allow_nd=batched, estimator=estimator))
    return x if x.ndim == 3 else x[None]


def weights_of(sample_weight: Any, X: Any, rows: Tensor) -> Tensor | None:
    """Return the weights of rows [problems, rows, d], [problems, rows], not checked but for shape and dtype."""
    if sample_weight is None:
        return None
    shape = rows.shape[:2] if is_batched(X) else rows.shape[1:2]
    if isinstance(sample_weight, Real):
        return torch.full(rows.shape[:2], float(sample_weight), dtype=torch.float64, device=rows.device)
    weights = sample_weight
    if not isinstance(weights, Tensor):
        weights = tensor_of(_array(weights, "sample_weight", ensure_2d=False, allow_nd=True))
    if weights.shape != shape or not weights.is_floating_point():
        got = f"{weights.dtype} {list(weights.shape)}"
        raise ArgumentError(f"sample_weight: expected floating-point weights {list(shape)}, got {got}")
    return weights.detach() if weights.ndim == 2 else weights.detach()[None]


def labels_of(
    labels: Any, X: Any, rows: Tensor, n_clusters: int, limit: str = "n_clusters", name: str = "labels"
) -> Tensor | None:
    """Check labels of rows [problems, rows, d], and return them as int64 [problems, rows].

    Args:
        limit: what the number that they are below is called.
        name: what they are called.
    """
    if labels is None:
        return None
    shape = list(rows.shape[:2] if is_batched(X) else rows.shape[1:2])
    try:
        found = labels if isinstance(labels, Tensor) else tensor_of(np.asarray(labels))
    except (TypeError, ValueError):
        raise ArgumentError(f"{name}: expected integers {shape}, got {shown(labels)}") from None
    if list(found.shape) != shape or found.dtype not in INTEGERS:
        raise ArgumentError(f"{name}: expected integers {shape}, got {found.dtype} {list(found.shape)}")
    if found.numel() and (largest := int(found.max())) >= n_clusters:
        raise ArgumentError(f"{name}: expected {name} below {limit}={n_clusters}, got {largest}")
    return found.detach().to(rows.device).long().view(rows.shape[:2])


def is_batched(X: Any) -> bool:
    """Tell whether X are problems; lists are none."""
    return getattr(X, "ndim", 2) == 3


def like(value: Tensor, X: Any) -> Any:
    """Return a result where and as the rows are: a tensor on their device, or an array."""
    return value.to(X.device) if isinstance(X, Tensor) else value.cpu().numpy()


def tensor_of(array: np.ndarray) -> Tensor:
    """Return a tensor of the same memory."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():  # a memory map may be read-only, and nothing writes here
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _array(values: Any, name: str, **options: Any) -> np.ndarray:
    return check_array(
        values,
        dtype=ARRAY_DTYPES,
        order="C",
        ensure_all_finite=False,
        ensure_min_samples=0,
        input_name=name,
        **options,
    )

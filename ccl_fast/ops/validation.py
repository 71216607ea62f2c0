"""Checks of arguments: each error names the argument, what was expected, and what came."""

import torch
from torch import Tensor


def check_tensor(name: str, x) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")


def check_matrix(name: str, x, columns: int | None = None) -> None:
    check_tensor(name, x)
    if x.ndim != 2 or (columns is not None and x.shape[1] != columns):
        expected = "[rows, d]" if columns is None else f"[rows, {columns}]"
        raise ValueError(f"{name}: expected shape {expected}, got {list(x.shape)}")


def check_vector(name: str, x, length: int) -> None:
    check_tensor(name, x)
    if x.shape != (length,):
        raise ValueError(f"{name}: expected shape [{length}], got {list(x.shape)}")


def check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point() or x.element_size() < 2:
        raise ValueError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")


def check_integer(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, got {x.dtype}")


def check_same(name: str, x: Tensor, other_name: str, other: Tensor, dtype: bool = True) -> None:
    if x.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} (that of {other_name}), got {x.device}")
    if dtype and x.dtype != other.dtype:
        raise ValueError(f"{name}: expected dtype {other.dtype} (that of {other_name}), got {x.dtype}")


def check_ids(name: str, ids, rows: Tensor) -> None:
    check_vector(name, ids, rows.shape[0])
    check_integer(name, ids)
    check_same(name, ids, "the embeddings", rows, dtype=False)


def check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_finite(name: str, x: Tensor) -> None:
    """Waits for the device. The sum, which is quicker, tells unless finite values overflow it."""
    if not x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite() and not x.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or Inf")

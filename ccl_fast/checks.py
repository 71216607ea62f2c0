"""Checks of arguments: each error names the argument, what was expected, and what came."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ccl_fast.errors import ArgumentError

# Which keys count for a row.
Candidates = Literal["all", "other_id", "same_id"]
CANDIDATES: tuple[Candidates, ...] = get_args(Candidates)
# Of numbers that are used in float32: they and their inverses are finite there.
LARGEST = 1e37
# Characters of a value in an error.
MOST_SHOWN = 80


def check_tensor(name: str, x, sparse: bool = False) -> None:
    """Check that x is a tensor, and dense unless it may be ``sparse``."""
    if not isinstance(x, Tensor):
        raise ArgumentError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.is_nested or (x.layout != torch.strided and not sparse):
        raise ArgumentError(f"{name}: expected a dense tensor, got {'a nested one' if x.is_nested else x.layout}")


def check_matrix(name: str, x, columns: int | None = None, sparse: bool = False) -> None:
    """Check that x is a tensor of two dimensions, of so many columns if that is told."""
    check_tensor(name, x, sparse)
    if x.ndim != 2 or (columns is not None and x.shape[1] != columns):
        expected = "[rows, d]" if columns is None else f"[rows, {columns}]"
        raise ArgumentError(f"{name}: expected shape {expected}, got {list(x.shape)}")


def check_vector(name: str, x, length: int) -> None:
    """Check that x is a tensor of one dimension and that length."""
    check_tensor(name, x)
    if x.shape != (length,):
        raise ArgumentError(f"{name}: expected shape [{length}], got {list(x.shape)}")


def check_floating(name: str, x: Tensor) -> None:
    """Check that x is floating point, of 16 bits at least."""
    if not x.is_floating_point() or x.element_size() < 2:
        raise ArgumentError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")


def check_integer(name: str, x: Tensor) -> None:
    """Check that x is int32 or int64."""
    if x.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"{name}: expected int32 or int64, got {x.dtype}")


def whole_numbers(x):
    """Return a tensor of integers, bool or floats that are whole numbers as int64; all else as it is, for the checks.

    On a GPU and to the compiler all floats are whole: the device tells of others, as it does of wrong ids.
    """
    if not isinstance(x, Tensor) or x.is_complex() or (x.is_floating_point() and x.element_size() < 2):
        return x
    if x.is_floating_point():
        whole = (x == x.trunc()).all() & x.isfinite().all()
        if not host_knows(whole):
            assert_on_device(whole, "labels: expected whole numbers")
        elif not whole:
            return x
    return x.long()


def check_same(name: str, x: Tensor, other_name: str, other: Tensor, dtype: bool = True) -> None:
    """Check that x is on the device of another tensor and, unless ``dtype`` is False, comes to the same dtype.

    Under autocast that is autocast's for both, unless one is float64.
    """
    if x.device != other.device:
        raise ArgumentError(f"{name}: expected device {other.device} (that of {other_name}), got {x.device}")
    if dtype and x.dtype != other.dtype and product_dtype(x) != product_dtype(other):
        raise ArgumentError(f"{name}: expected dtype {other.dtype} (that of {other_name}), got {x.dtype}")


def product_dtype(x: Tensor) -> torch.dtype:
    """That x has in matrix products: autocast's, unless x is float64, or its own."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x.device) and x.dtype != torch.float64 else x.dtype


def autocasts(device: torch.device) -> bool:
    """Tell whether autocast is on for a device; meta tensors have none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_ids(name: str, ids, rows: Tensor) -> None:
    """Check that ids are integers, one for each row, where the rows are."""
    check_vector(name, ids, rows.shape[0])
    check_integer(name, ids)
    check_same(name, ids, "the embeddings", rows, dtype=False)


def check_sequence(name: str, x, of: str) -> None:
    """Check that x has members in an order: a list or tuple, or a tensor or array whose rows they are; no text."""
    if isinstance(x, str | bytes) or not (isinstance(x, Sequence) or getattr(x, "ndim", 0)):
        raise ArgumentError(f"{name}: expected a sequence of {of}, got {shown(x)}")


def check_choice(name: str, value, choices: tuple) -> None:
    """Check that a value is one of the choices."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        raise ArgumentError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_has_values(name: str, x: Tensor, why: str) -> None:
    """Check that x is not a meta tensor, where its values decide how much there is to do."""
    if x.is_meta:
        raise ArgumentError(f"{name}: expected a tensor with values, {why}, got a meta tensor")


def check_finite(name: str, x: Tensor) -> None:
    """Waits for the device. The sum, which is quicker, tells unless finite values overflow it."""
    if not x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite() and not x.isfinite().all():
        raise ArgumentError(f"{name}: expected finite values, got NaN or Inf")


def host_knows(x: Tensor) -> bool:
    """Tell whether the host may look at the values of x without waiting: on a CPU, where nothing but plain torch runs.

    What torch.compile and torch.export trace, fake and meta tensors, and those under torch.func.vmap have none to see.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and is_plain(x) and not _is_batched(x)


def is_plain(x: Tensor) -> bool:
    """Tell whether a tensor is torch's own and holds numbers; others follow shapes alone, or record what is done."""
    return type(x) in (Tensor, Parameter) and not x.is_meta


def _is_batched(x: Tensor) -> bool:
    return _unwrapped(x).ndim != x.ndim


def _unwrapped(x: Tensor) -> Tensor:
    """What torch.func's transforms have wrapped; under vmap it has a dimension more."""
    if torch.compiler.is_compiling():
        return x
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue] - it has no public name
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def assert_on_device(condition: Tensor, message: str) -> None:
    """Stop the program on the device if a condition does not hold, for any call under vmap; the host does not wait."""
    if condition.is_meta:
        return
    if _is_batched(condition):
        condition = _unwrapped(condition).all()
    torch._assert_async(condition, message)  # pyright: ignore[reportPrivateImportUsage] - it has no public name


def check_candidates(q, k, q_ids, k_ids, candidates) -> None:
    """Rows [n, d], keys [m, d] (None: the rows) and which of these are a row's candidates."""
    check_matrix("q", q)
    check_floating("q", q)
    if k is not None:
        check_matrix("k", k, columns=q.shape[1])
        check_same("k", k, "q", q)
    check_choice("candidates", candidates, CANDIDATES)
    if q_ids is None and (candidates != "all" or k_ids is not None):
        raise ArgumentError("q_ids: expected integers [n] for candidates or k_ids, got None")
    if q_ids is not None:
        check_ids("q_ids", q_ids, q)
        if (k_ids is None) != (k is None):
            raise ArgumentError("k_ids: expected integers [m] exactly when k and q_ids are given")
        if k is not None and k_ids is not None:
            check_ids("k_ids", k_ids, k)


def check_logits(q: Tensor, k: Tensor | None, scale, key_bias) -> None:
    """What makes logits of the similarities of rows q and keys k, which are checked."""
    check_scale("scale", scale)
    if key_bias is not None:
        check_vector("key_bias", key_bias, (q if k is None else k).shape[0])
        check_floating("key_bias", key_bias)
        check_same("key_bias", key_bias, "q", q, dtype=False)


def check_scale(name: str, scale) -> None:
    """Check that a scale is a number, of those that float32 has, or a tensor of one element."""
    if not isinstance(scale, Tensor):
        check_number(name, scale, "a number or a tensor of one element", math.isfinite)
        _check_size(name, scale)
        return
    check_tensor(name, scale)
    if scale.numel() != 1:
        raise ArgumentError(f"{name}: expected a number or a tensor of one element, got shape {tuple(scale.shape)}")
    if scale.dtype == torch.bool or scale.is_complex():
        raise ArgumentError(f"{name}: expected a number or a tensor of one element, got {scale.dtype}")


def checked_temperature(name: str, value) -> float:
    """Return a temperature: a positive number whose inverse is finite too, or a tensor that holds one."""
    value = as_number(value)
    check_positive(name, value)
    check_number(name, value, f"a number from {1 / LARGEST:g}, whose inverse float32 has", lambda x: x >= 1 / LARGEST)
    return float(value)


def check_count(name: str, value, least: int = 1) -> None:
    """Check that a value is an integer of at least that much."""
    if not is_integer(value) or not least <= value < 2**63:
        expected = "a positive integer" if least == 1 else f"an integer >= {least}"
        raise ArgumentError(f"{name}: expected {expected}, got {shown(value)}")


def check_seed(name: str, value) -> None:
    """Check that a value is an integer that seeds a generator."""
    if not is_integer(value) or not 0 <= value < 2**63:
        raise ArgumentError(f"{name}: expected an integer >= 0 and below 2^63, got {value!r}")


def is_integer(value) -> TypeGuard[int]:
    """Tell whether a value is a whole number, and none of True and False."""
    return isinstance(value, Integral | torch.SymInt) and not isinstance(value, bool)


def as_number(value):
    """Return a number of NumPy's, or that of an array or a tensor of no dimensions, as Python's; all else as it is.

    A tensor that requires a gradient stays one: it would get none.
    """
    if isinstance(value, np.ndarray | np.generic | Tensor) and value.ndim == 0:
        return value if isinstance(value, Tensor) and (value.requires_grad or value.is_meta) else value.item()
    return value


def check_positive(name: str, value) -> None:
    """Check that a value is a number above 0, and finite."""
    check_number(name, value, "a positive number", lambda x: 0 < x < math.inf)
    _check_size(name, value)


def check_not_negative(name: str, value) -> None:
    """Check that a value is a number of at least 0, and finite."""
    check_number(name, value, "a number >= 0", lambda x: 0 <= x < math.inf)
    _check_size(name, value)


def _check_size(name: str, value) -> None:
    check_number(name, value, f"a number that float32 has, up to {LARGEST:g}", lambda x: abs(x) <= LARGEST)


def check_share(name: str, value) -> None:
    """Check that a value is a number above 0 and at most 1."""
    check_number(name, value, "a number above 0 and at most 1", lambda x: 0 < x <= 1)


def check_fraction(name: str, value) -> None:
    """Check that a value is a number above 0 and below 1."""
    check_number(name, value, "a number between 0 and 1", lambda x: 0 < x < 1)


def check_flag(name: str, value) -> None:
    """Check that a value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{name}: expected True or False, got {shown(value)}")


def check_number(name: str, value, expected: str, inside: Callable[[Any], bool]) -> None:
    """Check that a value is a number, and ``inside`` what is expected."""
    if isinstance(value, bool) or not isinstance(value, Real) or not inside(_as_float(value)):
        raise ArgumentError(f"{name}: expected {expected}, got {shown(value)}")


def _as_float(value: Any) -> float:
    """The same, infinite where float64 has no such number."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def shown(value) -> str:
    """Show a value in an error, in a line: of one that is long the beginning."""
    try:
        text = repr(value)
    except Exception:  # whatever an object of anybody's does
        text = f"a {type(value).__name__}"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."

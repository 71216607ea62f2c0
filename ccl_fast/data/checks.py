"""Checks of the arguments that the loaders share: an error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np

from ccl_fast.errors import ArgumentError


def check_loading(*, seed: int, workers: int, memory: float, limit: int | None, strict: bool, download: bool) -> None:
    """Raises ArgumentError."""
    check_integer("seed", seed, at_least=0)
    check_integer("workers", workers, at_least=0)
    if limit is not None:
        check_integer("limit", limit, at_least=1)
    if isinstance(memory, bool) or not isinstance(memory, Real) or not 0 <= memory < math.inf:
        raise ArgumentError(f"memory: expected a number of GiB >= 0, got {memory!r}")
    for name, flag in (("strict", strict), ("download", download)):
        if not isinstance(flag, bool | np.bool_):
            raise ArgumentError(f"{name}: expected True or False, got {flag!r}")


def check_integer(name: str, value: int, *, at_least: int) -> None:
    """Raises ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise ArgumentError(f"{name}: expected an integer >= {at_least}, got {value!r}")


def check_fraction(name: str, value: float) -> None:
    """Raises ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < 1:
        raise ArgumentError(f"{name}: expected a number between 0 and 1, got {value!r}")


def check_in_classes(in_classes: Sequence[int]) -> None:
    """Raises ArgumentError."""
    if (
        isinstance(in_classes, str)
        or not isinstance(in_classes, Sequence)
        or not in_classes
        or not all(isinstance(c, Integral) and not isinstance(c, bool) for c in in_classes)
        or len(set(in_classes)) < len(in_classes)
    ):
        raise ArgumentError(f"in_classes: expected different class indices, at least one, got {in_classes!r}")


def check_shape(name: str, shape: tuple[int, int, int]) -> None:
    """Raises ArgumentError."""
    whole = isinstance(shape, Sequence) and all(isinstance(s, Integral) and s >= 1 for s in shape)
    if not whole or len(shape) != 3 or shape[0] not in (1, 3):
        raise ArgumentError(f"{name}: expected (1 or 3 channels, height, width), got {shape!r}")

"""Checks of the arguments that the loaders share: an error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral

from ccl_fast.checks import check_count, check_flag, check_number
from ccl_fast.errors import ArgumentError


def check_loading(
    *, seed: int, workers: int | None, memory: float, limit: int | None, strict: bool, download: bool
) -> None:
    """Raises ArgumentError."""
    check_count("seed", seed, least=0)
    if workers is not None:
        check_count("workers", workers, least=0)
    if limit is not None:
        check_count("limit", limit)
    check_number("memory", memory, "a number of GiB >= 0", lambda x: 0 <= x < math.inf)
    check_flag("strict", strict)
    check_flag("download", download)


def check_in_classes(in_classes: Sequence[int | str]) -> None:
    """Raises ArgumentError."""
    if (
        isinstance(in_classes, str)
        or not isinstance(in_classes, Sequence)
        or not in_classes
        or not all(isinstance(c, Integral | str) and not isinstance(c, bool) for c in in_classes)
        or len(set(in_classes)) < len(in_classes)
    ):
        raise ArgumentError(f"in_classes: expected different class numbers or names, at least one, got {in_classes!r}")


def check_shape(name: str, shape: tuple[int, int, int]) -> None:
    """Raises ArgumentError."""
    whole = isinstance(shape, Sequence) and all(isinstance(s, Integral) and s >= 1 for s in shape)
    if not whole or len(shape) != 3 or shape[0] not in (1, 3):
        raise ArgumentError(f"{name}: expected (1 or 3 channels, height, width), got {shape!r}")

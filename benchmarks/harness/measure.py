"""Times and failures of contenders, written into their rows."""

import contextlib

import torch

from benchmarks.harness.results import Row
from benchmarks.harness.timing import paired_ratio, percentiles


@contextlib.contextmanager
def failure_noted(row: Row):
    """A rival's failure is a result."""
    try:
        yield
    except Exception as error:
        row.note = "out of memory" if _is_out_of_memory(error) else f"{type(error).__name__}: {error}"[:200]


def record(row: Row, times: list[float]) -> None:
    row.p20, row.p50, row.p80 = percentiles(times)
    row.repetitions = len(times)


def compare_with_ours(rows: dict[str, Row], together: dict[str, list[float]]) -> None:
    """The ratios of times that were taken in turns."""
    if "ours" in together:
        for name, times in together.items():
            rows[name].to_ours = paired_ratio(times, together["ours"])


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

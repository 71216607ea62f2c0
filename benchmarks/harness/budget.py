"""A part of the benchmarks on a GPU, which ends in time whatever the sizes ask for."""

import time
from pathlib import Path

import torch

from benchmarks.harness.results import ResultsFile, Row
from benchmarks.harness.timing import DeviceClock, host_clock

SECONDS = 150.0


class Run:
    """Rows of one device within a time budget: what would not fit into the time left is not started."""

    def __init__(self, what: str, device: torch.device, directory: Path):
        self.deadline = time.monotonic() + SECONDS
        self.device, self.on_gpu = device, device.type == "cuda"
        self.clock = DeviceClock(device) if self.on_gpu else host_clock
        self.file = ResultsFile(what if self.on_gpu else f"{what}-dry-run", device, directory)
        self.rows: list[Row] = []
        # Seconds for each unit of work in the last measurement with this key: predicts the next.
        self.pace: dict[tuple, float] = {}

    def skip(self, keys: dict[str, tuple], work: float) -> dict[str, str]:
        """Contenders, each with the key of its pace, for which the time left is too short; with the reason."""
        remaining, skip = self.deadline - time.monotonic(), {}
        for name, key in keys.items():
            expected = work * self.pace.get(key, 0.0)
            if expected > remaining or remaining < 0:
                skip[name] = f"not started: about {expected:.0f} s, {max(0, remaining):.0f} s are left"
        return skip

    def add(self, rows: list[Row]) -> None:
        self.file.add(rows)
        self.rows += rows

"""What every stage works with: where its lines go, the time it has, the device, and whether all this is a dry run."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # some stages do without torch, whose import takes seconds
    import torch

    from benchmarks.harness.timing import Clock, Step

RESULTS = "results.jsonl"


class Skipped(Exception):
    """A stage that cannot run here, and why; not a failure."""


@dataclass(frozen=True)
class Harvest:
    stage: str
    out: Path
    dry_run: bool
    deadline: float  # of time.monotonic

    @classmethod
    def of_environment(cls, stage: str) -> Harvest:
        deadline = time.monotonic() + float(os.environ.get("HARVEST_BOX", "inf"))
        return cls(stage, Path(os.environ["OUT"]), bool(os.environ.get("HARVEST_DRY_RUN")), deadline)

    @property
    def left(self) -> float:
        """Seconds until the stage is ended from outside."""
        return self.deadline - time.monotonic()

    def line(self, file: str = RESULTS, **fields) -> None:
        """On disk as soon as it is known."""
        record = {"stage": self.stage, **fields} | ({"dry_run": True} if self.dry_run else {})
        with (self.out / file).open("a") as lines:
            lines.write(json.dumps(record) + "\n")

    def record(self, key: dict, run: Callable[[], dict], file: str = RESULTS) -> None:
        """A case and its line, which is written also where it fails or has no time left: then "note" says why."""
        if not self.may_start(key, file):
            return
        try:
            found = run()
        except Exception as error:
            self.failed(key, error, file)
        else:
            self.line(file, **key | found)

    def may_start(self, key: dict, file: str = RESULTS) -> bool:
        """False for a case that has its line, or gets one here because there is no time left for it."""
        wanted = {"stage": self.stage, **key}
        if any(wanted.items() <= line.items() for line in read_lines(self.out / file)):
            return False
        if self.left < 2:
            self.line(file, **key, note="not started: the stage's time is spent")
        return self.left >= 2

    def failed(self, key: dict, error: Exception, file: str = RESULTS) -> None:
        traceback.print_exception(error)
        self.line(file, **key, note=f"{type(error).__name__}: {error}"[:300])
        if self.device_is_lost():
            self.begin_again()

    def device_is_lost(self) -> bool:
        """After an illegal access, say, every later call of this process fails."""
        if self.device.type != "cuda":
            return False
        import torch

        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def begin_again(self) -> None:
        """The stage in a new process, which goes on after the lines that are there."""
        os.environ["HARVEST_BOX"] = str(self.left)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.harvest", self.stage])

    # ---- the device, or what stands in for it in a dry run

    @cached_property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.dry_run else "cuda")

    @cached_property
    def half(self) -> torch.dtype:
        """Triton's interpreter has no bfloat16."""
        import torch

        return torch.float16 if self.dry_run else torch.bfloat16

    def rows(self, n: int) -> int:
        """Of a case of n rows; a dry run has some tiles, and an odd number of rows where n is odd."""
        return 160 + n % 2 if self.dry_run else n

    def width(self, d: int) -> int:
        """Of a case with d columns; in a dry run at most so many that the gradient goes through strips."""
        return min(d, 272) if self.dry_run else d

    @cached_property
    def clock(self) -> Clock:
        """Of the device's time alone."""
        from benchmarks.harness.timing import DeviceClock, host_clock

        return host_clock if self.dry_run else DeviceClock(self.device)

    @cached_property
    def latency(self) -> Clock:
        """Of what a caller waits."""
        from benchmarks.harness.timing import host_clock, latency_clock

        return host_clock if self.dry_run else latency_clock

    @cached_property
    def stream(self) -> torch.cuda.Stream | None:
        import torch

        return None if self.dry_run else torch.cuda.Stream()

    @contextlib.contextmanager
    def on_stream(self):
        """On a stream beside the current one, which waits for it."""
        if self.dry_run:
            yield
            return
        import torch

        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def captured(self, step: Step) -> Step:
        """A replay of the step from a CUDA graph. What a backward step differentiates must come from `on_stream`."""
        if self.dry_run:
            return step
        import torch

        with self.on_stream():
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            step()
        return graph.replay

    def times(self, steps: dict[str, Step], clock: Clock, seconds: float) -> dict[str, dict]:
        """20th, 50th and 80th percentile of each in seconds, taken in turns."""
        from benchmarks.harness.timing import interleave, percentiles

        for step in steps.values():
            clock(step)
        taken = interleave(steps, clock, 0.0 if self.dry_run else seconds, least=2 if self.dry_run else 5)
        return {
            name: dict(zip(("p20", "p50", "p80"), percentiles(times), strict=True)) | {"repetitions": len(times)}
            for name, times in taken.items()
        }


def read_lines(path: Path) -> list[dict]:
    """Of a file of JSON lines; a last one that was cut off is left out."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found

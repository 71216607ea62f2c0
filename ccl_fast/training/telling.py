"""What a long run tells of itself: lines, and on a terminal one bar over all of the training."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from ccl_fast.training.loop import Run

# Steps after which the rest is estimated; the first one is slower than the others and does not count.
ESTIMATED_AFTER = 5
LONG = 600  # seconds


def say(text: str) -> None:
    """Print a line at once, above a bar if there is one."""
    tqdm.write(text, sys.stdout)
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Return a duration in words: "40 s", "3 min", "2 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Telling:
    """How far the training has come: on a terminal a bar over all stages, elsewhere a line for every epoch.

    Args:
        epochs: by stage, how many it ends with, and how many it begins with.
        steps: of an epoch.
        done: of all steps, those done before.
        quiet: say nothing, as all processes but the first.
        advice: what to say if it takes long.
    """

    def __init__(self, epochs: Mapping[str, tuple[int, int]], steps: int, *, done: int, quiet: bool, advice: str = ""):
        self._last, self._quiet = {stage: last for stage, (last, _) in epochs.items()}, quiet
        self._advice = advice
        total = steps * sum(last - first for last, first in epochs.values())
        self._bar = tqdm(total=total, initial=done, unit=" steps", disable=quiet or None, dynamic_ncols=True)
        self._left = total - done
        self._is_log = not quiet and not sys.stdout.isatty()
        self._steps, self._from, self._of_epoch = 0, time.perf_counter(), time.perf_counter()

    def close(self) -> None:
        self._bar.close()

    @contextmanager
    def clustering(self, stage: str, run: Run) -> Iterator[None]:
        """Show, on the bar, that k-means runs."""
        self._describe(stage, run, ": k-means")
        yield
        self._describe(stage, run)

    def step(self, stage: str, run: Run) -> None:
        """Count a step."""
        self._describe(stage, run)
        self._bar.set_postfix_str(f"loss {run.step_losses[-1]:.3f}", refresh=False)
        self._bar.update()
        self._steps, self._left = self._steps + 1, self._left - 1
        if self._steps == 1:
            self._from = time.perf_counter()
        if self._steps == ESTIMATED_AFTER + 1 and self._left and not self._quiet:
            advice = f" ({self._advice})" if self._advice and self._seconds_left > LONG else ""
            say(f"about {duration(self._seconds_left)} for the {self._left} steps that are left{advice}")

    def epoch(self, stage: str, run: Run) -> None:
        """Tell of an epoch that is done."""
        now = time.perf_counter()
        took, self._of_epoch = now - self._of_epoch, now
        if self._is_log:
            epoch, rest = f"{stage} {len(run.losses)}/{self._last[stage]}", ""
            if self._left and self._steps > 1:
                rest = f", about {duration(self._seconds_left)} left"
            say(f"{epoch}: loss {run.losses[-1]:.3f}, {duration(took)}{rest}")

    @property
    def _seconds_left(self) -> float:
        return (time.perf_counter() - self._from) / (self._steps - 1) * self._left

    def _describe(self, stage: str, run: Run, what: str = "") -> None:
        at = min(len(run.losses) + 1, self._last[stage])
        self._bar.set_description(f"{stage} {at}/{self._last[stage]}{what}", refresh=bool(what))

"""Times of several steps, taken in turns, so that a slow minute of the machine falls on all of them."""

import statistics
import time
from collections.abc import Callable

import torch

Step = Callable[[], None]
Clock = Callable[[Step], float]  # runs a step, returns seconds


def host_clock(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def latency_clock(step: Step) -> float:
    """What a caller on a GPU waits, launches included: for small batches."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class DeviceClock:
    """CUDA events around the step, after a write that leaves none of its inputs in the L2 cache."""

    def __init__(self, device: torch.device):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def __call__(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def interleave(steps: dict[str, Step], clock: Clock, seconds: float, least: int = 3, most: int = 50):
    """Rounds of one repetition each, in rotating order, for about `seconds`; {name: times}. Warm up before."""
    names, times = list(steps), {name: [] for name in steps}
    if not names:
        return times
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < least or (rounds < most and time.perf_counter() < end):
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(clock(steps[name]))
        rounds += 1
    return times


def percentiles(times: list[float]) -> tuple[float, float, float]:
    """20th, 50th, 80th."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def paired_ratio(times: list[float], reference: list[float]) -> float:
    """Median over the rounds: what drifts from round to round cancels."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))

"""What the machine can do at best: bare matrix products, copies, exponentials."""

import subprocess
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.harness.timing import Clock, Step, interleave, percentiles

EXPONENTIALS_PER_CYCLE = 16  # of a multiprocessor's special-function units
# On a CPU: exponentials of so many numbers, which stay in the cache, so many times.
CACHED, EXP_CALLS = 1 << 18, 16


class Work(NamedTuple):
    """What the method cannot do without, by arithmetic."""

    flops: float  # of matrix products
    exponentials: float


@dataclass(frozen=True)
class Ceilings:
    """What one device does at best; `overlapping`: its products and its exponentials have units of their own."""

    matrix_rate: float  # floating-point operations per second
    copy_rate: float  # bytes per second, read plus written
    exponential_rate: float  # per second
    overlapping: bool

    def floor(self, work: Work) -> float:
        """Seconds that products and exponentials take; nothing N x N passes the memory."""
        parts = work.flops / self.matrix_rate, work.exponentials / self.exponential_rate
        return max(parts) if self.overlapping else sum(parts)


def measure_ceilings(
    device: torch.device,
    clock: Clock,
    n: int | None = None,
    copied: int | None = None,
    dtype: torch.dtype | None = None,
) -> Ceilings:
    """The device's rates by n x n x n products of random numbers, a copy, and exponentials.

    On a CPU the exponentials are those of an array that stays in the cache; on a GPU 16 a cycle and multiprocessor, at
    the clock that it has under load.
    """
    on_gpu = device.type == "cuda"
    n, copied = n or (8192 if on_gpu else 2048), copied or (2**32 if on_gpu else 2**28)
    rate = product_rate(device, clock, dtype or (torch.bfloat16 if on_gpu else torch.float32), n)
    if on_gpu:
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        exponentials = EXPONENTIALS_PER_CYCLE * multiprocessors * clock_under_load(device, n, rate)
    else:
        cached = torch.rand(CACHED)
        steps = {
            "exp2": lambda: [torch.exp2(cached, out=cached.clamp_(max=1)) for _ in range(EXP_CALLS)],
            "clamp": lambda: [cached.clamp_(max=1) for _ in range(EXP_CALLS)],
        }
        times = {name: percentiles(t)[1] for name, t in _warm_and_interleave(steps, clock).items()}
        exponentials = EXP_CALLS * CACHED / max(times["exp2"] - times["clamp"], 1e-9)
    return Ceilings(rate, copy_rate(device, clock, copied), exponentials, overlapping=on_gpu)


def copy_rate(device: torch.device, clock: Clock, copied: int) -> float:
    """Bytes per second, read plus written, of a copy of so many."""
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (times,) = _warm_and_interleave({"copy": lambda: target.copy_(source)}, clock).values()
    return 2 * copied / percentiles(times)[1]


def _warm_and_interleave(steps: dict[str, Step], clock: Clock) -> dict[str, list[float]]:
    for step in (*steps.values(), *steps.values()):
        clock(step)
    return interleave(steps, clock, 1.0)


def product_rate(device: torch.device, clock: Clock, dtype: torch.dtype, n: int) -> float:
    """Floating-point operations per second of an n x n x n product by the fastest routine that torch has."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    steps = {"mm": lambda: torch.mm(a, b, out=out)}
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear and device.type == "cpu":  # on AMD's CPUs oneDNN is twice as fast as MKL
        steps["oneDNN"] = lambda: linear(a, b, None, "none", [], "")
    return 2 * n**3 / min(percentiles(times)[1] for times in _warm_and_interleave(steps, clock).values())


def clock_under_load(device: torch.device, n: int, rate: float) -> float:
    """The multiprocessors' clock while a GPU multiplies n x n matrices, at so many floating-point operations per
    second, in Hz; the highest one if nothing can read it."""
    product = torch.randn(2, n, n, device=device).bfloat16()
    for _ in range(int(rate / (2 * n**3))):  # for a second
        torch.mm(*product)
    try:
        query = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=clocks.sm"]
        reading = subprocess.check_output([*query, "--format=csv,noheader,nounits"], text=True, timeout=20)
        return float(reading) * 1e6
    except (OSError, ValueError, subprocess.SubprocessError):
        return torch.cuda.get_device_properties(device).clock_rate * 1e3
    finally:
        torch.cuda.synchronize(device)

"""What the machine can do at best: bare matrix products, copies, exponentials."""

import subprocess
from dataclasses import dataclass

import torch

from benchmarks.cases import Inputs, Size
from benchmarks.contenders import MEMORY_SHARE, free_memory
from benchmarks.timing import Clock, Step, interleave, percentiles

EXPONENTIALS_PER_CYCLE = 16  # of a multiprocessor's special-function units


def two_products(inputs: Inputs, size: Size) -> Step | None:
    """The yardstick: z z' twice into one preallocated N x N array; None where that array does not fit."""
    z = inputs.embeddings.detach().reshape(size.n, size.d)
    if size.n**2 * z.element_size() > MEMORY_SHARE * free_memory(z.device):
        return None
    out = z.new_empty(size.n, size.n)

    def step():
        torch.mm(z, z.T, out=out)
        torch.mm(z, z.T, out=out)

    return step


@dataclass(frozen=True)
class Ceilings:
    matrix_rate: float  # floating-point operations per second
    copy_rate: float  # bytes per second, read plus written
    clock: float  # cycles per second under load
    multiprocessors: int

    def floor(self, size: Size, units: float, exponentials: float) -> float:
        """Seconds: the larger of the products' and the exponentials' time. A unit is an N x N x D product."""
        products = units * 2 * size.n**2 * size.d / self.matrix_rate
        return max(products, exponentials / (EXPONENTIALS_PER_CYCLE * self.multiprocessors * self.clock))


def measure_ceilings(
    device: torch.device, clock: Clock, n: int = 8192, copied: int = 2**32, dtype: torch.dtype = torch.bfloat16
) -> Ceilings:
    """An n x n x n product of random numbers, and a copy of `copied` bytes."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    source = torch.randint(256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    steps = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    for step in (*steps.values(), *steps.values()):
        clock(step)
    times = {name: percentiles(t)[1] for name, t in interleave(steps, clock, 1.0).items()}
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        frequency = _clock_under_load(device, steps["product"], times["product"])
    else:  # a dry run: any number will do
        multiprocessors, frequency = 1, 1e9
    return Ceilings(2 * n**3 / times["product"], 2 * copied / times["copy"], frequency, multiprocessors)


def product_rate(device: torch.device, clock: Clock, dtype: torch.dtype, n: int) -> float:
    """Floating-point operations per second of an n x n x n product by the fastest routine that torch has."""
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    steps = {"mm": lambda: torch.mm(a, b, out=out)}
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear and device.type == "cpu":  # on AMD's CPUs oneDNN is twice as fast as MKL
        steps["oneDNN"] = lambda: linear(a, b, None, "none", [], "")
    for step in (*steps.values(), *steps.values()):
        clock(step)
    return 2 * n**3 / min(percentiles(times)[1] for times in interleave(steps, clock, 1.0).values())


def _clock_under_load(device: torch.device, step: Step, seconds: float) -> float:
    """The multiprocessors' clock while the device works, in Hz; the highest one if nothing can read it."""
    for _ in range(int(1.0 / seconds)):
        step()
    try:
        query = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=clocks.sm"]
        reading = subprocess.check_output([*query, "--format=csv,noheader,nounits"], text=True, timeout=20)
        return float(reading) * 1e6
    except (OSError, ValueError, subprocess.SubprocessError):
        return torch.cuda.get_device_properties(device).clock_rate * 1e3
    finally:
        torch.cuda.synchronize(device)

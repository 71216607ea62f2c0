"""Where the figures come from, and what the device does at best: versions, clocks, ceilings."""

import importlib.metadata
import platform
import shutil
import subprocess
from dataclasses import dataclass

from benchmarks.harvest.run import Harvest

OPTIONAL = ("pytest-timeout", "pytest-xdist", "lightning", "torchmetrics", "matplotlib", "scikit-learn")
LOAD = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"
L2_BYTES, L2_TIMES = 16 << 20, 4  # well inside the cache
EXP_TIMES = 4096


@dataclass(frozen=True)
class _Sizes:
    """Of the ceilings; a dry run has tiny ones."""

    product: int
    copied: int
    programs: int
    read_block: int
    exp_block: int


def run(harvest: Harvest) -> None:
    with (harvest.out / "env.txt").open("w") as file:
        file.write(_versions())
    from benchmarks.harness.results import machine

    harvest.line(case="machine", **machine(harvest.device))
    sizes = _Sizes(8192, 2**32, 0, 4096, 1024) if not harvest.dry_run else _Sizes(64, 2**16, 2, 16, 16)
    _ceilings(harvest, sizes)
    with (harvest.out / "env.txt").open("a") as file:
        file.write(f"after the ceilings\n{_said('nvidia-smi', f'--query-gpu={LOAD}', '--format=csv')}\n")


def _versions() -> str:
    parts = {
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "GPU": _said("nvidia-smi"),
        "nvcc": _said(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"),
        "not installed": ", ".join(filter(_is_absent, OPTIONAL)) or "nothing that a stage would use",
        "packages": "\n".join(
            sorted({f"{d.metadata['Name']} {d.version}" for d in importlib.metadata.distributions()})
        ),
    }
    return "".join(f"{name}\n{text}\n\n" for name, text in parts.items())


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"


def _is_absent(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def _ceilings(harvest: Harvest, sizes: _Sizes) -> None:
    """A line for each, by its name in `prediction.ASSUMED`: per second, and the clock under load in Hz."""
    import torch

    from benchmarks.harness.ceilings import clock_under_load, copy_rate, product_rate
    from benchmarks.harvest.prediction import ASSUMED

    device, clock = harvest.device, harvest.clock

    def line(name, measure):
        harvest.record({"case": "ceiling", "name": name}, lambda: {"value": measure()})

    # oneDNN, which stands in for the device in a dry run, does not have all products of half precision.
    dtype = torch.float32 if harvest.dry_run else torch.bfloat16
    line("matrix_rate", lambda: product_rate(device, clock, dtype, sizes.product))
    line("copy_rate", lambda: copy_rate(device, clock, sizes.copied))
    line("clock", lambda: 1e9 if harvest.dry_run else clock_under_load(device, sizes.product, ASSUMED["matrix_rate"]))
    line("l2_rate", lambda: _l2_rate(harvest, sizes))
    line("exponential_rate", lambda: _exponential_rate(harvest, sizes))


def _l2_rate(harvest: Harvest, sizes: _Sizes) -> float:
    import torch

    from benchmarks.harvest import ceiling_kernels

    programs = sizes.programs or 8 * _multiprocessors(harvest)
    words = 4 * sizes.read_block if harvest.dry_run else L2_BYTES // 4
    blocks, times = words // sizes.read_block, 1 if harvest.dry_run else L2_TIMES
    x = torch.randint(9, (words,), dtype=torch.int32, device=harvest.device)
    out = torch.empty(programs, dtype=torch.int32, device=harvest.device)

    def step():
        ceiling_kernels.read[(programs,)](x, out, blocks, times, BLOCK=sizes.read_block, num_warps=8)

    seconds = harvest.times({"": step}, harvest.clock, 0.5)[""]["p50"]
    assert out.eq(times * x.sum()).all(), "the kernel that reads the L2 cache does not read all of it"
    return 4 * words * times * programs / seconds


def _exponential_rate(harvest: Harvest, sizes: _Sizes) -> float:
    import torch

    from benchmarks.harvest import ceiling_kernels

    programs, times = sizes.programs or 8 * _multiprocessors(harvest), 4 if harvest.dry_run else EXP_TIMES
    x = torch.rand(programs * sizes.exp_block, device=harvest.device)
    out = torch.empty_like(x)

    def step():
        ceiling_kernels.exponentials[(programs,)](x, out, times, BLOCK=sizes.exp_block, num_warps=4)

    seconds = harvest.times({"": step}, harvest.clock, 0.5)[""]["p50"]
    assert ((out >= 0.5) & (out <= 1)).all(), "the kernel of exponentials does not compute them"
    return x.numel() * times / seconds


def _multiprocessors(harvest: Harvest) -> int:
    import torch

    return torch.cuda.get_device_properties(harvest.device).multi_processor_count

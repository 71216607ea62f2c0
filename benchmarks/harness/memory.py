"""Peak memory of one step above its inputs."""

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.harness.contender import Contender, Size
from benchmarks.harness.timing import Step

# More rows than one tile has, so that what larger batches run is loaded.
WARM_UP_ROWS, WARM_UP_CLUSTERS = 1024, 128


def bar(size: Size) -> int:
    """What the library promises for a forward and backward on a CPU in float32, in bytes above the inputs."""
    return 64 * 2**20 + 6 * size.n * size.d * 4


def peak_on_gpu(step: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(find: Callable, case: str, contender: str, size: Size) -> int | None:
    """The growth of the resident size in a process of its own; None if that process died.

    `find`, a function at the top of a module, gives case and contender by their names, by which all three travel.
    """
    dtype = str(size.dtype).removeprefix("torch.")
    arguments = (find.__module__, find.__name__, case, contender, *map(str, (size.n, size.d, size.clusters)), dtype)
    command = [sys.executable, "-m", "benchmarks.harness.memory", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None


def _peak_of_this_process(case, contender: Contender, size: Size) -> int:
    device, run = torch.device("cpu"), contender.build(case)
    small = replace(size, n=min(size.n, WARM_UP_ROWS), clusters=min(size.clusters, WARM_UP_CLUSTERS))
    case.step(run, case.inputs(small, device))()  # libraries load, threads start
    step = case.step(run, case.inputs(size, device))
    before = forget_peak()
    step()
    return max(0, status("VmHWM") - before)


def forget_peak() -> int:
    """Give freed memory back, lower the high-water mark to the resident size (Linux), return that size."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    """Bytes, from the kernel's page on this process. (Not ru_maxrss: it starts with the size of the parent.)"""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("find")
    parser.add_argument("case")
    parser.add_argument("contender")
    parser.add_argument("n", type=int)
    parser.add_argument("d", type=int)
    parser.add_argument("clusters", type=int)
    parser.add_argument("dtype")
    a = parser.parse_args()
    found = getattr(import_module(a.module), a.find)(a.case, a.contender)
    print(_peak_of_this_process(*found, Size(a.n, a.d, getattr(torch, a.dtype), a.clusters)))

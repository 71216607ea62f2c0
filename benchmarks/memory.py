"""Peak memory of one step above its inputs."""

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases import CASES, Case, Size
from benchmarks.contenders import CONTENDERS
from benchmarks.timing import Step, step_of

WARM_UP_ROWS = 512


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


def peak_on_cpu(case: Case, contender: str, size: Size) -> int | None:
    """The growth of the resident size in a process of its own; None if that process died."""
    arguments = (case.name, contender, str(size.n), str(size.d), str(size.dtype).removeprefix("torch."))
    command = [sys.executable, "-m", "benchmarks.memory", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None


def _peak_of_this_process(case: Case, contender: str, size: Size) -> int:
    device = torch.device("cpu")
    loss = CONTENDERS[contender].build(case)
    small = replace(size, n=min(size.n, WARM_UP_ROWS))
    step_of(loss, case, case.inputs(small, device))()  # libraries load, threads start
    step = step_of(loss, case, case.inputs(size, device))
    before = _forget_peak()
    step()
    return max(0, _status("VmHWM") - before)


def _forget_peak() -> int:
    """Give freed memory back, lower the high-water mark to the resident size (Linux), return that size."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    """Bytes, from the kernel's page on this process. (Not ru_maxrss: it starts with the size of the parent.)"""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("contender")
    parser.add_argument("n", type=int)
    parser.add_argument("d", type=int)
    parser.add_argument("dtype")
    a = parser.parse_args()
    print(_peak_of_this_process(CASES[a.case], a.contender, Size(a.n, a.d, getattr(torch, a.dtype))))

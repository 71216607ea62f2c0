"""The profiler and the memory checker, over kernels that another stage of this program runs for them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.harvest.run import Harvest, Skipped

CUDA = Path("/usr/local/cuda/bin")
PROFILED = "forward_triangle|backward_rows|backward_weights|assign"
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "InstructionStats", "SchedulerStats", "WarpStateStats")


def profile(harvest: Harvest) -> None:
    """ncu's report of four kernels at N = 65,536, into ncu.txt."""
    sections = [part for section in (*SECTIONS, "MemoryWorkloadAnalysis") for part in ("--section", section)]
    options = ["--clock-control", "none", "--profile-from-start", "off", "--kernel-name", f"regex:{PROFILED}"]
    _watch(harvest, "ncu", [*options, *sections], "profiled", "ncu.txt", harvest.left)


def sanitize(harvest: Harvest) -> None:
    """Bad accesses, then races, of small k-means, into sanitizer.txt."""
    box = harvest.left
    for share, check in ((0.5, "memcheck"), (1.0, "racecheck")):
        left = share * box - (box - harvest.left)
        _watch(
            harvest, "compute-sanitizer", ["--tool", check, "--error-exitcode", "9"], "sanitized", "sanitizer.txt", left
        )


def _watch(harvest: Harvest, tool: str, options: list[str], what: str, file: str, seconds: float) -> None:
    """A tool that is not here, or that has nothing to watch, is a line in its file."""
    with (harvest.out / file).open("a") as report:
        path = shutil.which(tool) or shutil.which(tool, path=str(CUDA))
        target = [sys.executable, "-m", "benchmarks.harvest", what]
        if harvest.dry_run:
            report.write(
                f"{tool} {' '.join(options)}: skipped, this is a dry run without a GPU; what it would watch ran\n"
            )
            report.flush()
            subprocess.run(target, check=True, stdout=report, stderr=subprocess.STDOUT)
            return
        if path is None:
            report.write(f"{tool}: skipped, it is not on this machine\n")
            raise Skipped(f"{tool} is not on this machine")
        report.write(f"{tool} {' '.join(options)}\n")
        report.flush()
        # What the allocator keeps would hide an access beyond the end of a tensor.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if what == "sanitized" else os.environ
        try:
            command = [path, *options, *target]
            done = subprocess.run(
                command, stdout=report, stderr=subprocess.STDOUT, env=environment, timeout=max(1.0, seconds - 2)
            )
        except subprocess.TimeoutExpired:
            report.write(f"\n{tool}: ended after {seconds - 2:.0f} s\n")
            raise
        if done.returncode:
            raise SystemExit(f"{tool} {' '.join(options)} ended with {done.returncode}")


def profiled(harvest: Harvest) -> None:
    """Compiled and run beforehand, then once under the profiler's eyes."""
    import torch

    from benchmarks.harvest import clusters, losses, plan

    losses.take_the_path_of_large_batches(harvest)
    clusters.use_emulation(harvest)
    near, far = (losses.Work(harvest, plan.Problem(plan.ROWS_OF_LAUNCHES, d)) for d in (128, 768))
    x = torch.randn(harvest.rows(100_000), 128, device=harvest.device).half()

    def step():
        near.backward(near.forward())
        far.backward(far.forward())
        clusters.iteration(harvest, x, x[: 20 if harvest.dry_run else 1000].float(), timed=False)

    step()
    if not harvest.dry_run:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    step()
    if not harvest.dry_run:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def sanitized(harvest: Harvest) -> None:
    """Small clusterings of odd sizes, of every dtype."""
    import torch

    from benchmarks.harvest import clusters

    clusters.use_emulation(harvest)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for n, d, k in ((300, 70, 20), (130, 130, 140)):
            n, k = (n // 4, k // 4) if harvest.dry_run else (n, k)
            x = torch.randn(n, d, device=harvest.device).to(dtype)
            clusters.iteration(harvest, x, x[:k].float(), timed=False)
    if not harvest.dry_run:
        torch.cuda.synchronize()

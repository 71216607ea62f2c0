"""The losses on a GPU, at most two and a half minutes: ceilings, small batches, then large ones against their floor.

A dry run walks the same path on CPU tensors of tiny sizes, where the losses take the backend "blocked".
"""

from pathlib import Path

import torch

from benchmarks.harness.budget import Run
from benchmarks.harness.ceilings import Ceilings, measure_ceilings
from benchmarks.harness.contender import Size
from benchmarks.harness.memory import peak_on_gpu
from benchmarks.harness.results import Row, table
from benchmarks.harness.timing import host_clock, latency_clock
from benchmarks.losses.cases import CASES, Case
from benchmarks.losses.measure import measure

SECONDS_PER_SIZE = 4.0
CALLS = 6  # of a step at least: warm-up, three rounds, memory, one to spare

SMALL = (256, 512, 1024)
LARGE = (*((n, d) for n in (8192, 16384, 65536, 262144) for d in (128, 768)), (1048576, 128))
DRY_SMALL, DRY_LARGE = (32, 64), ((128, 16), (256, 32))

# Ours first: should a rival leave the device in a bad state, our figures are on disk.
CASES_AND_CONTENDERS = (
    (CASES["ccl"], ("ours", "dense")),
    (CASES["nt-xent"], ("ours", "dense", "inf-cl", "memeff")),
    (CASES["clip"], ("ours", "dense", "torch linear_cross_entropy", "inf-cl towers")),
)


def run_gpu(dry_run: bool, directory: Path) -> str:
    """All rows, written as soon as they are measured; the table."""
    return _LossRun("gpu", torch.device("cpu" if dry_run else "cuda"), directory).table()


class _LossRun(Run):
    def table(self) -> str:
        latency = latency_clock if self.on_gpu else host_clock
        ceilings = self._ceilings()
        for n in SMALL if self.on_gpu else DRY_SMALL:
            self.add(measure(CASES["ccl"], self._size(n, 128), self.device, latency, 0.5, ("ours", "dense"))[0])
        for case, contenders in CASES_AND_CONTENDERS:
            for n, d in LARGE if self.on_gpu else DRY_LARGE:
                self._large(case, self._size(n, d), contenders, ceilings)
        return f"{table(self.rows)}\n\n{ceilings}\n{self.file.path}"

    def _ceilings(self) -> Ceilings:
        small = {} if self.on_gpu else {"n": 64, "copied": 2**16}
        ceilings = measure_ceilings(self.device, self.clock, **small)
        for name, value in vars(ceilings).items():
            self.add([Row("ceiling", name, 0, 0, "bfloat16", note=f"{value:.4g}")])
        return ceilings

    def _large(self, case: Case, size: Size, contenders: tuple[str, ...], ceilings: Ceilings) -> None:
        work = size.n**2 * size.d
        skip = self.skip({name: (case.name, name, size.d) for name in contenders}, CALLS * work)
        seconds = SECONDS_PER_SIZE if self.on_gpu else 0.0
        rows, steps = measure(case, size, self.device, self.clock, seconds, contenders, skip, ceilings)
        for row in rows:
            if row.p50 is None:
                continue
            self.pace[case.name, row.contender, size.d] = row.p50 / work
            if row.contender in steps and self.on_gpu:
                row.peak_bytes = peak_on_gpu(steps[row.contender])
        self.add(rows)

    def _size(self, n: int, d: int) -> Size:
        return Size(n, d, torch.bfloat16, clusters=128 if self.on_gpu else 8)

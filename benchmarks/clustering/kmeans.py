"""The k-means runs on a CPU and on a GPU: every size with its truth and its floor, every contender in turns."""

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.clustering.cases import CASES, KMeansCase, Outcome, Rows
from benchmarks.clustering.contenders import CONTENDERS, KMeansContender, find
from benchmarks.clustering.correctness import Truth, inertia, relative_error, truth
from benchmarks.harness.budget import Run
from benchmarks.harness.ceilings import product_rate
from benchmarks.harness.contender import Size
from benchmarks.harness.measure import compare_with_ours, failure_noted, record
from benchmarks.harness.memory import peak_on_cpu, peak_on_gpu
from benchmarks.harness.results import ResultsFile, Row, table
from benchmarks.harness.timing import Clock, Step, host_clock, interleave
from benchmarks.losses.correctness import is_wrong

CPU = torch.device("cpu")
SIZES = (Size(100_000, 128, clusters=1000), Size(50_000, 512, clusters=4000))
FEW_ROWS = (Size(2000, 32, clusters=50), Size(5000, 64, clusters=100))
QUICK_SIZES = FEW_ROWS[:1]
SEEDED_SIZES = (SIZES[0], *FEW_ROWS)  # scikit-learn's seeding takes minutes for K = 4000
CPU_SECONDS, QUICK_SECONDS = 8.0, 0.2

GPU_SECONDS_PER_SIZE = 2.0
CALLS = 6  # of a step at least: warm-up, three rounds, memory, one to spare
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
GPU_SIZES = tuple(
    Size(n, d, dtype, clusters)
    for n, d, clusters, dtypes in (
        (65_536, 128, 1000, (HALF,)),
        (1_000_000, 128, 1000, (HALF, BRAIN, FULL)),
        (1_000_000, 512, 4000, (HALF, FULL)),
        (1_000_000, 128, 10_000, (HALF,)),
        (1_000_000, 2048, 10_000, (HALF, FULL)),
    )
    for dtype in dtypes
)
DRY_SIZES = tuple(Size(512, 16, dtype, clusters=8) for dtype in (HALF, BRAIN, FULL))
# What many starts or an assignment cost beside a fit, is for few rows to say.
GPU_CASES = tuple(case for case in CASES.values() if case.iterations and case.starts == 1)
ON_GPU = ("ours", "torch", "flash-kmeans", "faiss-gpu", "fast-pytorch-kmeans")
# The floor's products, whatever the dtype of the rows: the fastest that a contender may stand on.
FLOOR_DTYPE = {"cpu": FULL, "cuda": HALF}
NOT_TORCHS_MEMORY = ("faiss-gpu",)


@dataclass
class KMeansRow(Row):
    setting: str = ""  # of the contender: what makes the comparison fair
    iterations: int | None = None  # that were run
    inertia: float | None = None  # of the returned centres, in float64
    wrong_labels: int | None = None  # given the starting centres, among the rows checked against float64
    checked: int | None = None
    rechecked: int | None = None  # by ours with all centres, in the last assignment
    product_rate: float | None = None  # floating-point operations per second, of which the floor is made


@dataclass(frozen=True)
class Problem:
    """Inputs of one size, and what does not depend on the case."""

    size: Size
    device: torch.device
    inputs: Rows
    truth: Truth
    rate: float

    @classmethod
    def make(cls, size: Size, device: torch.device, clock: Clock) -> "Problem":
        inputs = CASES["k-means fit"].inputs(size, device)
        rate = product_rate(device, clock, FLOOR_DTYPE[device.type], n=2048 if device.type == "cpu" else 8192)
        return cls(size, device, inputs, truth(inputs), rate)

    def row(self, case: KMeansCase, contender: KMeansContender) -> KMeansRow:
        n, d, k = self.size.n, self.size.d, self.size.clusters
        row = KMeansRow(case.name, contender.name, n, d, str(self.size.dtype).removeprefix("torch."), clusters=k)
        row.setting, row.units, row.product_rate = contender.fairness, case.assignments, self.rate
        row.floor = row.units * 2 * n * k * d / self.rate
        return row

    def measure(
        self, case: KMeansCase, clock: Clock, seconds: float, contenders: tuple[str, ...], skip: dict[str, str]
    ) -> tuple[list[KMeansRow], dict[str, Step]]:
        """Rows for the contenders, and the steps of those that were timed."""
        rows, steps = {}, {}
        for name in contenders:
            contender = CONTENDERS[name]
            row = rows[name] = self.row(case, contender)
            row.note = skip.get(name) or contender.obstacle(self.size, self.device) or ""
            if row.note:
                continue
            with failure_noted(row):
                self._judge(row, contender)
                if row.note:
                    continue
                run = contender.build(case)
                outcomes: list[Outcome] = []
                clock(lambda run=run, outcomes=outcomes: outcomes.append(run(self.inputs)))  # compiles and allocates
                row.iterations, row.rechecked = outcomes[0].iterations, outcomes[0].rechecked
                row.inertia = inertia(self.inputs.x, outcomes[0].centers)
                steps[name] = case.step(run, self.inputs)
        times = interleave(steps, clock, seconds)
        for name, of_step in times.items():
            record(rows[name], of_step)
        compare_with_ours(rows, times)
        return list(rows.values()), steps

    def _judge(self, row: KMeansRow, contender: KMeansContender) -> None:
        row.error = relative_error(contender, self.size, self.device)
        row.wrong_labels = self.truth.wrong_labels(contender.assign(*self.inputs))
        row.checked = len(self.truth.rows)
        if is_wrong(row.error, self.size):
            row.note = f"wrong: relative error {row.error:.1e} against float64"
        elif contender.ours and row.wrong_labels:
            row.note = f"wrong: {row.wrong_labels} labels are not those of float64"


def run_cpu(quick: bool, directory: Path) -> str:
    """Time (and, unless quick, memory) of all cases and contenders; the table."""
    file, all_rows = ResultsFile("cpu-kmeans", CPU, directory), []
    for size in QUICK_SIZES if quick else (*SIZES, *FEW_ROWS):
        problem = Problem.make(size, CPU, host_clock)
        for case in (case for case in CASES.values() if _is_feasible(case, size)):
            rows, _ = problem.measure(case, host_clock, QUICK_SECONDS if quick else CPU_SECONDS, case.contenders, {})
            for row in rows:
                if row.p50 is not None and not quick:
                    row.peak_bytes = peak_on_cpu(find, case.name, row.contender, size)
            file.add(rows)
            all_rows += rows
    return f"{table(all_rows, COLUMNS)}\n\n{file.path}"


def _is_feasible(case: KMeansCase, size: Size) -> bool:
    """Tell whether a case takes a CPU minutes, not hours."""
    return size in FEW_ROWS if case.starts > 1 else case.seeding is None or size in SEEDED_SIZES


def run_gpu(dry_run: bool, directory: Path) -> str:
    """All rows, written as soon as they are measured; the table. A dry run adds what a GPU would do."""
    report = _GpuRun("gpu-kmeans", torch.device("cpu" if dry_run else "cuda"), directory).table()
    return f"{report}\n\nOn a GPU:\n{_plan()}" if dry_run else report


class _GpuRun(Run):
    def table(self) -> str:
        for size in GPU_SIZES if self.on_gpu else DRY_SIZES:
            problem = Problem.make(size, self.device, self.clock)
            for case in GPU_CASES:
                self._measure(problem, case)
        return f"{table(self.rows, COLUMNS)}\n\n{self.file.path}"

    def _measure(self, problem: Problem, case: KMeansCase) -> None:
        size = problem.size
        work = case.assignments * size.n * size.d * size.clusters
        contenders = _on_gpu(case)
        keys = {name: (case.name, name, size.dtype) for name in contenders}
        skip = self.skip(keys, CALLS * work)
        seconds = GPU_SECONDS_PER_SIZE if self.on_gpu else 0.0
        rows, steps = problem.measure(case, self.clock, seconds, contenders, skip)
        for row in rows:
            if row.p50 is None:
                continue
            self.pace[keys[row.contender]] = row.p50 / work
            if self.on_gpu and row.contender not in NOT_TORCHS_MEMORY:
                row.peak_bytes = peak_on_gpu(steps[row.contender])
        self.add(rows)


def _on_gpu(case: KMeansCase) -> tuple[str, ...]:
    # Ours first: should a rival leave the device in a bad state, our figures are on disk.
    return tuple(name for name in ON_GPU if name in case.contenders)


def _plan() -> str:
    return "\n".join(
        f"{case.name}: N={size.n:,} D={size.d} K={size.clusters:,} {str(size.dtype).removeprefix('torch.')}, "
        f"{case.assignments} x {2 * size.n * size.d * size.clusters / 1e12:.3g} TFLOP: {', '.join(_on_gpu(case))}"
        for size in GPU_SIZES
        for case in GPU_CASES
    )


# Of the printed table, instead of those of the losses.
COLUMNS = {
    "inertia": lambda row: "" if row.inertia is None else f"{row.inertia:.6g}",
    "wrong labels": lambda row: "" if row.wrong_labels is None else f"{row.wrong_labels} of {row.checked}",
    "re-checked": lambda row: "" if row.rechecked is None else str(row.rechecked),
}

"""The losses on a CPU: all cases in float32, time and peak memory."""

from pathlib import Path

import torch

from benchmarks.harness.ceilings import measure_ceilings
from benchmarks.harness.contender import Size
from benchmarks.harness.memory import bar, peak_on_cpu
from benchmarks.harness.results import ResultsFile, Row, table
from benchmarks.harness.timing import host_clock
from benchmarks.losses.cases import CASES
from benchmarks.losses.contenders import CONTENDERS, find
from benchmarks.losses.measure import measure

CPU = torch.device("cpu")
# Compiling inside the measured process would count the compiler's memory.
NO_MEMORY = ("dense compiled", "two products")
QUICK_SECONDS, SECONDS = 2.0, 3.0
QUICK = tuple((case, Size(n, 128), None) for case in CASES.values() for n in (512, 2048))
# All cases: small batches against the plain formula alone, then three sizes; and how CCL grows: with the batch, with
# the width of the embeddings, with the centres.
GROWTH = ("ours", "dense")
DENSE = (*GROWTH, "dense compiled")
FULL = (
    *((case, Size(n, 128), DENSE) for case in CASES.values() if case.backward for n in (32, 64, 128, 256)),
    *((case, Size(n, 128), None) for case in CASES.values() for n in (512, 2048, 8192)),
    *((case, Size(32_768, 128), ("ours",)) for name, case in CASES.items() if name != "ccl"),
    *((CASES["ccl"], Size(n, 128), GROWTH) for n in (1024, 4096, 16384, 32768, 65536)),
    *((CASES["ccl"], Size(4096, d), GROWTH) for d in (64, 256, 512, 1024, 2048)),
    *((CASES["ccl"], Size(8192, 128, clusters=k), GROWTH[:1]) for k in (10, 1000, 10_000, 100_000)),
)


def run_cpu(quick: bool, directory: Path) -> str:
    """Time (and, unless quick, memory) of all cases and contenders; the table."""
    file, all_rows = ResultsFile("cpu", CPU, directory), []
    ceilings = measure_ceilings(CPU, host_clock)
    for name, value in vars(ceilings).items():
        file.add([Row("ceiling", name, 0, 0, "float32", note=f"{value:.4g}")])
    seconds = QUICK_SECONDS if quick else SECONDS
    for case, size, contenders in QUICK if quick else FULL:
        rows, _ = measure(case, size, CPU, host_clock, seconds, contenders, ceilings=ceilings)
        for row in rows:
            if row.p50 is not None and not quick and row.contender not in NO_MEMORY:
                row.peak_bytes = peak_on_cpu(find, case.name, row.contender, size)
        file.add(rows)
        all_rows += rows
    return f"{table(all_rows)}\n\n{ceilings}\n{file.path}"


def run_memory(directory: Path) -> str:
    """Peak memory of all cases and contenders at N = 8192 and 32768 against the bar; the table."""
    file, all_rows = ResultsFile("memory", CPU, directory), []
    for case in CASES.values():
        for size in (Size(8192, 128), Size(32768, 128)):
            for name in case.contenders:
                if name in NO_MEMORY or CONTENDERS[name].cuda_only:
                    continue
                row = Row(case.name, name, size.n, size.d, "float32")
                row.note = CONTENDERS[name].obstacle(size, CPU) or ""
                if not row.note:
                    row.peak_bytes = peak_on_cpu(find, case.name, name, size)
                    row.note = "the process died" if row.peak_bytes is None else _verdict(row, size)
                file.add([row])
                all_rows.append(row)
    return f"{table(all_rows)}\n\n{file.path}"


def _verdict(row: Row, size: Size) -> str:
    return f"{'within' if row.peak_bytes <= bar(size) else 'OVER'} the bar of {bar(size) / 2**20:.0f} MiB"

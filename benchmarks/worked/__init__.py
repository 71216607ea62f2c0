"""Worked examples on real data, a module each: its ``run(seed)`` gives plain figures. _names are what they share."""

import json
import pkgutil
import statistics
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.harness.results import machine, new_file

CPU = torch.device("cpu")


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def run(only: Sequence[str], seeds: int, directory: Path) -> str:
    """Run examples with the seeds 0, 1, ...; every run is a line of a new results file. Returns a table."""
    about = machine(CPU)
    path, rows = new_file(about, "worked", directory), []
    for name in only:
        example = import_module(f"{__name__}.{name}")
        for seed in range(seeds):
            start = time.process_time()
            figures = example.run(seed)
            rows.append({"example": name, "seed": seed, "cpu_seconds": time.process_time() - start, **figures})
            with path.open("a") as file:
                file.write(json.dumps(rows[-1] | about) + "\n")
    return f"{table(rows)}\n\n{path}"


def table(rows: Sequence[dict]) -> str:
    """Each figure of each example: its mean over the seeds, the least and the largest."""
    lines = [("example", "figure", "mean", "least..largest", "seeds")]
    for name in dict.fromkeys(row["example"] for row in rows):
        of_example = [row for row in rows if row["example"] == name]
        for figure in list(of_example[0])[2:]:  # after the example and the seed
            values = [row[figure] for row in of_example]
            spread = f"{min(values):.3f}..{max(values):.3f}"
            lines.append((name, figure, f"{statistics.fmean(values):.3f}", spread, str(len(values))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)

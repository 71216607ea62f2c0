"""Rows: appended to a file of JSON lines that is never overwritten, and printed as a table."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

DIRECTORY = Path(__file__).parents[1] / "results"
PACKAGES = (
    "triton",
    "pytorch-metric-learning",
    "lightly",
    "inf-cl",
    "memeff",
    "faiss-cpu",
    "faiss-gpu",
    "scikit-learn",
    "flash-kmeans",
    "fast-pytorch-kmeans",
)


@dataclass
class Row:
    case: str
    contender: str
    n: int
    d: int
    dtype: str
    note: str = ""  # why there is no time
    p20: float | None = None  # seconds, as p50, p80 and floor
    p50: float | None = None
    p80: float | None = None
    repetitions: int | None = None
    to_ours: float | None = None  # time over ours, median over the rounds
    to_products: float | None = None  # time over two bare N x N x D products
    peak_bytes: int | None = None  # above the inputs
    error: float | None = None  # relative, of value and gradient, against float64
    units: float | None = None  # N x N x D products that the method needs
    floor: float | None = None
    clusters: int = 0  # centres of the loss, or of k-means


def machine(device: torch.device) -> dict:
    """What a figure depends on."""
    status = _output("git", "status", "--porcelain", "--", ".", f":!{DIRECTORY}")  # None without git
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "commit": _output("git", "rev-parse", "HEAD") or _commit_in_a_file(),
        "dirty": None if status is None else bool(status),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class ResultsFile:
    """A new file of rows, each on disk as soon as it is added."""

    def __init__(self, what: str, device: torch.device, directory: Path = DIRECTORY):
        self.machine = machine(device)
        self.path = new_file(self.machine, what, directory)

    def add(self, rows: list[Row]) -> None:
        with self.path.open("a") as file:
            for row in rows:
                file.write(json.dumps(asdict(row) | self.machine | {"load": os.getloadavg()[0]}) + "\n")


def new_file(machine: dict, what: str, directory: Path) -> Path:
    """<date>-<device>-<what>.jsonl, numbered if that exists."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    stem = f"{machine['date'][:10]}-{name}-{what}"
    directory.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := directory / (f"{stem}-{number}.jsonl" if number > 1 else f"{stem}.jsonl")).exists():
        number += 1
    path.touch(exist_ok=False)
    return path


def table(rows: list[Row], more: dict[str, Callable[[Row], str]] | None = None) -> str:
    """One line for each case, size and contender; `more` columns, by their heads, before the note."""
    columns = COLUMNS | (more or {}) | {"note": lambda row: row.note}
    lines = [tuple(columns), *(tuple(cell(row) for cell in columns.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cell(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def _seconds(x: float) -> str:
    return f"{x:.3g} s" if x >= 1 else f"{x * 1e3:.3g} ms"


COLUMNS = {
    "case": lambda row: row.case,
    "N": lambda row: str(row.n),
    "D": lambda row: str(row.d),
    "K": lambda row: str(row.clusters or ""),
    "contender": lambda row: row.contender,
    "p50": lambda row: _cell(row.p50, _seconds),
    "p20..p80": lambda row: _cell(row.p50, lambda _: f"{_seconds(row.p20)}..{_seconds(row.p80)}"),
    "/ ours": lambda row: _cell(row.to_ours, "{:.2f}".format),
    "/ 2 products": lambda row: _cell(row.to_products, "{:.2f}".format),
    "/ floor": lambda row: _cell(row.floor and row.p50, lambda p50: f"{p50 / row.floor:.2f}"),
    "peak": lambda row: _cell(row.peak_bytes, lambda b: f"{b / 2**20:,.1f} MiB"),
}


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        return subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL, cwd=DIRECTORY.parent.parent, timeout=20
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit_in_a_file() -> str | None:
    """Where a copy of the files has no git: what `git rev-parse HEAD > COMMIT` wrote before they were copied."""
    file = DIRECTORY.parents[1] / "COMMIT"
    return file.read_text().strip() if file.exists() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

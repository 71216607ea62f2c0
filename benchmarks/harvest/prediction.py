"""Predicted times of stage `losses` on an H200: arithmetic over counts in the compiled code and the device's ceilings.

A multiprocessor works on tiles. One tile takes each unit some time: the tensor cores its products, the special-function
units its exponentials, the four schedulers its instructions, the L2 its bytes. Within a block products come before what
is done with them, and where no copy is in flight at the loop's start the copies before both; of what is not the busiest
unit's, the blocks that share a multiprocessor hide all but an equal share. Nothing here was measured, unless the
ceilings were: then `python -m benchmarks predict FOLDER` takes them from the harvest.
"""

import json
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

from benchmarks.harvest import plan
from benchmarks.harvest.plan import Problem

FILE = Path(__file__).parents[1] / "predicted-h200.jsonl"
PROCESSORS = 132
# Per second, but the clock in Hz; the product at 8192 x 8192 x 8192.
ASSUMED = {
    "matrix_rate": 790e12,
    "copy_rate": 4.3e12,
    "clock": 1.7e9,
    "l2_rate": 25 * PROCESSORS * 1.7e9,
    "exponential_rate": 16 * PROCESSORS * 1.7e9,
}
SCHEDULERS = 4  # of a multiprocessor: a warp's instruction each in a cycle
HALF_BYTES, WIDE_BYTES = 2, 4
LAUNCH_SECONDS = 10e-6  # assumed: of the small kernels around, in a graph
HOST_SECONDS = {"forward": 0.4e-3, "backward": 0.6e-3}  # assumed: of the calls that a graph does without
STRIP_BYTES = max(256 << 20, 140 * 10**9 // 32)  # of the weights that the backward holds at once


@dataclass(frozen=True)
class Counts:
    """What the audit of the launch table reads of one kernel on sm_90; counts by element of a tile."""

    kernel: str
    launch: tuple[int, ...]  # block_m, block_n, block_d, warps, stages
    blocks_per_multiprocessor: int
    copies_in_flight: int | None
    narrowest_product: int | None  # columns
    instructions: float  # of a thread
    exponentials: float


def tile_seconds(counts: Counts, d: int, ceilings: dict[str, float]) -> dict[str, float]:
    """Of each unit, for one tile on one multiprocessor; and "tile", what they come to together."""
    block_m, block_n, block_d, *_ = counts.launch
    elements = block_m * block_n
    products = 2 if counts.kernel == "backward_rows" else 1
    loaded = (block_n if d <= block_d else block_m + block_n) * d * HALF_BYTES
    parts = {
        "tensor cores": products * 2 * elements * d * narrowness(counts) * PROCESSORS / ceilings["matrix_rate"],
        "exponentials": counts.exponentials * elements * PROCESSORS / ceilings["exponential_rate"],
        "instructions": counts.instructions * elements / 32 / SCHEDULERS / ceilings["clock"],
        "L2": loaded * PROCESSORS / ceilings["l2_rate"],
    }
    in_turn = [parts["tensor cores"], max(parts["instructions"], parts["exponentials"])]
    in_turn += [] if counts.copies_in_flight else [parts["L2"]]
    busiest = max(in_turn)
    hidden = busiest + (sum(in_turn) - busiest) / counts.blocks_per_multiprocessor
    return parts | {"tile": max(hidden, parts["L2"])}


def narrowness(counts: Counts) -> float:
    """How much longer the narrowest product of 64 rows takes than its arithmetic, as shared memory feeds it: 128 bytes
    in a cycle of 16 columns of both operands, against 4096 operations."""
    n = counts.narrowest_product or 64
    return max(1.0, ((64 + n) * 16 * HALF_BYTES / 128) / (2 * 64 * n * 16 / 4096))


def kernel_seconds(counts: Counts, problem: Problem, ceilings: dict[str, float]) -> tuple[float, str]:
    """And what limits it: a unit, or that the units wait for each other."""
    n, (block_m, block_n, *_) = problem.n, counts.launch
    tiles = ceil(n / block_m) * ceil(n / block_n)
    if counts.kernel in ("forward_triangle", "backward_weights"):
        tiles = (tiles + ceil(n / block_m)) / 2
    parts = tile_seconds(counts, problem.d, ceilings)
    total = parts.pop("tile")
    busiest = max(parts, key=parts.get)
    at_once = PROCESSORS * counts.blocks_per_multiprocessor
    waves = max(1.0, tiles / at_once)  # few tiles leave multiprocessors idle
    limiter = busiest if parts[busiest] >= 0.8 * total else "units that wait for each other"
    return waves * counts.blocks_per_multiprocessor * total, limiter


def strip_seconds(problem: Problem, ceilings: dict[str, float]) -> dict[str, float]:
    """What the strips' backward does besides its kernel: a library's products, and the memory between them."""
    n, d = problem.n, problem.d
    rows = max(128, STRIP_BYTES // (HALF_BYTES * n) // 128 * 128)
    weights = 3 * HALF_BYTES * n**2 / 2  # written once and read twice
    results = ceil(n / rows) * n / 2 * d * 2 * WIDE_BYTES  # of every strip added to all rows below it
    return {
        "tensor cores of the strips' products": 2 * n**2 * d / ceilings["matrix_rate"],
        "memory between the strips' products": (weights + results) / ceilings["copy_rate"],
    }


def predict(counts: dict[str, Counts], ceilings: dict[str, float]) -> list[dict]:
    """A line for every case of stage `losses`; `counts` by `name_of`."""
    lines = []
    for key in plan.loss_keys():
        problem = Problem(key["n"], key["d"], key["case"] == Problem(0, 0, ids=True).name)
        if key["case"] == plan.PRODUCTS:
            parts, used = {"tensor cores": 4 * problem.n**2 * problem.d / ceilings["matrix_rate"]}, []
        else:
            used = [name for name in kernels(problem, key["pass"]) if name in counts]
            parts = {}
            for name in used:
                seconds, limiter = kernel_seconds(counts[name], problem, ceilings)
                parts[limiter] = parts.get(limiter, 0.0) + seconds
            if any(counts[name].kernel == "backward_weights" for name in used):
                parts |= strip_seconds(problem, ceilings)
        total, limiter = sum(parts.values()) + LAUNCH_SECONDS, max(parts, key=parts.get)
        if key.get("mode") == "eager" and HOST_SECONDS[key["pass"]] > total:
            total, limiter = HOST_SECONDS[key["pass"]], "host"
        if key["case"] == plan.PRODUCTS and HALF_BYTES * problem.n**2 > 80e9:
            continue  # the matrix does not fit
        in_ms = {name: round(1e3 * seconds, 4) for name, seconds in parts.items()}
        lines.append(key | {"ms": round(1e3 * total, 4), "limiter": limiter, "parts_ms": in_ms, "kernels": used})
    return lines


def kernels(problem: Problem, which: str) -> list[str]:
    """Those that the pass may use, by `name_of`; the launch table says which."""
    found = ["forward_triangle"] if which == "forward" else ["backward_rows", "backward_weights"]
    return [name_of(kernel, problem) for kernel in found]


def name_of(kernel: str, problem: Problem) -> str:
    return f"{kernel} D={problem.d}{' ids' if problem.ids else ''}"


def read(path: Path = FILE) -> tuple[dict[str, float], dict[str, Counts], list[dict]]:
    """The ceilings, the counts and the predictions of a file."""
    first, *rest = map(json.loads, path.read_text().splitlines())
    counts = {
        line["name"]: Counts(**line["counts"] | {"launch": tuple(line["counts"]["launch"])})
        for line in rest
        if "counts" in line
    }
    return first["ceilings"], counts, [line for line in rest if "ms" in line]


def write(counts: dict[str, Counts], ceilings: dict[str, float], source: str, path: Path = FILE) -> None:
    """First the ceilings and where they come from, then the counts, then a line for each case."""
    lines = [{"prediction": "not measured", "device": "NVIDIA H200", "ceilings": ceilings, "ceilings_are": source}]
    lines += [{"name": name, "counts": asdict(found)} for name, found in counts.items()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines + predict(counts, ceilings)))

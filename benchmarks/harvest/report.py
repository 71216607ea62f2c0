"""What came of a harvest: the state of its stages, what is wrong or missing, and its times."""

import re
from pathlib import Path

from benchmarks.harvest import plan
from benchmarks.harvest.device_tests import failures
from benchmarks.harvest.run import RESULTS, read_lines

FILES = (
    "env.txt",
    "stages.txt",
    "smoke.jsonl",
    "results.jsonl",
    "pytest.log",
    "junit.xml",
    "ncu.txt",
    "sanitizer.txt",
)
STATUS = re.compile(r"^stage (\w+): (.*)$", re.MULTILINE)
KEYS = {"losses": plan.loss_keys, "launches": plan.launch_keys, "kmeans": plan.cluster_keys}
# Notes that say nothing against a harvest.
NOT_HERE = re.compile(
    r"does not fit|is not installed|runs on CUDA only|names no folder|no wheel of it|^not started: its arrays"
)
SHOWN = 20  # faults


def report(folder: str | Path, *stages: str) -> tuple[str, bool]:
    """The text, and whether each of these stages did all its work and found nothing wrong."""
    folder = Path(folder)
    found = faults(folder, stages)
    parts = [f"\n{len(found)} faults" if found else "\nnothing is wrong or missing"]
    parts += [f"  {fault}" for fault in found[:SHOWN]]
    return "\n".join([*parts, "", *times(read_lines(folder / RESULTS))]).rstrip(), not found


def statuses(folder: Path) -> dict[str, str]:
    return dict(STATUS.findall((folder / "stages.txt").read_text()))


def faults(folder: Path, stages: tuple[str, ...]) -> list[str]:
    """A sentence for each thing that is not as it should be."""
    found = [f"{name} is not there" for name in FILES if not (folder / name).exists()]
    state = statuses(folder)
    found += [
        f"stage {stage}: {state.get(stage, 'not run')}"
        for stage in stages
        if not re.match("ok|skipped after", state.get(stage, ""))
    ]
    lines, smoke = read_lines(folder / RESULTS), read_lines(folder / "smoke.jsonl")
    found += [f"smoke: {_named(line)}: {line['note']}" for line in smoke if not line.get("ok")]
    for stage in stages:
        of_stage = [line for line in lines if line["stage"] == stage]
        found += [
            f"{stage}: no line of {_named(key)}"
            for key in KEYS.get(stage, list)()
            if not any(key.items() <= line.items() for line in of_stage)
        ]
    found += [f"{line['stage']}: {_named(line)}: {line['note']}" for line in lines if _is_fault(line)]
    return found + [f"test {name}" for name in failures(folder / "junit.xml")]


def _is_fault(line: dict) -> bool:
    if not line.get("note") or NOT_HERE.search(line["note"]):
        return False
    # A candidate may not fit the device, and a rival may fail; in a dry run both would do so for want of a comma.
    optional = line.get("tried", "shipped") != "shipped" or line.get("contender", "ours") not in ("ours", plan.PRODUCTS)
    optional |= line["stage"] == "warm"  # the stage that wants what could not be compiled says so itself
    return bool(line.get("dry_run")) or not optional


def _named(line: dict) -> str:
    known = ("comparison", "case", "check", "relation", "name", "kernel", "contender", "tried", "pass", "mode", "dtype")
    words = [str(line[name]) for name in known if line.get(name)]
    sizes = [f"{name}={line[name]}" for name in ("n", "d", "clusters", "iteration") if name in line]
    return " ".join(words + sizes)


def times(lines: list[dict]) -> list[str]:
    """Milliseconds of every case that has them; those of an interpreter are none."""
    lines = [line for line in lines if not line.get("dry_run")]
    return [f"{1e3 * line['p50']:12.4f} ms  {_named(line)}" for line in lines if line.get("p50")] + [
        f"{1e3 * value:12.4f} ms  {_named(line)} {name.removesuffix(' p50')}"
        for line in lines
        for name, value in line.items()
        if name.endswith(" p50")
    ]

"""A harvested folder becomes files of results, tables of the pages, and the launch table's next version."""

import json
from pathlib import Path

from benchmarks.harness.results import new_file
from benchmarks.harvest import plan, prediction
from benchmarks.harvest.report import faults
from benchmarks.harvest.run import RESULTS, read_lines
from benchmarks.pages import readme

# Results files by the stages whose lines they have.
FILES = {"gpu": ("losses", "large"), "gpu-kmeans": ("kmeans",), "gpu-launches": ("launches", "best_launches")}
CLUSTER_RIVALS = "k-means iteration"  # measured beside the losses' rivals
TABLES = ("gpu", "gpu-kmeans")  # of which a page has a table
GAIN = 0.03  # share of its time that a launch must save to be proposed


class ImportRefused(Exception):
    """What was harvested is no measurement; the message says why."""


def import_folders(folders: list[Path], directory: Path, commit: str | None = None) -> str:
    """What is wrong, the new files, predicted beside measured, and the proposed launches.

    The pages get their tables if no smoke test failed: the figures of a kernel that is wrong are none.
    """
    lines = [line for folder in folders for line in read_lines(folder / RESULTS)]
    smoke = [line for folder in folders for line in read_lines(folder / "smoke.jsonl")]
    names = ", ".join(map(str, folders))
    if any(line.get("dry_run") for line in lines + smoke):
        raise ImportRefused(f"{names}: a dry run; its times are those of an interpreter")
    machine = next((line for line in lines if line.get("case") == "machine"), None)
    if machine is None:
        raise ImportRefused(f"{names}: no line says which machine this was")
    machine = {name: value for name, value in machine.items() if name not in ("stage", "case")}
    machine["commit"] = commit or machine["commit"]
    if not machine["commit"]:
        raise ImportRefused(f"{names}: no commit is named; --commit names it")
    ceilings = measured_ceilings(lines)
    found = {what: _of_stages(lines, what) for what in FILES}
    for line in found["gpu"]:
        line |= floor(line, ceilings)
    files = {what: _write(machine, what, rows, directory) for what, rows in found.items() if rows}
    wrong = [line for line in smoke if not line.get("ok")]
    if not wrong and smoke:
        for what in TABLES:
            if what in files:
                readme.update(files[what])
    of_pages = "no page has been touched, for the smoke test found errors" if wrong or not smoke else "pages updated"
    problems = [fault for folder in folders for fault in faults(folder, ())]
    parts = {
        "wrong": problems or ["nothing"],
        f"written ({of_pages})": list(map(str, files.values())),
        "ceilings": _compare_ceilings(ceilings),
        "predicted beside measured, ms": compare_with_prediction(lines, ceilings),
        "the launch table's next version": propose(lines),
    }
    return "\n".join(f"{title}:\n" + "".join(f"  {text}\n" for text in texts) for title, texts in parts.items())


def measured_ceilings(lines: list[dict]) -> dict[str, float]:
    return {line["name"]: line["value"] for line in lines if line.get("case") == "ceiling" and line.get("value")}


def _of_stages(lines: list[dict], what: str) -> list[dict]:
    """Those that say something about a case; comparisons of k-means stand among those of the losses."""
    found = []
    for line in lines:
        clusters = line.get("case") == CLUSTER_RIVALS
        home = "gpu-kmeans" if clusters else next((w for w, stages in FILES.items() if line["stage"] in stages), None)
        if home == what and "comparison" not in line:
            found.append(dict(line))
    return found


def floor(line: dict, ceilings: dict[str, float]) -> dict:
    """Units of N x N x D that a pass of ours needs; their seconds, or those of the exponentials if these are more."""
    if "pass" not in line or not {"matrix_rate", "exponential_rate"} <= ceilings.keys():
        return {}
    n, d = line["n"], line["d"]
    units = 0.5 if line["pass"] == "forward" else 2.0 if d <= 256 else 1.5
    exponentials = n**2 * (0.5 if line["pass"] == "forward" else 1.0)
    seconds = max(2 * units * n**2 * d / ceilings["matrix_rate"], exponentials / ceilings["exponential_rate"])
    return {"units": units, "floor": seconds}


def _write(machine: dict, what: str, rows: list[dict], directory: Path) -> Path:
    path = new_file(machine, what, directory)
    path.write_text("".join(json.dumps(row | machine) + "\n" for row in rows))
    return path


def _compare_ceilings(ceilings: dict[str, float]) -> list[str]:
    return [
        f"{name}: assumed {assumed:.3g}, measured {ceilings[name]:.3g}" if name in ceilings else f"{name}: not measured"
        for name, assumed in prediction.ASSUMED.items()
    ]


def compare_with_prediction(lines: list[dict], ceilings: dict[str, float]) -> list[str]:
    """By the committed prediction, by the same counts with the ceilings that were measured, and as it came."""
    assumed, counts, predicted = prediction.read()
    again = prediction.predict(counts, assumed | ceilings)
    texts = []
    for before, after in zip(predicted, again, strict=True):
        key = {name: before[name] for name in ("case", "n", "d", "pass", "mode") if name in before}
        measured = [1e3 * line["p50"] for line in lines if line.get("p50") and key.items() <= line.items()]
        came = f"{measured[0]:10.3f}  {measured[0] / after['ms']:5.2f}x" if measured else f"{'-':>10}  {'':6}"
        name = f"{key['case']} {key['n']} x {key['d']} {key.get('pass', '')} {key.get('mode', '')}"
        texts.append(f"{name:48} {before['ms']:10.3f} {after['ms']:10.3f} {came}  {after['limiter']}")
    return [f"{'':48} {'predicted':>10} {'ceilings':>10} {'measured':>10}", *texts]


def propose(lines: list[dict]) -> list[str]:
    """An entry for each kernel and D where a candidate was faster than the shipped launch by more than the spread."""
    texts = []
    for kernel, d in plan.CANDIDATES:
        tried = {}
        for line in lines:  # of two calls the second counts
            if (line.get("kernel"), line.get("d")) == (kernel, d) and line.get("p50") and not line["note"]:
                tried[line["tried"]] = line
        shipped, best = tried.get("shipped"), min(tried.values(), key=lambda line: line["p50"], default=None)
        if shipped is None:
            texts.append(f"{kernel}, D = {d}: the shipped launch was not timed")
            continue
        before, after = 1e3 * shipped["p50"], 1e3 * best["p50"]
        if after > (1 - GAIN) * before or best["p80"] >= shipped["p20"]:
            texts.append(f"{kernel}, D = {d}: as it is, {_launch(shipped)}, {before:.3f} ms")
        else:
            change = f"was {_launch(shipped)}; {before:.3f} -> {after:.3f} ms of its pass"
            texts.append(f"{kernel}, D = {d}: {_launch(best)}  # {change}")
    return texts


def _launch(line: dict) -> str:
    return f"Launch({', '.join(map(str, line['launch']))})"

"""Natural images: what `ccl-fast compare` found, as a results file and as tables of paired gains.

A line of the file is one finished run of one objective: its split (the classes trained on), seed, what it does
otherwise than the comparison named first, AUROC and FPR95 of every detector and OOD set, k-NN accuracy, and the first
and the last line of its log.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.results import DIRECTORY, ResultsFile

BASELINE = "simclr"

METRICS = ("auroc", "fpr95_id")
# Columns of the tables: title -> the OOD set or the mean of sets.
SETS = {"near": "near", "ImageNet": "data/imagenet-other", "far": "far"}
DETECTORS = (
    "all/ensemble",
    "layers/ensemble",  # of earlier files
    "encoder/nearest_neighbor",
    "encoder/mahalanobis",
    "head/nearest_neighbor",
    "head/mahalanobis",
)
CONFIDENCE = 0.95


def collect(folders: Sequence[Path], commit: str | None = None, directory: Path = DIRECTORY) -> Path:
    """A results file of comparisons' folders; SimCLR's runs, which comparisons share, are in it once.

    Args:
        folders: of comparisons; the first of the defaults.
        commit: that they were run at; by default the present one.
    """
    file = ResultsFile("natural", torch.device("cpu"), directory)
    reports = [json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob("seed*/report.json"))]
    if not reports:
        raise ValueError(f"folders: expected reports of comparisons in {', '.join(map(str, folders))}, got none")
    commit = commit or file.machine["commit"]
    first, seen = reports[0]["arguments"], set()
    with file.path.open("a") as lines:
        for report in reports:
            for objective, results in report["results"].items():
                line = _line(report, objective, results, first)
                key = (line["variant"], *line["split"], line["seed"])
                if key not in seen:
                    seen.add(key)
                    lines.write(json.dumps(line | {"cpu": file.machine["cpu"], "commit": commit}) + "\n")
    return file.path


def _line(report: dict, objective: str, results: dict, first: dict) -> dict:
    from ccl_fast.evaluation import DEFAULT  # the extra "train" is not everywhere
    from ccl_fast.training.objectives import OPTIONS

    arguments = report["arguments"]
    chosen = ("objective", "clusters", *OPTIONS)
    changed = {name: arguments[name] for name in chosen if arguments[name] != first[name]}
    log = [line for line in report["log"][objective] if line["stage"] == objective]
    return {
        "natural": objective,
        "variant": objective if objective == BASELINE else _name(objective, changed),
        "split": arguments["in_classes"],
        "seed": arguments["seed"],
        "images": report["images"]["train"],
        "results": {
            detector: {_short(of): {metric: by_set[of][metric] for metric in METRICS} for of in by_set}
            for detector, by_set in results.items()
        },
        "knn": report["knn"][objective],
        "log": [log[0], log[-1]],
        "default": DEFAULT,
        "environment": report["environment"],
    }


def _short(name: str) -> str:
    """Of an OOD set, "data/imagenet-other", wherever that folder is."""
    return "/".join(Path(name).parts[-2:])


def _name(objective: str, changed: dict) -> str:
    words = [f"{name.replace('_', ' ')} {value}" for name, value in changed.items() if name != "objective"]
    return ", ".join([objective, *words])


def gains(rows: Sequence[dict], variant: str, value) -> tuple[list[float], list[float], list[float]]:
    """Of SimCLR, of the variant, and their differences, by split and seed."""
    of = {name: {(*row["split"], row["seed"]): value(row) for row in rows if row["variant"] == name}
          for name in (BASELINE, variant)}  # fmt: skip
    pairs = [(of[BASELINE][key], ours) for key, ours in of[variant].items() if key in of[BASELINE]]
    return [a for a, _ in pairs], [b for _, b in pairs], [b - a for a, b in pairs]


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean (Student's t)."""
    if len(values) < 2:
        return float("nan")
    from scipy import stats

    error = statistics.stdev(values) / len(values) ** 0.5
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error


def table(rows: Sequence[dict], variant: str = "ccl") -> list[str]:
    """A line for every detector and kind of OOD set, and the k-NN accuracy."""
    lines = ["| features, detector | OOD | SimCLR | CCL | gain | better for |", "|---|---|---|---|---|---|"]
    for detector in (name for name in DETECTORS if name in rows[0]["results"]):  # not all files have the newest
        mark = " (default)" if detector == rows[0]["default"] else ""
        for title, of in SETS.items():
            found = gains(rows, variant, lambda row, d=detector, of=of: row["results"][d][of]["auroc"])
            lines.append(_row(detector.replace("/", ", ").replace("_", " ") + mark, title, *found))
    for level in ("encoder", "head"):
        found = gains(rows, variant, lambda row, level=level: row["knn"][level])
        lines.append(_row(f"{level}, k-NN accuracy", "", *found))
    return lines


def _row(name: str, of: str, theirs: list[float], ours: list[float], gain: list[float]) -> str:
    cells = [name, of, f"{statistics.fmean(theirs):.3f}", f"{statistics.fmean(ours):.3f}", _gain(gain)]
    return f"| {' | '.join([*cells, f'{sum(g > 0 for g in gain)} of {len(gain)}'])} |"


def _gain(gain: Sequence[float]) -> str:
    return f"{statistics.fmean(gain):+.3f} ± {interval(gain):.3f}"


def ablation(rows: Sequence[dict]) -> list[str]:
    """A line for every variant: gains of the default detector, of the head's, of k-NN accuracy; what clusters were."""
    default, head = rows[0]["default"], "head/mahalanobis"
    lines = [
        "| variant | runs | near | ImageNet | far | head: near | k-NN accuracy | mates of one class | believed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    variants = dict.fromkeys(row["variant"] for row in rows if row["variant"] != BASELINE)
    for variant in variants:
        columns = [(default, of) for of in SETS.values()] + [(head, "near")]
        found = [gains(rows, variant, lambda row, d=d, of=of: row["results"][d][of]["auroc"])[2] for d, of in columns]
        found.append(gains(rows, variant, lambda row: row["knn"]["encoder"])[2])
        logs = [row["log"] for row in rows if row["variant"] == variant]
        cells = [
            variant,
            str(len(found[0])),
            *map(_gain, found),
            _course(logs, "same_class"),
            _course(logs, "believed"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _course(logs: Sequence[Sequence[dict]], key: str) -> str:
    """Mean of the first epoch -> mean of the last."""
    if any(key not in line for log in logs for line in log):
        return ""
    first, last = (statistics.fmean(log[i][key] for log in logs) for i in (0, -1))
    return f"{first:.2f} -> {last:.2f}"


def words(rows: Sequence[dict], source: str, link: str) -> str:
    splits = sorted({tuple(row["split"]) for row in rows})
    run = rows[0]["environment"]
    classes = " and of ".join(str(list(split)) for split in splits)
    return (
        f"CIFAR-10 (JPEG), {rows[0]['images']:,} images of the classes {classes}, without their labels. Near: test "
        "images of the other classes; ImageNet: its classes that are none of CIFAR's; far: mean over these, textures, "
        "noise, letters and digits. Gain: paired with SimCLR's run of the same split and seed, mean and half the 95 % "
        "confidence interval (Student's t); the spread is that of seeds and splits. "
        f"{rows[0]['cpu']}, torch {run['torch']}, Python {run['python']}, {run['date'][:10]}, "
        f"commit {rows[0]['commit'][:10]}; [{source}]({link})."
    )

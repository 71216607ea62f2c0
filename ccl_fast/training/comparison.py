"""SimCLR and CCL over several seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from ccl_fast.errors import ArgumentError
from ccl_fast.evaluation import DEFAULT, GROUPS
from ccl_fast.files import write_atomically
from ccl_fast.training.arguments import comparable
from ccl_fast.training.experiment import train

# Arguments of ``train`` that are compare's to set.
SET_BY_COMPARE = ("seed", "method")


def compare(
    output: str | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    overwrite: bool = False,
    resume: bool = False,
    **options,
) -> dict:
    """Train SimCLR and CCL on the same budget with several seeds, and tell what CCL gains.

    Every seed is a run of ``train`` with ``method="compare"`` in a folder of its own. The seeds share nothing but the
    data, so the gain, CCL's metric less SimCLR's of the same seed, has a spread: that of the seeds, not of new data.

    Args:
        output: folder for comparison.json and a folder for each seed; by default a fresh ``runs/compare-<time>``.
        seeds: at least two different seeds.
        overwrite: replace the results in an existing output folder.
        resume: go on with the comparison in the output folder; seeds that are done are not run again.
        options: the other arguments of ``train``.

    Returns:
        The content of comparison.json: for every detector, kind of OOD set ("near", "far") and metric the values of
        both methods and the gains, by seed, with mean and standard deviation; the arguments, and where and when each
        seed was run.

    Raises:
        ArgumentError: a ValueError naming the argument, what was expected and what came.
        FileExistsError: the output folder exists.
    """
    not_options = [name for name in options if name in SET_BY_COMPARE]
    if not_options:
        raise ArgumentError(f"{not_options[0]}: expected other arguments of train, as compare sets this one")
    seeds = list(seeds)
    if len(set(seeds)) != len(seeds) or len(seeds) < 2:
        raise ArgumentError(f"seeds: expected at least two different seeds, got {seeds}")
    if resume and (overwrite or output is None):
        raise ArgumentError("resume: expected the output folder of a comparison, and not to overwrite it")
    folder = Path(output or datetime.now().strftime("runs/compare-%Y%m%d-%H%M%S"))
    if folder.exists() and not (overwrite or resume):
        raise FileExistsError(
            f"output: expected a folder that does not exist yet, or overwrite or resume, got {folder}"
        )
    reports = []
    for seed in seeds:
        of_seed = folder / f"seed{seed}"
        if resume and (of_seed / "report.json").exists():
            reports.append(_finished(of_seed / "report.json", options))
            continue
        started = resume and (of_seed / "checkpoints").exists()
        reports.append(
            train(output=str(of_seed), seed=seed, method="compare", overwrite=overwrite, resume=started, **options)
        )
    comparison = {
        "seeds": seeds,
        "arguments": comparable(reports[0]["arguments"]) | {"seed": None},
        "environments": [report["environment"] for report in reports],
        "default": DEFAULT,
        "results": summarize([report["results"] for report in reports]),
    }
    text = json.dumps(comparison, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "comparison.json", lambda file: file.write(text.encode()))
    print(format_comparison(comparison))
    print(f"written to {folder}")
    return comparison


def _finished(path: Path, options: dict) -> dict:
    report = json.loads(path.read_text())
    for name, value in comparable(options).items():
        was = report["arguments"][name]
        if was != value:
            raise ArgumentError(f"{name}: expected {was!r}, as the comparison to resume has it, got {value!r}")
    return report


def summarize(results: Sequence[dict]) -> dict:
    """From the results of each seed: {detector: {group: {metric: {"simclr", "ccl", "gain"}}}} with mean and spread."""
    summary: dict = {}
    for detector, by_set in results[0]["ccl"].items():
        summary[detector] = {}
        for group in [group for group in GROUPS if group in by_set]:
            summary[detector][group] = {}
            for metric in by_set[group]:
                simclr, ccl = ([r[method][detector][group][metric] for r in results] for method in ("simclr", "ccl"))
                gain = [ours - theirs for ours, theirs in zip(ccl, simclr, strict=True)]
                moments = {"simclr": _moments(simclr), "ccl": _moments(ccl), "gain": _moments(gain)}
                summary[detector][group][metric] = moments
    return summary


def _moments(values: list[float]) -> dict:
    deviation = statistics.stdev(values)
    error = deviation / math.sqrt(len(values))
    return {"values": values, "mean": statistics.fmean(values), "deviation": deviation, "standard_error": error}


def format_comparison(comparison: dict) -> str:
    """A line for every detector and kind of OOD sets: AUROC of both methods, and the gain, with the spread."""
    lines = [
        f"AUROC, mean and standard deviation over {len(comparison['seeds'])} seeds",
        f"{'features/detector':29}{'OOD':6}{'SimCLR':>16}{'CCL':>16}{'gain':>17}{'seeds better':>14}",
    ]
    for detector, groups in comparison["results"].items():
        name = detector + (" *" if detector == comparison["default"] else "")
        for group, metrics in groups.items():
            parts = metrics["auroc"]
            cells = [f"{parts[method]['mean']:.3f} +- {parts[method]['deviation']:.3f}" for method in ("simclr", "ccl")]
            gain = parts["gain"]
            better = f"{sum(value > 0 for value in gain['values'])} of {len(gain['values'])}"
            lines.append(
                f"{name:29}{group:6}{cells[0]:>16}{cells[1]:>16}"
                f"{gain['mean']:+9.3f} +- {gain['deviation']:.3f}{better:>13}"
            )
    lines.append("* the default. Gain: CCL less SimCLR of the same seed.")
    return "\n".join(lines)

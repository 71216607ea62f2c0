"""What an evaluation leaves behind: the table, and a page and a file of its figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ccl_fast.commands.environment import describe_environment
from ccl_fast.commands.image_sets import ImageSets
from ccl_fast.commands.reproduction import command_line, resolved
from ccl_fast.evaluation import (
    CONFIDENCE,
    DEFAULT,
    GROUPS,
    RESAMPLES,
    Evaluation,
    ShownPicture,
    describe_thresholds,
    difference_intervals,
    metric_intervals,
    write_page,
)
from ccl_fast.files import write_atomically
from ccl_fast.metrics import cluster_quality
from ccl_fast.training.objectives import OBJECTIVES
from ccl_fast.training.telling import say


def describe(arguments: dict, sets: ImageSets, evaluations: Mapping[str, Evaluation], device: torch.device) -> dict:
    """Return the content of report.json, but for what only training knows.

    Args:
        arguments: as a file keeps them.
        sets: the images.
        evaluations: by objective.
        device: on which they were made.
    """
    titles: Mapping[str, str] = {name: objective.title for name, objective in OBJECTIVES.items()}
    classes = sets.train.classes
    report = {
        "arguments": arguments,
        "resolved": resolved(arguments, sets, device),
        "images": {
            "train": len(sets.train),
            "test": len(sets.test),
            "ood": {name: len(images) for name, images in sets.ood.items()},
        },
        "near": list(sets.near),
        "far": list(sets.far),
        "default": DEFAULT,
        "titles": {objective: titles[objective] for objective in evaluations},
        "results": {objective: evaluation.metrics for objective, evaluation in evaluations.items()},
        "bootstrap": {"resamples": RESAMPLES, "confidence": CONFIDENCE},
        "intervals": {
            objective: metric_intervals(evaluation.resampled) for objective, evaluation in evaluations.items()
        },
    }
    report["thresholds"] = {o: describe_thresholds(of.scores, list(sets.ood)) for o, of in evaluations.items()}
    notes = {objective: evaluation.notes for objective, evaluation in evaluations.items() if evaluation.notes}
    if notes:
        report["notes"] = notes
    if len(evaluations) == 2:  # of the objective less the baseline
        report["differences"] = difference_intervals(*(evaluation.resampled for evaluation in evaluations.values()))
    if classes is not None:
        report["classes"] = len(classes.unique())
        report["clustering"] = {m: cluster_quality(j.cluster_ids, classes) for m, j in evaluations.items()}
    if (command := command_line(arguments)) is not None:
        report["command"] = command
    if all(evaluation.knn for evaluation in evaluations.values()):  # classes are known
        report["knn"] = {objective: evaluation.knn for objective, evaluation in evaluations.items()}
        report["linear"] = {objective: evaluation.linear for objective, evaluation in evaluations.items()}
    return report | {"environment": describe_environment(device)}


def describe_images(numbers: Mapping[str, int], near: Sequence[str], far: Sequence[str]) -> str:
    """Return, in a line, how many images there are to train on, to test on and to tell apart."""
    of_groups = [
        f"{group} " + ", ".join(f"{name} ({numbers[name]})" for name in names)
        for group, names in (("near", near), ("far", far))
        if names
    ]
    return f"{numbers['train']} training and {numbers['test']} test images; OOD: {'; '.join(of_groups)}"


def measures(report: dict, objective: str) -> dict[str, float]:
    """Return what a logger gets of a report: AUROC by set and detector, and the accuracies, if classes are known."""
    found = {
        f"auroc/{name}/{detector}": metrics["auroc"]
        for detector, by_set in report["results"][objective].items()
        for name, metrics in by_set.items()
    }
    for level, accuracy in report.get("knn", {}).get(objective, {}).items():
        found[f"knn/{level}"] = accuracy
    if "linear" in report:
        found["linear/encoder"] = report["linear"][objective]
    return found


def format_table(report: dict) -> str:
    """Return the metrics as text: a line for each detector, AUROC and FPR95 for each objective and kind of OOD sets."""
    results, titles = report["results"], report["titles"]
    width = max(18, *(len(title) + 8 for title in titles.values()))  # of a column and of the two in it
    columns = [(objective, group) for objective in results for group in GROUPS if report[group]]
    images = report["images"]
    lines = [
        describe_images(
            {"train": images["train"], "test": images["test"]} | images["ood"], report["near"], report["far"]
        ),
        " " * 29 + "".join(f"{f'{titles[objective]}, {group}':>{width}}" for objective, group in columns),
        f"{'features/detector':29}" + f"{'AUROC':>{width - 8}}{'FPR95':>8}" * len(columns),
    ]
    for name in next(iter(results.values())):
        cells = [results[objective][name][group] for objective, group in columns]
        values = "".join(f"{cell['auroc']:{width - 8}.3f}{cell['fpr95_id']:8.3f}" for cell in cells)
        lines.append(f"{name + (' *' if name == DEFAULT else ''):29}{values}")
    for objective, accuracies in report.get("knn", {}).items():
        of_levels = ", ".join(f"{level} {accuracy:.3f}" for level, accuracy in accuracies.items())
        linear = f"; linear classifier, encoder {report['linear'][objective]:.3f}"
        lines.append(f"k-NN accuracy on the test images, {titles[objective]}: {of_levels}{linear}")
    lines += [f"{titles[objective]}: {note}" for objective, of in report.get("notes", {}).items() for note in of]
    lines.append("* the default. FPR95: share of OOD images accepted when 95 % of the test images are.")
    return "\n".join(lines)


def write_report(
    folder: Path,
    report: dict,
    evaluations: Mapping[str, Evaluation],
    sets: ImageSets,
    name: str,
) -> list[ShownPicture]:
    """Write <name>.json, print the table, and draw <name>.html, whose pictures are returned.

    No error of the page costs the results: it is a line on stderr.
    """
    page = folder / f"{name}.html"
    page.unlink(missing_ok=True)  # an earlier one
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / f"{name}.json", lambda file: file.write(text.encode()))
    print(format_table(report))
    say(f"drawing {page}")
    try:
        shown = write_page(page, report, evaluations, sets.parts)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"report: could not make {page} ({reason}); the results are in {name}.json", file=sys.stderr)
        print(f"written to {folder}")
        return []
    print(f"written to {folder}; look at {page}")
    return shown

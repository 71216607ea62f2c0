"""How well the models of a run tell OOD images, from the weights that it has written, and the report of that."""

from __future__ import annotations

import json
import time
from typing import NamedTuple

import torch

from ccl_fast.commands.image_sets import ImageSets
from ccl_fast.commands.report import describe, write_report
from ccl_fast.commands.run_folder import REPORT
from ccl_fast.commands.trained_run import TrainedRun
from ccl_fast.errors import ArgumentError, first_line
from ccl_fast.evaluation import Evaluation, ShownPicture, evaluate_model
from ccl_fast.training import checkpoint
from ccl_fast.training.checkpoint import CHECKPOINTS, CheckpointError
from ccl_fast.training.progress import METRICS, WARM_UP
from ccl_fast.training.telling import say


def judge(run: TrainedRun, sets: ImageSets, device: torch.device, *, keep: bool = False) -> dict[str, Evaluation]:
    """Evaluate every model of a run.

    Args:
        run: finished.
        sets: images to fit detectors to and to tell apart.
        device: where that is done.
        keep: write the fitted detectors into the folder of the run.

    Returns:
        By objective, the baseline first.

    Raises:
        ArgumentError: weights are damaged, or the images are of another shape than those that the run was trained on.
    """
    evaluations = {}
    for objective in run.config.objectives:
        say(f"evaluating {objective}: its features, k-means, detectors on {len(sets.ood)} OOD sets")
        kept = run.model(objective, device)
        if sets.train.shape != kept.shape:
            expected = f"images {list(kept.shape)}, as those that the run was trained on"
            raise ArgumentError(f"data: expected {expected}, got {list(sets.train.shape)}")
        evaluations[objective] = evaluation = evaluate_model(
            kept.model,
            sets.train,
            sets.test,
            sets.near,
            sets.far,
            clusters=run.config.detector_clusters,
            seed=run.config.seed,
            rows=run.config.detector_rows,
        )
        if keep and evaluation.fitted is not None:
            run.write_detectors(objective, evaluation.fitted, kept.check_sum)
    return evaluations


class Judged(NamedTuple):
    """The content of a run's report.json, and the pictures of its page."""

    report: dict
    pictures: list[ShownPicture]


def write_run_report(run: TrainedRun, sets: ImageSets, device: torch.device, start: float) -> Judged:
    """Judge the models of a run, and write what a run leaves: fitted detectors, report.json and report.html.

    Args:
        run: finished.
        sets: its images.
        device: where that is done.
        start: of the call that does it, by `time.perf_counter`; what training took before it is in the checkpoint.
    """
    log = read_log(run)
    seconds = _seconds(run)
    evaluations = judge(run, sets, device, keep=True)
    report = describe(run.arguments, sets, evaluations, device) | log
    report["seconds"] = round(seconds + time.perf_counter() - start, 1)
    return Judged(report, write_report(run.folder, report, evaluations, sets, REPORT))


def read_log(run: TrainedRun) -> dict:
    """Return what report.json has of the training, by objective: the lines of its epochs, and the losses.

    Raises:
        ArgumentError: there is no log, or it is damaged.
    """
    path = run.folder / METRICS
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if not all(isinstance(line, dict) and {"stage", "loss"} <= line.keys() for line in lines):
            raise ValueError("lines of another kind")
    except (OSError, ValueError) as error:
        raise ArgumentError(
            f"run: expected the log of a run in {path}, got something else ({first_line(error)})"
        ) from error
    log = {name: [line for line in lines if line["stage"] in (WARM_UP, name)] for name in run.config.objectives}
    return {"losses": {name: [line["loss"] for line in of] for name, of in log.items()}, "log": log}


def _seconds(run: TrainedRun) -> float:
    """Read what the training took; 0 where its checkpoint is gone."""
    try:
        return float(checkpoint.load(run.folder / CHECKPOINTS)["seconds"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return 0.0

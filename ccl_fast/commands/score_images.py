"""Outlier scores of the images in a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ccl_fast.commands.predictor import load_run
from ccl_fast.commands.run_folder import check_output
from ccl_fast.evaluation import DEFAULT
from ccl_fast.files import write_atomically
from ccl_fast.training.launch import check_alone

COLUMNS = ("image", "score", "outlier", "cluster")
# Of a cell that begins so, spreadsheets make a formula.
FORMULA = tuple("=+-@\t\r")


def score(
    run: str | Path,
    images: str | Path,
    output: str | Path = "scores.csv",
    objective: str | None = None,
    detector: str = DEFAULT,
    backbone: str | nn.Module | None = None,
    workers: int = 0,
    device: str = "auto",
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write an outlier score for every image in a folder into a CSV file, most outlying first.

    The detector is the run's, fitted when the run was judged: the training images are not needed. Columns: ``image``,
    its path; ``score``, higher = more outlying; ``outlier``, 1 if the score is above the least one that accepts 95 % of
    the run's test images; ``cluster``, the nearest of the clusters of the training images.

    Args:
        run: folder of a finished run of ``train``.
        images: folder of images, with those of its subfolders; they are scaled and cropped to the run's size.
        output: the CSV file.
        objective: whose model; by default the run's objective, not the baseline.
        detector: features and detector, as in the run's report.
        backbone: the module that the run was trained with, if it was one (Python only).
        workers: processes that read images.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        strict: stop at an unreadable image; by default they are skipped and counted.
        overwrite: replace the output file.

    Returns:
        The path of the CSV file.

    Raises:
        ArgumentError: a ValueError naming the argument, or the file that is damaged, what was expected and what came.
        FileExistsError: the output file exists.
    """
    check_alone("score")
    output = Path(output)
    check_output(output, overwrite=overwrite)
    predictor = load_run(run, objective, device, detector=detector, backbone=backbone)
    cut = predictor.threshold()
    scored, paths = predictor.load_folder(images, strict=strict, workers=workers)
    scores, nearest = (
        torch.cat(part)
        for part in zip(*((of.scores, of.clusters) for of in predictor.predictions(scored)), strict=True)
    )
    is_outlier = scores > cut
    order = torch.argsort(scores, descending=True, stable=True)
    write_table(output, [paths[i] for i in order.tolist()], scores[order], is_outlier[order], nearest[order])
    print(f"{len(paths)} images, {int(is_outlier.sum())} outliers; written to {output}")
    return output


def write_table(path: Path, images: Sequence[Path], scores: Tensor, is_outlier: Tensor, nearest: Tensor) -> None:
    """Write a row of a CSV file for every image."""
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(COLUMNS)
    for image, *values in zip(images, scores.tolist(), is_outlier.int().tolist(), nearest.tolist(), strict=True):
        writer.writerow([_cell(str(image)), f"{values[0]:.6g}", *values[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(rows.getvalue().encode("utf-8", "surrogateescape")))


def _cell(path: str) -> str:
    """Return a path that no spreadsheet takes for a formula."""
    return f"./{path}" if path.startswith(FORMULA) else path

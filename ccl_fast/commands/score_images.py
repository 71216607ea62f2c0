"""Outlier scores of images in files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ccl_fast.checks import check_share
from ccl_fast.commands.environment import describe_device
from ccl_fast.commands.predictor import load_run, together
from ccl_fast.commands.run_folder import check_output
from ccl_fast.commands.score_table import write_scores
from ccl_fast.evaluation import DEFAULT
from ccl_fast.training.launch import check_alone
from ccl_fast.training.telling import say


def score(
    run: str | Path,
    images: Sequence[str | Path] | str | Path,
    output: str | Path = "scores.csv",
    objective: str | None = None,
    detector: str = DEFAULT,
    accept: float = 0.95,
    backbone: str | nn.Module | None = None,
    workers: int | None = None,
    device: str = "auto",
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write an outlier score for every image of files and folders into a CSV or JSON file, most outlying first.

    The detector is the run's, fitted when the run was judged: the training images are not needed. Columns: ``image``,
    its path; ``score``, higher = more outlying; ``outlier``, 1 if the score is above the threshold, the least score
    that accepts 95 % (``accept``) of the run's test images; ``cluster``, the nearest of the clusters of the training
    images; ``threshold``. A file whose name ends with .json has run, objective, detector, ``accept`` and ``threshold``
    once, and a list of images.

    Args:
        run: folder of a finished run of ``train``.
        images: a file, a folder with its subfolders, or several of either; they are scaled and cropped to the run's
            size.
        output: the CSV file, or a JSON file.
        objective: whose model; by default the run's objective, not the baseline.
        detector: features and detector, as in the run's report.
        accept: share of the run's test images that are no outliers, above 0 and at most 1.
        backbone: the module that the run was trained with, if it was one (Python only).
        workers: processes that read images; by default as for ``train``.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        strict: stop at an unreadable image; by default they are skipped and counted.
        overwrite: replace the output file.

    Returns:
        The path of the file.

    Raises:
        ArgumentError: a ValueError naming the argument, or the file that is damaged, what was expected and what came.
        FileExistsError: the output file exists.
    """
    check_alone("score")
    check_share("accept", accept)
    output = Path(output)
    check_output(output, overwrite=overwrite)
    predictor = load_run(run, objective, device, detector=detector, backbone=backbone)
    cut = predictor.threshold(accept)
    read, paths = predictor.load_folder(images, strict=strict, workers=workers)
    say(f"on {describe_device(predictor.device)}; {len(paths)} images to score")
    found = together(predictor.predictions(read))
    by = {"run": str(run), "objective": predictor.objective, "detector": detector, "accept": accept}
    outliers = write_scores(output, [str(path) for path in paths], found.scores, found.clusters, cut, by)
    print(f"{len(paths)} images, {outliers} outliers, above {cut:.6g} (accepts {accept:.4g} of the test images)")
    print(f"written to {output}")
    return output

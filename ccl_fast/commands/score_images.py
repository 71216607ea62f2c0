"""Outlier scores of the images in a folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ccl_fast.commands.image_sets import read_split
from ccl_fast.commands.trained_run import TrainedRun
from ccl_fast.data import Images, Split, load_folder
from ccl_fast.errors import ArgumentError
from ccl_fast.evaluation import DEFAULT, cluster, make_detectors, threshold
from ccl_fast.files import write_atomically
from ccl_fast.models import Model, embed_layers
from ccl_fast.training.launch import check_alone, find_device

COLUMNS = ("image", "score", "outlier", "cluster")
# Of a cell that begins so, spreadsheets make a formula.
FORMULA = tuple("=+-@\t\r")


def score(
    run: str | Path,
    images: str | Path,
    output: str | Path = "scores.csv",
    objective: str | None = None,
    detector: str = DEFAULT,
    data: str | Path | Dataset | tuple[Dataset, Dataset] | None = None,
    data_root: str | Path | None = None,
    backbone: str | nn.Module | None = None,
    workers: int | None = None,
    device: str = "auto",
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write an outlier score for every image in a folder into a CSV file, most outlying first.

    The detector is fitted to the run's training images, which must be at hand. Columns: ``image``, its path;
    ``score``, higher = more outlying; ``outlier``, 1 if the score is above the least one that accepts 95 % of the run's
    test images; ``cluster``, the nearest of the clusters of the training images.

    Args:
        run: folder of a finished run of ``train``.
        images: folder of images, with those of its subfolders; they are scaled and cropped to the run's size.
        output: the CSV file.
        objective: whose model; by default the run's objective, not the baseline.
        detector: features and detector, as in the run's report.
        data: where the run's training images are now; by default where they were.
        data_root: folder of torchvision's data sets; by default that of the run.
        backbone: the module that the run was trained with, if it was one (Python only).
        workers: processes that read images; by default as for ``train``.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        strict: stop at an unreadable image; by default they are skipped and counted.
        overwrite: replace the output file.

    Returns:
        The path of the CSV file.

    Raises:
        ArgumentError: a ValueError naming the argument, what was expected and what came.
        FileExistsError: the output file exists.
        FileNotFoundError: the run's data is not there; says where it was looked for and how to get it.
    """
    check_alone("score")
    output = Path(output)
    if output.exists() and not output.is_file():
        raise ArgumentError(f"output: expected a regular file, got something else, {str(output)!r}")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output: expected a file that does not exist yet, or overwrite, got {str(output)!r}")
    where = find_device(device)
    trained = TrainedRun(run, data=data, data_root=data_root, backbone=backbone)
    objective = objective or trained.objectives[-1]
    if objective not in trained.objectives:
        known = " or ".join(trained.objectives)
        raise ArgumentError(f"objective: expected one that the run has, {known}, got {objective!r}")
    clusters, seed = trained.config.detector_clusters, trained.config.seed
    names = make_detectors(2, clusters, seed, [1])
    if detector not in names:
        raise ArgumentError(f"detector: expected one of {', '.join(names)}, got {detector!r}")
    split = read_split(trained.config)
    scored, paths = load_folder(
        images,
        split.train.shape,
        strict=strict,
        workers=workers,
        max_pixels=trained.config.max_pixels,
        argument="images",
    )
    model = trained.model(objective, split.train.shape, where)
    scores, is_outlier, nearest = _score(model, split, scored.to(where), detector, clusters=clusters, seed=seed)
    _write_table(output, paths, scores, is_outlier, nearest)
    print(f"{len(paths)} images, {int(is_outlier.sum())} outliers; written to {output}")
    return output


def _score(
    model: Model, split: Split, images: Images, detector: str, *, clusters: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit the detector to the training images; return the images' scores, which are outliers, and nearest clusters."""
    level = detector.partition("/")[0]
    parts = (split.train.to(images.device), split.test.to(images.device), images)
    embedded = [embed_layers(model, part) for part in parts]
    of_train, of_test, of_new = (features for features, _ in embedded)
    clusters = min(clusters, len(split.train))
    kmeans = cluster(of_train, clusters, seed)[level]
    fitted = make_detectors(len(split.train), clusters, seed, embedded[0][1])[detector]
    fitted.fit_features(of_train[level], kmeans.labels_)
    cut = threshold(fitted.predict_features(of_test[level]))
    scores = fitted.predict_features(of_new[level])
    return scores, scores > cut, kmeans.predict(of_new["encoder" if level == "layers" else level])


def _cell(path: str) -> str:
    """Return a path that no spreadsheet takes for a formula."""
    return f"./{path}" if path.startswith(FORMULA) else path


def _write_table(path: Path, images: Sequence[Path], scores: Tensor, is_outlier: Tensor, nearest: Tensor) -> None:
    """Write a row for every image, most outlying first."""
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(COLUMNS)
    for i in torch.argsort(scores, descending=True, stable=True).tolist():
        writer.writerow([_cell(str(images[i])), f"{scores[i].item():.6g}", int(is_outlier[i]), nearest[i].item()])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(rows.getvalue().encode("utf-8", "surrogateescape")))

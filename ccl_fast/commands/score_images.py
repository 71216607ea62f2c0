"""Outlier scores of images in files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import Dataset

from ccl_fast.checks import check_share
from ccl_fast.commands.environment import describe_device
from ccl_fast.commands.image_sets import read_split
from ccl_fast.commands.score_table import write_scores
from ccl_fast.commands.trained_run import TrainedRun
from ccl_fast.data import Images, Split, load_folder
from ccl_fast.errors import ArgumentError
from ccl_fast.evaluation import DEFAULT, cluster, make_detectors, threshold
from ccl_fast.models import Model, embed_layers
from ccl_fast.training.launch import check_alone, find_device
from ccl_fast.training.telling import say


def score(
    run: str | Path,
    images: Sequence[str | Path] | str | Path,
    output: str | Path = "scores.csv",
    objective: str | None = None,
    detector: str = DEFAULT,
    accept: float = 0.95,
    data: str | Path | Dataset | tuple[Dataset, Dataset] | None = None,
    data_root: str | Path | None = None,
    backbone: str | nn.Module | None = None,
    workers: int | None = None,
    device: str = "auto",
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write an outlier score for every image of files and folders into a CSV or JSON file, most outlying first.

    The detector is fitted to the run's training images, which must be at hand. Columns: ``image``, its path;
    ``score``, higher = more outlying; ``outlier``, 1 if the score is above the threshold, the least score that accepts
    95 % (``accept``) of the run's test images; ``cluster``, the nearest of the clusters of the training images;
    ``threshold``. A file whose name ends with .json has run, objective, detector, ``accept`` and ``threshold`` once,
    and a list of images.

    Args:
        run: folder of a finished run of ``train``.
        images: a file, a folder with its subfolders, or several of either; they are scaled and cropped to the run's
            size.
        output: the CSV file, or a JSON file.
        objective: whose model; by default the run's objective, not the baseline.
        detector: features and detector, as in the run's report.
        accept: share of the run's test images that are no outliers, above 0 and at most 1.
        data: where the run's training images are now; by default where they were.
        data_root: folder of torchvision's data sets; by default that of the run.
        backbone: the module that the run was trained with, if it was one (Python only).
        workers: processes that read images; by default as for ``train``.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        strict: stop at an unreadable image; by default they are skipped and counted.
        overwrite: replace the output file.

    Returns:
        The path of the file.

    Raises:
        ArgumentError: a ValueError naming the argument, what was expected and what came.
        FileExistsError: the output file exists.
        FileNotFoundError: the run's data is not there; says where it was looked for and how to get it.
    """
    check_alone("score")
    check_share("accept", accept)
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
    say(f"on {describe_device(where)}; reading {trained.config.plain()['data']}")
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
    say(f"{len(split.train)} training, {len(split.test)} test images, {len(paths)} to score")
    scores, nearest, cut = _score(model, split, scored.to(where), detector, accept, clusters=clusters, seed=seed)
    by = {"run": str(trained.folder), "objective": objective, "detector": detector, "accept": accept}
    outliers = write_scores(output, [str(path) for path in paths], scores, nearest, cut, by)
    print(f"{len(paths)} images, {outliers} outliers, above {cut:.6g} (accepts {accept:.4g} of the test images)")
    print(f"written to {output}")
    return output


def _score(
    model: Model, split: Split, images: Images, detector: str, accept: float, *, clusters: int, seed: int
) -> tuple[Tensor, Tensor, float]:
    """Fit the detector to the training images; return the images' scores, their nearest clusters, and the threshold."""
    level = detector.partition("/")[0]
    parts = (split.train.to(images.device), split.test.to(images.device), images)
    embedded = [embed_layers(model, part) for part in parts]
    of_train, of_test, of_new = (features for features, _ in embedded)
    clusters = min(clusters, len(split.train))
    kmeans = cluster(of_train, clusters, seed)[level]
    fitted = make_detectors(len(split.train), clusters, seed, embedded[0][1])[detector]
    fitted.fit_features(of_train[level], kmeans.labels_)
    cut = threshold(fitted.predict_features(of_test[level]), accept)
    nearest = kmeans.predict(of_new["encoder" if level == "layers" else level])
    return fitted.predict_features(of_new[level]), nearest, cut

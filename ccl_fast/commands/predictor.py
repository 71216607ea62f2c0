"""A trained model in use: images in, features, embeddings, clusters and outlier scores out."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ccl_fast.checks import check_share
from ccl_fast.commands.exporting import Input, export_model
from ccl_fast.commands.trained_run import TrainedRun
from ccl_fast.data import Images, load_files, load_folder
from ccl_fast.data.images import InMemory
from ccl_fast.data.pixels import fit, to_pixels
from ccl_fast.data.reading import read
from ccl_fast.data.source import ITEMS, Source, reason
from ccl_fast.errors import ArgumentError
from ccl_fast.evaluation import DEFAULT, FittedDetectors, make_detectors
from ccl_fast.models import embedded_batches
from ccl_fast.ood.detector import FeatureDetector
from ccl_fast.training.launch import find_device

# GiB of decoded images that are kept; more are read batch by batch.
MEMORY = 4.0

# One image, and what stands for several.
OneImage = Image.Image | np.ndarray | Tensor
SeveralImages = str | Path | Tensor | np.ndarray | Sequence[str | Path] | Sequence[OneImage] | Images


class Predictions(NamedTuple):
    """What a `Predictor` makes of n images, on the CPU.

    Attributes:
        features: before the head, float32 [n, width].
        embeddings: behind the head, float32 [n, dim]; not of unit length.
        clusters: the nearest of the training images' clusters, int64 [n].
        scores: higher = more outlying, float32 [n].
    """

    features: Tensor
    embeddings: Tensor
    clusters: Tensor
    scores: Tensor


def together(batches: Iterable[Predictions]) -> Predictions:
    """Return the predictions of several batches as those of one."""
    return Predictions(*map(torch.cat, zip(*batches, strict=True)))


class Predictor:
    """A trained model with its preprocessing and its fitted detector; made by :func:`load_run`.

    Attributes:
        model: a :class:`ccl_fast.models.Model` in evaluation mode, on ``device``: ``features(images)`` and
            ``embed(images)`` of float32 [n, c, h, w] in [0, 1].
        shape: (c, h, w) of the images that it takes.
        classes: what the classes are called that it was trained on, or None where the data did not tell.
        objective, detector_name, device: as chosen.
        packages: the versions that trained it.
    """

    def __init__(self, run: TrainedRun, objective: str, detector: str, device: torch.device):
        self._run, self.objective, self.detector_name, self.device = run, objective, detector, device
        self.model, self.shape, self.classes, self.packages, self._check_sum = run.model(objective, device)

    def __repr__(self) -> str:
        return (
            f"Predictor({str(self._run.folder)!r}, objective={self.objective!r}, detector={self.detector_name!r}, "
            f"shape={self.shape}, device={str(self.device)!r})"
        )

    @functools.cached_property
    def _fitted(self) -> FittedDetectors:
        fitted = self._run.detectors(self.objective, self._check_sum)
        fitted.detectors[self.detector_name].to(self.device)
        return fitted

    @property
    def detector(self) -> FeatureDetector:
        """The fitted detector, on features of its level.

        Raises:
            ArgumentError: the run has not been judged yet, or the detector's file is damaged.
        """
        return self._fitted.detectors[self.detector_name]

    def threshold(self, accept: float = 0.95) -> float:
        """Return the least score that accepts a share of the run's test images: an image above it is an outlier.

        Args:
            accept: that share, above 0 and at most 1.

        Raises:
            ArgumentError: another share, or as ``detector``.
        """
        check_share("accept", accept)
        return self._fitted.threshold(self.detector_name, accept)

    def preprocess(self, images: str | Path | OneImage | Sequence[str | Path] | Sequence[OneImage]) -> Tensor:
        """Return what the model takes: grey or RGB, shorter side resized, centre cropped, values from 0 to 1.

        Args:
            images: a PIL image of any mode, the path of one, an array [h, w] or [h, w, c], or a tensor [c, h, w], uint8
                or floating point in [0, 1] (rounded to bytes, as training images are): one image. Or several: a list of
                these, an array [n, h, w, c] or a tensor [n, c, h, w].

        Returns:
            float32 [c, h, w] of one image, [n, c, h, w] of several, on the CPU.

        Raises:
            ArgumentError: that is no image.
            OSError: a file cannot be read.
        """
        is_one = isinstance(images, str | Path | Image.Image) or (
            isinstance(images, np.ndarray | Tensor) and images.ndim < 4
        )
        if not is_one:
            read = self._read(images)  # pyright: ignore[reportArgumentType] (the rest are several)
            return read[torch.arange(len(read), device="cpu")]
        if isinstance(images, str | Path):
            return self._read([images])[torch.zeros(1, dtype=torch.int64, device="cpu")][0]
        try:
            return fit(to_pixels(images), self.shape).float() / 255
        except Exception as error:  # whatever a damaged image makes Pillow say
            raise ArgumentError(f"images: expected {ITEMS}, got {reason(error)}") from error

    def score(self, images: SeveralImages) -> Tensor:
        """Return outlier scores [n], float32 on the CPU; higher = more outlying.

        The same as ``ccl-fast score`` writes, to the last bit: images pass the model in the same batches.

        Args:
            images: a list of paths, PIL images, arrays or tensors as for ``preprocess``; an array [n, h, w, c] or a
                tensor [n, c, h, w]; the path of an image or of a folder, of which all images are taken that can be
                read, in the order of their paths.

        Raises:
            ArgumentError: these are no images, or as ``detector``.
            OSError: a file cannot be read.
        """
        return torch.cat([predicted.scores for predicted in self.predictions(self._read(images))])

    def embed_images(self, images: SeveralImages) -> Predictions:
        """Return features, embeddings, nearest clusters and scores of images; arguments and errors as of ``score``."""
        return together(self.predictions(self._read(images)))

    def predictions(self, images: Images) -> Iterator[Predictions]:
        """Yield what the model makes of images, a batch of 1,024 at a time."""
        level, fitted = self.detector_name.partition("/")[0], self._fitted
        for features, _ in embedded_batches(self.model, images):
            predicted = (
                features["encoder"],
                features["head"],
                fitted.nearest_clusters(self.detector_name, features),
                self.detector.predict_features(features[level]),
            )
            yield Predictions(*(part.cpu() for part in predicted))

    def export(self, path: str | Path, input: Input = "uint8", resize: bool = True, *, overwrite: bool = False) -> Path:
        """Write the model as one file for other programs, .pt2 or .onnx; see `ccl_fast.commands.export`."""
        return export_model(self.model, self.shape, path, input, resize, overwrite=overwrite)

    def load_folder(
        self, path: str | Path | Sequence[str | Path], *, strict: bool = False, workers: int | None = 0
    ) -> tuple[Images, list[Path]]:
        """Read the images of files and folders as the model takes them; see `ccl_fast.data.load_folder`."""
        limits = {"strict": strict, "workers": workers, "max_pixels": self._run.config.max_pixels}
        return load_folder(path, self.shape, argument="images", **limits)

    def _read(self, images: SeveralImages) -> Images:
        if isinstance(images, Images):
            return images
        if isinstance(images, str | Path):
            path = Path(images).expanduser()
            if path.is_dir():
                return self.load_folder(path)[0]
            images = [path]
        if isinstance(images, np.ndarray | Tensor):
            if images.ndim != 4:
                expected = "an array [n, h, w, c] or a tensor [n, c, h, w]"
                raise ArgumentError(f"images: expected {expected} of several images, got shape {list(images.shape)}")
            if isinstance(images, Tensor) and images.dtype == torch.uint8 and images.shape[1:] == self.shape:
                return InMemory(images)
        elif not isinstance(images, Sequence):
            raise ArgumentError(f"images: expected a list, a tensor or a path, got {type(images).__name__}")
        elif images and all(isinstance(image, str | Path) for image in images):
            files: Sequence = images
            return load_files(files, self.shape, memory=MEMORY, max_pixels=self._run.config.max_pixels)
        source = Source(images, "images")  # pyright: ignore[reportArgumentType] (a list is as good)
        return read(source, torch.arange(len(source), device="cpu"), self.shape, workers=0, memory=MEMORY)[0]


def load_run(
    path: str | Path,
    objective: str | None = None,
    device: str | None = None,
    *,
    detector: str = DEFAULT,
    backbone: str | nn.Module | None = None,
) -> Predictor:
    """Load a trained model from the folder of a run; nothing else is needed, the training images neither.

    Args:
        path: folder that ``train`` wrote.
        objective: whose model; by default the run's objective, not the baseline.
        device: "cpu", "cuda", "cuda:1", ...; by default a GPU if there is one.
        detector: features and detector, as in the run's report.
        backbone: the module that the run was trained with, if it was one.

    Raises:
        ArgumentError: a ValueError naming the argument, or the file that is damaged, what was expected and what came.

    Example:
        >>> import ccl_fast
        >>> run = ccl_fast.load_run("runs/a")  # doctest: +SKIP
        >>> images = run.preprocess(["photo.png", "another.jpg"])  # doctest: +SKIP
        >>> features = run.model.features(images.to(run.device))  # doctest: +SKIP
        >>> outliers = run.score(["photo.png", "another.jpg"]) > run.threshold(accept=0.95)  # doctest: +SKIP
    """
    needs = ("backbone",) if backbone is None else ()
    run = TrainedRun.open(path, needs=needs, backbone=backbone)
    chosen = run.config.objective if objective is None else objective
    if chosen not in run.objectives:
        known = " or ".join(run.objectives)
        raise ArgumentError(f"objective: expected one that the run has, {known}, got {chosen!r}")
    names = make_detectors(2, 1, 0, [1, 1])
    if detector not in names:
        raise ArgumentError(f"detector: expected one of {', '.join(names)}, got {detector!r}")
    return Predictor(run, chosen, detector, find_device(device or "auto"))

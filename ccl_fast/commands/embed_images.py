"""Features, embeddings, clusters and outlier scores of the images in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor, nn

from ccl_fast.commands.predictor import Predictions, load_run, together
from ccl_fast.commands.run_folder import check_output
from ccl_fast.commands.score_table import write_scores
from ccl_fast.errors import ArgumentError, packages_of
from ccl_fast.evaluation import DEFAULT
from ccl_fast.files import write_atomically
from ccl_fast.training.launch import check_alone

PARQUET, CSV = ".parquet", ".csv"
# Beside a table in CSV, in the place of its suffix.
FEATURES, EMBEDDINGS = ".features.npy", ".embeddings.npy"


def embed(
    run: str | Path,
    images: Sequence[str | Path] | str | Path,
    output: str | Path = "embeddings.csv",
    objective: str | None = None,
    detector: str = DEFAULT,
    backbone: str | nn.Module | None = None,
    workers: int | None = None,
    device: str = "auto",
    strict: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write what a trained model makes of every image of files and folders: features, embedding, cluster, score.

    ``<name>.parquet`` is one file with the columns ``image`` (its path), ``score``, ``outlier``, ``cluster``,
    ``features`` (before the head) and ``embedding`` (behind it, not of unit length). ``<name>.csv`` has the columns of
    ``score``, but in the order of the paths, and beside it ``<name>.features.npy`` [n, width] and
    ``<name>.embeddings.npy`` [n, dim] have the same rows, float32.

    Args:
        run: folder of a finished run of ``train``.
        images: a file, a folder with its subfolders, or several of either; they are scaled and cropped to the run's
            size.
        output: a file that ends in .parquet (needs pyarrow) or .csv.
        objective: whose model; by default the run's objective, not the baseline.
        detector: whose scores, as in the run's report; clusters are those of its features.
        backbone: the module that the run was trained with, if it was one (Python only).
        workers: processes that read images; by default as for ``train``.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        strict: stop at an unreadable image; by default they are skipped and counted.
        overwrite: replace the output files.

    Returns:
        The path of the output file.

    Raises:
        ArgumentError: a ValueError naming the argument, or the file that is damaged, what was expected and what came.
        FileExistsError: an output file exists.
        MissingPackages: pyarrow is not installed; says how to install it.
    """
    check_alone("embed")
    output = Path(output)
    if output.suffix not in (PARQUET, CSV):
        raise ArgumentError(f"output: expected a file that ends in {PARQUET} or {CSV}, got {str(output)!r}")
    arrays = [output.with_suffix(suffix) for suffix in (FEATURES, EMBEDDINGS) if output.suffix == CSV]
    for path in (output, *arrays):
        check_output(path, overwrite=overwrite)
    pyarrow = _pyarrow() if output.suffix == PARQUET else None
    predictor = load_run(run, objective, device, detector=detector, backbone=backbone)
    cut = predictor.threshold()
    read, paths = predictor.load_folder(images, strict=strict, workers=workers)
    predictions = predictor.predictions(read)
    output.parent.mkdir(parents=True, exist_ok=True)
    if pyarrow is not None:
        write_atomically(output, lambda file: _write_parquet(pyarrow, file, paths, predictions, cut))
    else:
        found = together(predictions)
        for path, rows in zip(arrays, (found.features, found.embeddings), strict=True):
            write_atomically(path, lambda file, rows=rows: np.save(file, rows.numpy()))
        write_scores(output, [str(path) for path in paths], found.scores, found.clusters, cut, {}, in_order=True)
    print(f"{len(paths)} images; written to {' and '.join(map(str, (output, *arrays)))}")
    return output


def _pyarrow() -> Any:
    with packages_of("parquet", instead=f"an output that ends in {CSV}"):
        import pyarrow.parquet
    return pyarrow


def _write_parquet(
    pyarrow: Any, file: BinaryIO, paths: Sequence[Path], predictions: Iterator[Predictions], cut: float
) -> None:
    """Write the table batch by batch: memory does not grow with the number of images."""

    def rows_of(matrix: Tensor) -> Any:
        flat = pyarrow.array(matrix.numpy().reshape(-1))
        return pyarrow.FixedSizeListArray.from_arrays(flat, matrix.shape[1])

    names, writer = iter(paths), None
    try:
        for found in predictions:
            table = pyarrow.table(
                {
                    # A name that is no UTF-8 is written with escapes.
                    "image": [str(next(names)).encode("utf-8", "backslashreplace").decode() for _ in found.scores],
                    "score": found.scores.numpy(),
                    "outlier": (found.scores > cut).numpy(),
                    "cluster": found.clusters.numpy(),
                    "features": rows_of(found.features),
                    "embedding": rows_of(found.embeddings),
                }
            )
            writer = writer or pyarrow.parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()

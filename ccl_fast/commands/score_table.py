"""The file of outlier scores: a table, or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ccl_fast.files import write_atomically

COLUMNS = ("image", "score", "outlier", "cluster", "threshold")
# Of a cell that begins so, spreadsheets make a formula.
FORMULA = tuple("=+-@\t\r")


def write_scores(
    path: Path,
    images: Sequence[str],
    scores: Tensor,
    nearest: Tensor,
    threshold: float,
    by: Mapping[str, object],
    *,
    in_order: bool = False,
) -> int:
    """Write a row for every image, most outlying first, and return how many are outliers.

    Args:
        path: of the file; with .json JSON, else CSV.
        images: their paths.
        scores: [n], higher = more outlying.
        nearest: clusters [n].
        threshold: above it an image is an outlier.
        by: what made the scores; JSON has it.
        in_order: of the images, and not the most outlying first.
    """
    values, clusters, outliers = scores.tolist(), nearest.tolist(), (scores > threshold).int().tolist()
    order = range(len(images)) if in_order else torch.argsort(scores, descending=True, stable=True).tolist()
    rows = [(images[i], float(f"{values[i]:.6g}"), outliers[i], clusters[i]) for i in order]
    text = _json(rows, threshold, by) if path.suffix.lower() == ".json" else _csv(rows, threshold)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))
    return sum(outliers)


def _csv(rows: Sequence[tuple], threshold: float) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows((_cell(image), f"{score:.6g}", *rest, f"{threshold:.6g}") for image, score, *rest in rows)
    return text.getvalue()


def _json(rows: Sequence[tuple], threshold: float, by: Mapping[str, object]) -> str:
    images = [dict(zip(COLUMNS[:-1], row, strict=True)) | {"outlier": bool(row[2])} for row in rows]
    return json.dumps({**by, "threshold": threshold, "images": images}, indent=2, allow_nan=False) + "\n"


def _cell(path: str) -> str:
    """Return a path that no spreadsheet takes for a formula."""
    return f"./{path}" if path.startswith(FORMULA) else path

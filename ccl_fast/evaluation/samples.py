"""A few images of every part, and views of some, as the page shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ccl_fast.data import Views
from ccl_fast.evaluation import pictures

if TYPE_CHECKING:
    from ccl_fast.data import Images

SHOWN = 12
SHOWN_IN_VIEWS, VIEWS = 6, 5

# Data URI of an image, and what it shows.
Shown = tuple[str, str]


class Sample(NamedTuple):
    """Images of a part."""

    title: str
    note: str
    images: list[Shown]


def sample_parts(images: Mapping[str, Images], groups: Mapping[str, Sequence[str]]) -> list[Sample]:
    """Show images from all over each part: training images, test images, and every OOD set of the groups."""
    parts = [("train", "training images", ""), ("test", "test images", "")]
    parts += [(name, name, group) for group, names in groups.items() for name in names]
    return [Sample(title, note, _shown(images[part], f"sample of {title}")) for part, title, note in parts]


def sample_views(train: Images, recipe: str) -> list[list[Shown]]:
    """Show some training images, each with random views of it; torch's generators are left as they were.

    Args:
        train: the training images.
        recipe: how views are made, an ``augmentation`` of ``train``.
    """
    rows = _rows(len(train), SHOWN_IN_VIEWS)
    originals = train[rows]
    with torch.random.fork_rng([originals.device] if originals.is_cuda else []):
        torch.manual_seed(0)
        make_views = Views(recipe, train.shape).to(originals.device)  # pyright: ignore[reportArgumentType] - it checks
        views = [make_views(originals) for _ in range(VIEWS)]
    return [
        [(pictures.thumbnail(originals[at]), f"training image {row}")]
        + [(pictures.thumbnail(of[at]), f"training image {row}, view {number}") for number, of in enumerate(views, 1)]
        for at, row in enumerate(rows.tolist())
    ]


def _shown(images: Images, what: str) -> list[Shown]:
    rows = _rows(len(images), SHOWN)
    return [
        (pictures.thumbnail(image), f"{what}, image {row}")
        for image, row in zip(images[rows], rows.tolist(), strict=True)
    ]


def _rows(n: int, at_most: int) -> Tensor:
    """Return rows from all over n: of classes that follow each other, each has its share."""
    return torch.linspace(0, n - 1, min(n, at_most), dtype=torch.float64, device="cpu").round().long()

"""Random views of images for a look at a network, not for training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ccl_fast.models import Model, embed

if TYPE_CHECKING:
    from ccl_fast.data import Images, Views

# Images of which two views are compared: enough for a share to 3 %, and a fraction of an epoch.
MAX_IMAGES = 1_000


def embedded_views(model: Model, images: Images, views: Views, number: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Return the numbers of at most 1,000 images from all over the set, and the head's features of views of each."""
    rows = spread_rows(images, MAX_IMAGES)
    return rows, [embed(model, _RandomViews(images, views), rows)["head"] for _ in range(number)]


def spread_rows(images: Images, at_most: int) -> Tensor:
    """Return rows from all over the images: of classes that follow each other, each has its share."""
    return torch.linspace(0, len(images) - 1, min(len(images), at_most), dtype=torch.float64, device="cpu").long()


class _RandomViews:
    """Images for ``embed``, of which each batch is one of random views."""

    def __init__(self, images: Images, views: Views):
        self.images, self.views = images, views

    def batches(self, batch_size: int, rows: Tensor | None = None) -> Iterator[Tensor]:
        return (self.views(batch) for batch in self.images.batches(batch_size, rows))

"""Random views of images for a look at a network, not for training."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ccl_fast.data import Images, Views
from ccl_fast.models import Model, embed

# Images of which two views are compared: enough for a share to 3 %, and a fraction of an epoch.
MOST = 1_000


def embedded_views(model: Model, images: Images, views: Views, number: int = 2) -> tuple[Tensor, list[Tensor]]:
    """The numbers of at most 1,000 images from all over the set, and the head's features of so many views of each."""
    rows = some(images, MOST)
    return rows, [embed(model, _Viewed(images, views), rows)["head"] for _ in range(number)]


def some(images: Images, most: int) -> Tensor:
    """Rows all over the images: of classes that follow each other, each has its share."""
    return torch.linspace(0, len(images) - 1, min(len(images), most), dtype=torch.float64).long()


class _Viewed:
    """For ``embed``: a random view of each image."""

    def __init__(self, images: Images, views: Views):
        self.images, self.views = images, views

    def batches(self, batch_size: int, rows: Tensor) -> Iterator[Tensor]:
        return (self.views(batch) for batch in self.images.batches(batch_size, rows))

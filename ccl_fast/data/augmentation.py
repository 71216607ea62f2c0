"""Random views of images, a batch at a time, on the images' device."""

from __future__ import annotations

from typing import Literal

import torch
from kornia import augmentation as K
from torch import Tensor, nn

from ccl_fast.errors import ArgumentError

SMALL = 64  # pixels; smaller images are not blurred, as in SimCLR on CIFAR


class Views(nn.Module):
    """``views(images)``: a random view of each image.

    What is random is drawn per image, all of it from torch's global generators: the same after the same
    ``torch.manual_seed``.

    Args:
        recipe: one of

            - "digits": rotation, zoom, shift and shear, then contrast and brightness, then Gaussian noise of random
              strength, which may leave [0, 1];
            - "simclr": random resized crop, flip, colour jitter, greyscale, and blur if the images are larger than 64
              pixels, as in SimCLR; without the colours if they are grey;
            - "none": the images as they are;
            - "auto": "digits" for grey images, "simclr" for RGB.
        shape: the images', (1 or 3, h, w).

    Raises:
        ArgumentError: another recipe.
    """

    def __init__(self, recipe: Literal["auto", "digits", "simclr", "none"], shape: tuple[int, int, int]):
        super().__init__()
        if recipe == "auto":
            recipe = "digits" if shape[0] == 1 else "simclr"
        if recipe not in _RECIPES:
            known = ", ".join(f'"{name}"' for name in ("auto", *_RECIPES))
            raise ArgumentError(f"augmentation: expected one of {known}, got {recipe!r}")
        self.recipe = recipe
        self.transform = nn.Sequential(*_RECIPES[recipe](shape))

    def forward(self, images: Tensor) -> Tensor:
        """Views of images, float32 [b, c, h, w] in [0, 1], of the same shape and on the same device."""
        return self.transform(images)


def _digits(shape: tuple[int, int, int]) -> list[nn.Module]:
    return [
        K.RandomAffine(degrees=20, translate=(0.12, 0.12), scale=(0.9, 1.43), shear=17, p=1),
        K.RandomContrast((0.5, 1.5), clip_output=False),
        K.RandomBrightness((0.8, 1.2), clip_output=False),  # kornia's 1 is no change: it adds from -0.2 to 0.2
        nn.Hardtanh(0, 1),
        _Noise(0.15),
    ]


def _simclr(shape: tuple[int, int, int]) -> list[nn.Module]:
    channels, *size = shape
    steps = [K.RandomResizedCrop(tuple(size), scale=(0.2, 1), cropping_mode="resample"), K.RandomHorizontalFlip()]
    if channels == 3:
        steps += [K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2)]
    if min(size) > SMALL:
        steps.append(K.RandomGaussianBlur(2 * (min(size) // 20) + 1, (0.1, 2.0), p=0.5))
    return steps


_RECIPES = {"digits": _digits, "simclr": _simclr, "none": lambda shape: []}


class _Noise(nn.Module):
    """Gaussian noise whose strength is drawn per image, from 0 to ``strongest``."""

    def __init__(self, strongest: float):
        super().__init__()
        self.strongest = strongest

    def forward(self, images: Tensor) -> Tensor:
        strength = self.strongest * torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)
        return images + strength * torch.randn_like(images)

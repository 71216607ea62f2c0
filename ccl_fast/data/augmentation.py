"""Random views of images, a batch at a time, on the images' device."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from kornia import augmentation as K
from torch import Tensor, nn

from ccl_fast.errors import ArgumentError

if TYPE_CHECKING:
    from ccl_fast.data.options import Recipe

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
            - "weak": the same, but colours are jittered in 40 % of the views instead of 80 %, for training images of
              which many are generated (AdaInf);
            - "none": the images as they are;
            - "auto": "digits" for grey images, "simclr" for RGB.
        shape: the images', (1 or 3, h, w).

    Raises:
        ArgumentError: another recipe.
    """

    def __init__(self, recipe: Recipe, shape: tuple[int, int, int]):
        super().__init__()
        if recipe == "auto":
            recipe = "digits" if shape[0] == 1 else "simclr"
        if recipe not in _RECIPES:
            known = ", ".join(f'"{name}"' for name in ("auto", *_RECIPES))
            raise ArgumentError(f"augmentation: expected one of {known}, got {recipe!r}")
        self.recipe = recipe
        with _usual_defaults():
            self.transform = nn.Sequential(*_RECIPES[recipe](shape))

    def forward(self, images: Tensor) -> Tensor:
        """Views of images, float32 [b, c, h, w] in [0, 1], of the same shape and on the same device."""
        with _usual_defaults():
            return self.transform(images)


@contextlib.contextmanager
def _usual_defaults():
    """Whatever torch's defaults are: kornia draws by them, and the same seed shall give the same views."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    on_cpu = contextlib.nullcontext() if device.type == "cpu" else torch.device("cpu")
    if dtype != torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with on_cpu:
            yield
    finally:
        if dtype != torch.float32:
            torch.set_default_dtype(dtype)


def _digits(shape: tuple[int, int, int]) -> list[nn.Module]:
    return [
        K.RandomAffine(degrees=20, translate=(0.12, 0.12), scale=(0.9, 1.43), shear=17, p=1),
        K.RandomContrast((0.5, 1.5), clip_output=False),
        K.RandomBrightness((0.8, 1.2), clip_output=False),  # kornia's 1 is no change: it adds from -0.2 to 0.2
        nn.Hardtanh(0, 1),
        _Noise(0.15),
    ]


def _simclr(shape: tuple[int, int, int], jitter: float = 0.8) -> list[nn.Module]:
    channels, *size = shape
    steps: list[nn.Module] = [_CropAndFlip(smallest=0.2)]
    if channels == 3:
        steps.append(_Colors(strength=0.4, hue=0.1, jitter=jitter, grey=0.2))
    if min(size) > SMALL:
        steps.append(K.RandomGaussianBlur(2 * (min(size) // 20) + 1, (0.1, 2.0), p=0.5))
    return steps


def _weak(shape: tuple[int, int, int]) -> list[nn.Module]:
    return _simclr(shape, jitter=0.4)


_RECIPES = {"digits": _digits, "simclr": _simclr, "weak": _weak, "none": lambda shape: []}


class _Noise(nn.Module):
    """Gaussian noise whose strength is drawn per image, from 0 to ``strongest``."""

    def __init__(self, strongest: float):
        super().__init__()
        self.strongest = strongest

    def forward(self, images: Tensor) -> Tensor:
        strength = self.strongest * torch.rand(len(images), 1, 1, 1, device=images.device, dtype=images.dtype)
        return images + strength * torch.randn_like(images)


class _CropAndFlip(nn.Module):
    """A random part of the image, mirrored or not, scaled back to the image's size: one bilinear sampling does both.

    The part has between ``smallest`` and all of the image's area and a side ratio of 3/4 to 4/3 (torchvision's
    RandomResizedCrop, but that a part too wide for the image is cut, not drawn again).
    """

    def __init__(self, smallest: float):
        super().__init__()
        self.smallest = smallest

    def forward(self, images: Tensor) -> Tensor:
        area, ratio, x, y, mirror = torch.rand(5, len(images), device=images.device, dtype=torch.float32)
        side = (self.smallest + (1 - self.smallest) * area).sqrt()
        stretch = ((2 * ratio - 1) * math.log(4 / 3) / 2).exp()
        width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
        width_or_mirrored = torch.where(mirror < 0.5, -width, width)
        # From the view's coordinates, -1 to 1 either way, to the image's.
        to_x = _centers(images.shape[3], images) * width_or_mirrored[:, None] + ((2 * x - 1) * (1 - width))[:, None]
        to_y = _centers(images.shape[2], images) * height[:, None] + ((2 * y - 1) * (1 - height))[:, None]
        grid = torch.stack(torch.broadcast_tensors(to_x[:, None, :], to_y[:, :, None]), dim=3).to(images.dtype)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _centers(pixels: int, images: Tensor) -> Tensor:
    """Where the middles of so many pixels are, from -1 to 1."""
    return (2 * torch.arange(pixels, device=images.device, dtype=torch.float32) + 1) / pixels - 1


class _Colors(nn.Module):
    """Brightness, contrast, saturation and hue, drawn per image, and now and then no colour at all.

    Brightness scales an image, contrast scales it about its mean luma, saturation and hue scale and turn the chroma
    plane about the luma. Where values are not clipped in between these commute, so their random order does not matter
    and together they are one affine map of colours: a 3 x 3 matrix and an offset an image.

    Args:
        strength: brightness, contrast and saturation are scaled by 1 - strength to 1 + strength.
        hue: the most that hues turn, in full circles.
        jitter: probability that an image gets all that.
        grey: probability that it loses its colour.
    """

    luma: Tensor
    onto_luma: Tensor
    onto_chroma: Tensor
    turned_chroma: Tensor

    def __init__(self, strength: float, hue: float, jitter: float, grey: float):
        super().__init__()
        self.strength, self.hue, self.jitter, self.grey = strength, hue, jitter, grey
        like: dict = {"device": "cpu", "dtype": torch.float32}
        to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], **like)
        turn = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]], **like)
        from_yiq = to_yiq.inverse()
        self.register_buffer("luma", to_yiq[0], persistent=False)
        self.register_buffer("onto_luma", from_yiq[:, :1] @ to_yiq[:1], persistent=False)
        self.register_buffer("onto_chroma", from_yiq[:, 1:] @ to_yiq[1:], persistent=False)
        self.register_buffer("turned_chroma", from_yiq @ turn @ to_yiq, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        self.to(images.device)
        *scales, turn, jitters, greys = torch.rand(6, len(images), 1, 1, device=images.device, dtype=torch.float32)
        jitters = (jitters < self.jitter).float()
        brightness, contrast, saturation = (1 + jitters * self.strength * (2 * scale - 1) for scale in scales)
        saturation = saturation * (greys >= self.grey)
        angle = jitters * 2 * math.pi * self.hue * (2 * turn - 1)
        chroma = angle.cos() * self.onto_chroma + angle.sin() * self.turned_chroma
        matrix = brightness * contrast * (self.onto_luma + saturation * chroma)
        pixels = images.flatten(2)
        mean = (self.luma @ pixels.float().mean(2, keepdim=True))[..., None]  # luma [n, 1, 1]
        offset = (brightness * (1 - contrast) * mean).expand(-1, 3, 1)
        return torch.baddbmm(offset.to(pixels.dtype), matrix.to(pixels.dtype), pixels).clamp_(0, 1).view_as(images)

"""OOD images that need no data set: of photographed textures, of noise, of the test images, of a font."""

from __future__ import annotations

import functools
import string
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from kornia.filters import gaussian_blur2d
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from torch.nn import functional as F

from ccl_fast.data.images import Images, InMemory
from ccl_fast.errors import ArgumentError

if TYPE_CHECKING:
    from ccl_fast.data.split import Split

MAX_IMAGES = 2000
CHUNK = 100  # images at a time, for they are made in float32
BLOB_GRID = 64  # pixels; larger blobs are enlarged
LETTER_PIXELS = 2  # a side's pixels, drawn for one
_FLOATS: dict = {"device": "cpu", "dtype": torch.float32}  # whatever torch's defaults are


def make(name: str, split: Split, argument: str, *, seed: int, limit: int | None) -> Images:
    """As many images as there are to test on, but at most 2,000, of their shape.

    Args:
        name: one of ``synthetic_names``:

            - "textures": crops of photographs of grass, gravel and bricks, flipped, scaled, and tinted if RGB;
            - "noise": Gaussian, in [0, 1] clamped, and uniform, one half each;
            - "blobs": blurred noise with its contrast stretched;
            - "interpolation": the mean of two test images;
            - "letters": of DejaVu Sans, white on black or in two colours, at random sizes, places and angles.
        split: whose test images they stand beside.
        argument: how errors call the name.
        seed: of the images.
        limit: make at most that many.

    Returns:
        Images in memory, on the CPU.

    Raises:
        ArgumentError: there are not two test images to interpolate.
    """
    if name == "interpolation" and len(split.test) < 2:
        raise ArgumentError(f"{argument}: expected no {name!r}, for there are not two images to test on")
    n = min(len(split.test), MAX_IMAGES, limit or MAX_IMAGES)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):  # for what others make
        chunks = [_MAKERS[name](min(CHUNK, n - start), split.test, generator) for start in range(0, n, CHUNK)]
    return InMemory(torch.cat([(chunk * 255).round().to(torch.uint8) for chunk in chunks]))


def _textures(n: int, test: Images, generator: Generator) -> Tensor:
    channels, *size = test.shape
    photographs = _photographs()
    side = _uniform((n,), 64, 256, generator)  # of the crop; a photograph's is 512
    place = torch.rand(n, 2, generator=generator, **_FLOATS)
    photograph = torch.randint(len(photographs), (n,), generator=generator, device="cpu")
    crops = []
    for i in range(n):
        image = photographs[photograph[i]]
        h, w = (max(1, int(side[i] * s / max(size))) for s in size)
        y, x = (int(p * (whole - part + 1)) for p, whole, part in zip(place[i], image.shape, (h, w), strict=True))
        crop = image[None, None, y : y + h, x : x + w]
        crops.append(F.interpolate(crop, size, mode="bilinear", antialias=True))
    images = torch.cat(crops)
    for dim in (2, 3):
        flipped = torch.rand(n, 1, 1, 1, generator=generator, **_FLOATS) < 0.5
        images = torch.where(flipped, images.flip(dim), images)
    # Bright parts keep the tint's colour, as under a coloured light.
    tint = _uniform((n, channels, 1, 1), 0.6, 1.4, generator) if channels == 3 else 1
    return (images * tint).clamp(0, 1)


def _noise(n: int, test: Images, generator: Generator) -> Tensor:
    gaussian = 0.5 + 0.25 * torch.randn(n // 2, *test.shape, generator=generator, **_FLOATS)
    return torch.cat([gaussian.clamp(0, 1), torch.rand(n - n // 2, *test.shape, generator=generator, **_FLOATS)])


def _blobs(n: int, test: Images, generator: Generator) -> Tensor:
    channels, *size = test.shape
    grid = [min(s, BLOB_GRID) for s in size]
    noise = torch.randn(n, channels, *grid, generator=generator, **_FLOATS)
    widest = 0.12 * max(grid)
    sigma = _uniform((n, 1), widest / 3, widest, generator)
    blurred = gaussian_blur2d(noise, 2 * int(3 * widest) + 3, sigma.expand(n, 2), border_type="replicate")
    blobs = F.interpolate(blurred, size, mode="bicubic")
    low, high = blobs.amin((2, 3), keepdim=True), blobs.amax((2, 3), keepdim=True)
    return (blobs - low) / (high - low).clamp_min(1e-6)


def _interpolation(n: int, test: Images, generator: Generator) -> Tensor:
    order = torch.randperm(len(test), generator=generator, device="cpu")
    return (test[order[:n]].cpu() + test[order.roll(-1)[:n]].cpu()) / 2


def _letters(n: int, test: Images, generator: Generator) -> Tensor:
    channels, *size = test.shape
    height, width = (LETTER_PIXELS * s for s in size)
    letter = torch.randint(len(string.ascii_letters), (n,), generator=generator, device="cpu").tolist()
    font_size = (min(height, width) * _uniform((n,), 0.6, 1.1, generator)).tolist()
    y, x = ((s * _uniform((n,), 0.4, 0.6, generator)).tolist() for s in (height, width))
    angle = _uniform((n,), -30, 30, generator).tolist()
    masks = []
    for i in range(n):
        canvas = Image.new("L", (width, height))
        font = _font().font_variant(size=font_size[i])
        ImageDraw.Draw(canvas).text((x[i], y[i]), string.ascii_letters[letter[i]], fill=255, font=font, anchor="mm")
        canvas = canvas.rotate(angle[i], Image.Resampling.BILINEAR).reduce(LETTER_PIXELS)
        masks.append(torch.from_numpy(np.array(canvas)))
    mask = torch.stack(masks)[:, None].float() / 255
    if channels == 1:
        return mask
    paper = torch.rand(n, 3, 1, 1, generator=generator, **_FLOATS)
    ink = (paper + _uniform((n, 3, 1, 1), 0.3, 0.7, generator)) % 1  # far from the paper's in every channel
    return paper + mask * (ink - paper)


_MAKERS = {
    "textures": _textures,
    "noise": _noise,
    "blobs": _blobs,
    "interpolation": _interpolation,
    "letters": _letters,
}
synthetic_names = tuple(_MAKERS)
"""Names of the sets that are made."""


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    return torch.empty(shape, **_FLOATS).uniform_(low, high, generator=generator)


@functools.cache
def _photographs() -> list[Tensor]:
    """Grey, float32 [512, 512] in [0, 1]."""
    from skimage import data  # here: no other set needs it

    return [torch.from_numpy(image).float() / 255 for image in (data.grass(), data.gravel(), data.brick())]


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    import matplotlib  # here: no other set needs it

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))

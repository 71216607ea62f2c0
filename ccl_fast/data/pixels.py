"""One image of any kind -> pixels: uint8 [c, h, w] with 1 or 3 channels."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

ORIENTATION = 0x0112  # EXIF's tag; from 5 on the image lies on its side
# What `fit` and the division by 255 do to an image, in words that a run keeps.
TRANSFORM = {"resize": "shorter side, bilinear, antialiased", "crop": "center", "values": "0 to 1"}
GREY_MODES = ("1", "L", "LA", "I", "F")  # of Pillow, besides I;16 and its kin


@contextlib.contextmanager
def pillow_silenced() -> Iterator[None]:
    """Pillow warns of odd metadata, palettes and sizes; the image can be used, and there may be thousands of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def to_pixels(image) -> Tensor:
    """Pixels of an image at its own size.

    Args:
        image: a PIL image of any mode (turned upright if its EXIF data says so; alpha is dropped, as torchvision's
            loader does; 16-bit grey is scaled), a numpy array HWC or HW, or a tensor CHW or HW, of 1, 3 or 4 channels,
            uint8 or floating point in [0, 1].

    Returns:
        uint8 [1 or 3, h, w] on the CPU.

    Raises:
        ValueError: it is nothing of this; the message says what came.
    """
    if isinstance(image, Image.Image):
        image = _array(image)
    if isinstance(image, np.ndarray):
        image = _tensor(image)
    if not isinstance(image, Tensor):
        raise ValueError(f"an object of type {type(image).__name__}")
    image = image.detach().cpu().as_subclass(Tensor)
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(f"a tensor of shape {tuple(image.shape)}")
    return _bytes(image[:3])


def shape_of(pixels: Tensor) -> tuple[int, int, int]:
    """(c, h, w) of pixels [..., c, h, w]."""
    channels, height, width = pixels.shape[-3:]
    return channels, height, width


def fit(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Pixels [c, h, w] brought to a shape: grey or RGB, shorter side resized, centre cropped. uint8 as they are."""
    channels, height, width = shape
    if pixels.shape[0] != channels:
        # Of bytes torchvision's grey values would be rounded down, and white would not stay white.
        grey = channels == 1
        pixels = F.rgb_to_grayscale(pixels.float()).round().byte() if grey else F.grayscale_to_rgb(pixels)
    h, w = pixels.shape[1:]
    if (h, w) != (height, width):
        # Of two sizes that keep the proportions, the one that covers the whole shape.
        size = [height, w * height // h] if height * w >= width * h else [h * width // w, width]
        pixels = F.center_crop(F.resize(pixels, size, antialias=True), [height, width])
    return pixels


def native_shape(image: Image.Image) -> tuple[int, int, int]:
    """The shape that ``to_pixels`` would give, from the header alone."""
    width, height = image.size
    with contextlib.suppress(Exception):  # damaged metadata
        # Not the PNG plugin's own method, which decodes the whole image.
        if Image.Image.getexif(image).get(ORIENTATION, 1) >= 5:
            height, width = width, height
    return 1 if image.mode in GREY_MODES or image.mode.startswith("I;16") else 3, height, width


def _array(image: Image.Image) -> np.ndarray:
    with pillow_silenced():
        with contextlib.suppress(Exception):  # damaged metadata; the pixels may be good
            image = ImageOps.exif_transpose(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            return _of_16_bits(np.asarray(image))
        if image.mode == "F":
            return np.array(image)
        if image.mode in GREY_MODES:
            return np.array(image.convert("L"))
        return np.array(image.convert("RGB"))


def _of_16_bits(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.int64)  # Pillow's mode for them may have 32 bits
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey values from {values.min()} to {values.max()}")
    return ((values * 255 + 32767) // 65535).astype(np.uint8)


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"an array of dtype {array.dtype}")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4):
        raise ValueError(f"an array of shape {array.shape}")
    # A copy where strides are negative or the memory is read-only: torch takes neither.
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor.permute(2, 0, 1) if array.ndim == 3 else tensor


def _bytes(image: Tensor) -> Tensor:
    if image.dtype == torch.uint8:
        return image
    if not image.is_floating_point():
        raise ValueError(f"a tensor of dtype {str(image.dtype).removeprefix('torch.')}")
    low, high = image.min().item(), image.max().item()
    # A resized image may leave [0, 1] by rounding; a normalised one leaves it by far. NaN fails too.
    if not (low > -1e-3 and high < 1 + 1e-3):
        raise ValueError(f"values from {low:.3g} to {high:.3g}")
    return (image.float().clamp(0, 1) * 255).round().to(torch.uint8)

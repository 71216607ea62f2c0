"""Mosaics of images, whose cells are regions that are known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ccl_fast.checks import check_count, check_tensor
from ccl_fast.errors import ArgumentError


class Mosaics(NamedTuple):
    """Mosaics, and where the images are in them.

    Attributes:
        images: [n / side^2, c, h, w], as the images that they are made of.
        boxes: (left, top, right, bottom) in pixels, float32 [n / side^2, side^2, 4]: what
            ``torchvision.ops.roi_align(maps, list(boxes), ...)`` takes.
    """

    images: Tensor
    boxes: Tensor


def mosaic(images: Tensor, side: int) -> Mosaics:
    r"""Join images to mosaics of their size, each of ``side`` x ``side`` of them, made small.

    Mosaic m has images :math:`m s^2, \dots, (m + 1) s^2 - 1` of side s, row by row. Cell (i, j) reaches from pixel
    :math:`\lfloor i h / s \rfloor` to :math:`\lfloor (i + 1) h / s \rfloor` down, and from column
    :math:`\lfloor j w / s \rfloor` to :math:`\lfloor (j + 1) w / s \rfloor` across, so the cells cover a mosaic without
    a gap, whatever its size.

    The region of a cell and the single image that it was made of are a pair of positives: with region features
    [n, d] of a detector and features [n, d] of an image encoder, ``InfoNCELoss()(regions, singles)``.

    Args:
        images: ``[n, c, h, w]``, n a multiple of side^2, uint8 or floating point, h and w at least ``side``.
        side: images of a row and of a column of a mosaic; the paper draws it from 2, 3 and 4.

    Cost: every pixel is read once, and 1 / side^2 of them are written.

    Returns:
        `Mosaics`: images and boxes, on the images' device.

    Raises:
        ArgumentError: an argument has another type or shape.

    Example:
        >>> import torch
        >>> from ccl_fast.data import mosaic
        >>> mosaics, boxes = mosaic(torch.rand(8, 3, 32, 32), 2)
        >>> mosaics.shape, boxes[0].tolist()[1]
        (torch.Size([2, 3, 32, 32]), [16.0, 0.0, 32.0, 16.0])

    Paper: Wu, Zhang, Xu, Jin, Liu, Loy, "CLIM: contrastive language-image mosaic for region representation", 2024.
    """
    check_tensor("images", images)
    check_count("side", side)
    if images.ndim != 4 or not len(images) or len(images) % side**2:
        expected = f"[n, c, h, w] with n a multiple of {side**2}"
        raise ArgumentError(f"images: expected shape {expected}, got {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ArgumentError(f"images: expected uint8 or floating point, got {images.dtype}")
    height, width = images.shape[2:]
    if min(height, width) < side:
        raise ArgumentError(f"images: expected at least {side} x {side} pixels, got {height} x {width}")
    cells = images.unflatten(0, (-1, side**2))
    mosaics, boxes = torch.empty_like(cells[:, 0]), []
    for number in range(side**2):
        i, j = divmod(number, side)
        top, bottom = i * height // side, (i + 1) * height // side
        left, right = j * width // side, (j + 1) * width // side
        small = F.resize(cells[:, number], [bottom - top, right - left], antialias=True)
        mosaics[:, :, top:bottom, left:right] = small
        boxes.append([left, top, right, bottom])
    of_one = torch.tensor(boxes, dtype=torch.float32, device=images.device)
    return Mosaics(mosaics, of_one.expand(len(mosaics), -1, -1))

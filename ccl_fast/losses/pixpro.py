"""Agreement of pixels of two views that show the same place, and the propagation that smooths them."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_not_negative, check_positive, check_same, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.ops import map_row_blocks
from ccl_fast.ops.normalize import normalize_embeddings

# Pairs of pixels that are computed at a time.
PAIRS = 1 << 20


class PixProLoss(Loss):
    r"""Draws pixels of a view to the pixels of another view of the image that show the same place.

    Of maps y of one view and x' of the other, with boxes where the views were cut out, pixels are pairs whose centres,
    in the image, are nearer than a ratio of the larger of both maps' pixel diagonals:

    .. math::
        \ell = - 2 \operatorname{mean}_{(i, j):\ |c_i - c'_j| < r \max(b, b')} \cos(y_i, x'_j)

    for each image, in the mean over the images that have a pair. Of both views as anchors the losses are added:
    ``loss(y1, x2, ...) + loss(y2, x1, ...)``, y being `propagate_pixels` of a network's maps, and x those of its moving
    average, without a gradient. Similarities of pixels are computed for some images at a time.

    Xie et al., "Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation Learning"
    (PixPro, arXiv:2011.10043), as in the authors' code. The moving average, and the loss of whole images beside it, are
    not here.

    Args:
        temperature: it has none, so nothing but 1.
        ratio: r, > 0.
        normalize: scale pixels to unit length; if not, similarities are inner products.
        reduction: "mean", "sum", or "none". Of the other options of `Loss` it can honour none.

    Cost:
        operators: `map_row_blocks` over images.
        units: 3 of N x P x P' x D for P and P' pixels in each of N images' views.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import PixProLoss, propagate_pixels
        >>> maps, targets = torch.randn(2, 7, 7, 16), torch.randn(2, 7, 7, 16)
        >>> boxes = torch.tensor([[0.0, 0.0, 0.8, 0.8], [0.2, 0.1, 0.9, 0.7]])
        >>> PixProLoss()(propagate_pixels(maps), targets, boxes=boxes, key_boxes=boxes.flip(0)).shape
        torch.Size([])
    """

    unsupported = ("temperature", "learnable_temperature", "backend", "process_group", "exchange")

    def __init__(self, temperature: float = 1.0, *, ratio: float = 0.7, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)
        check_positive("ratio", ratio)
        self.ratio = ratio

    def forward(self, queries: Tensor, keys: Tensor, *, boxes: Tensor, key_boxes: Tensor) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, h, w, d]``, maps of one view; float64, float32, bfloat16, float16.
            keys: ``[n, h', w', d]``, maps of the other view, the targets.
            boxes: ``[n, 4]``, floating point: left, top, right and bottom of the first view, in units of the image;
                of a flipped view left and right change places.
            key_boxes: ``[n, 4]``, those of the other view.

        Returns:
            The loss, float32 (float64 for float64 maps). With reduction "none" a loss per image, ``[n]``; without
            a pair it is 0, and does not count in the mean.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype or device.
        """
        _check_maps("queries", queries)
        _check_maps("keys", keys)
        check_same("keys", keys, "queries", queries)
        for name, x, expected in (
            ("keys", keys, [queries.shape[0], *keys.shape[1:3], queries.shape[3]]),
            ("boxes", boxes, [queries.shape[0], 4]),
            ("key_boxes", key_boxes, [queries.shape[0], 4]),
        ):
            check_tensor(name, x)
            check_floating(name, x)
            check_same(name, x, "queries", queries, dtype=False)
            if list(x.shape) != expected:
                raise ArgumentError(f"{name}: expected shape {expected}, got {list(x.shape)}")
        y, x = (self.unit(maps.flatten(0, 2)).view(maps.shape) for maps in (queries, keys))
        size = _images(y, x)
        wide = torch.promote_types(boxes.dtype, key_boxes.dtype)
        boxes, key_boxes = boxes.to(wide), key_boxes.to(wide)
        sums, count = map_row_blocks(self._sums_and_counts, [y, x, boxes, key_boxes], size=size).unbind(1)
        return self.reduce(-2 * sums / count.clamp(min=1), count > 0)

    def _sums_and_counts(self, rows: Sequence[Tensor], _keys: Sequence[Tensor]) -> Tensor:
        """Of each image the sum of the similarities of its pairs, and their number, [r, 2]."""
        y, x, *boxes = rows
        (centers, diagonal), (others, other_diagonal) = (_pixels(*of) for of in zip((y, x), boxes, strict=True))
        distance = torch.cdist(centers, others, compute_mode="donot_use_mm_for_euclid_dist")
        together = distance < self.ratio * torch.maximum(diagonal, other_diagonal)[:, None, None]
        similarities = y.flatten(1, 2) @ x.flatten(1, 2).transpose(1, 2)
        sums = similarities.masked_fill(~together, 0.0).sum((1, 2))
        return torch.stack((sums, together.sum((1, 2)).to(sums.dtype)), 1)


def propagate_pixels(maps: Tensor, values: Tensor | None = None, *, power: float = 2.0) -> Tensor:
    r"""Replace each pixel by the sum of its image's pixels, as far as they are like it.

    .. math::
        y_i = \sum_j \max(0, \cos(x_i, x_j))^\gamma \, g_j / |g_j|

    PixPro's propagation module (Xie et al., arXiv:2011.10043), g being a linear map of the pixels.

    Args:
        maps: x, ``[n, h, w, d]``, float64, float32, bfloat16 or float16.
        values: g, ``[n, h, w, e]``; None: x.
        power: gamma, >= 0.

    Returns:
        ``[n, h, w, e]``, float32 (float64 for float64 maps).

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import propagate_pixels
        >>> propagate_pixels(torch.tensor([[[[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]]]])).tolist()
        [[[[1.0, 0.0], [0.0, 2.0], [0.0, 2.0]]]]
    """
    _check_maps("maps", maps)
    check_not_negative("power", power)
    if values is not None:
        _check_maps("values", values)
        check_same("values", values, "maps", maps)
        if values.shape[:3] != maps.shape[:3]:
            expected = f"[{', '.join(str(size) for size in maps.shape[:3])}, e]"
            raise ArgumentError(f"values: expected shape {expected}, got {list(values.shape)}")
    given = [maps] if values is None else [maps, values]
    units = [normalize_embeddings(x.flatten(0, 2)).view(x.shape).flatten(1, 2) for x in given]

    def propagate(rows: Sequence[Tensor], _keys: Sequence[Tensor]) -> Tensor:
        x, g = rows[0], rows[-1]
        similarity = (x @ x.transpose(1, 2)).clamp(min=0)
        return similarity.pow(power) @ g

    return map_row_blocks(propagate, units, size=_images(maps, maps)).view(given[-1].shape)


def _images(y: Tensor, x: Tensor) -> int:
    """How many at a time."""
    return max(1, PAIRS // max(1, y.shape[1] * y.shape[2] * x.shape[1] * x.shape[2]))


def _pixels(maps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of the pixels of maps in their images, [n, h w, 2], and their diagonals, [n]."""
    h, w = maps.shape[1:3]
    sides = (boxes[:, 2:] - boxes[:, :2]) / torch.tensor([w, h], dtype=boxes.dtype, device=boxes.device)
    x, y = torch.meshgrid(*(torch.arange(k, device=boxes.device) + 0.5 for k in (w, h)), indexing="xy")
    places = torch.stack((x, y), 2).flatten(0, 1).to(boxes.dtype)
    return boxes[:, None, :2] + places * sides[:, None], sides.norm(dim=1)


def _check_maps(name: str, x: Tensor) -> None:
    check_tensor(name, x)
    check_floating(name, x)
    if x.ndim != 4:
        raise ArgumentError(f"{name}: expected shape [n, h, w, d], got {list(x.shape)}")

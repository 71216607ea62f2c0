"""The dense form of agreement between pixels: all pairs of all images at once."""

import torch
from torch import Tensor

from tests.oracles.matrices import over_rows, scaled


def centers_and_diagonals(h: int, w: int, boxes: Tensor) -> tuple[Tensor, Tensor]:
    left, top, right, bottom = boxes.unbind(1)
    width, height = (right - left) / w, (bottom - top) / h
    places = [(left + (j + 0.5) * width, top + (i + 0.5) * height) for i in range(h) for j in range(w)]
    return torch.stack([torch.stack(place, 1) for place in places], 1), torch.hypot(width, height)


def pixpro(
    queries: Tensor,
    keys: Tensor,
    boxes: Tensor,
    key_boxes: Tensor,
    *,
    ratio: float = 0.7,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    y, x = (scaled(maps, queries, normalize).flatten(1, 2) for maps in (queries, keys))
    c, b = centers_and_diagonals(*queries.shape[1:3], boxes)
    other, other_b = centers_and_diagonals(*keys.shape[1:3], key_boxes)
    distance = (c[:, :, None] - other[:, None]).square().sum(3).sqrt()
    together = distance < ratio * torch.maximum(b, other_b)[:, None, None]
    count = together.sum((1, 2))
    sums = ((y[:, :, None] * x[:, None]).sum(3) * together).sum((1, 2))
    return over_rows(-2 * sums / count.clamp(min=1), reduction, count > 0)


def propagated(maps: Tensor, values: Tensor | None = None, *, power: float = 2.0) -> Tensor:
    x = scaled(maps, maps, True).flatten(1, 2)
    g = x if values is None else scaled(values, values, True).flatten(1, 2)
    weights = (x[:, :, None] * x[:, None]).sum(3).clamp(min=0).pow(power)
    return (weights[..., None] * g[:, None]).sum(2).view(*maps.shape[:3], -1)

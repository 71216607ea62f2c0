"""`ccl_fast.data.pixels.fit` of a batch of whatever size, in operations that exporters can write."""

from __future__ import annotations

import torch
from torch import Tensor

# torchvision resizes bytes in fixed-point arithmetic: weights are int16, with at most 22 bits behind the point.
WEIGHT, MAX_BITS = 1 << 15, 22


def fit_batch(pixels: Tensor, height: int, width: int) -> Tensor:
    """Images [n, c, h, w], whole numbers from 0 to 255, resized by the shorter side and centre cropped.

    To the bit what torchvision makes of bytes on a CPU with AVX2 or on ARM: across, rounded to bytes, then down. Along
    a side that is a product with a matrix, of which a crop keeps some rows. No condition depends on h or w, so one
    exported program does for all sizes.

    Returns:
        float64 [n, c, height, width], whole numbers.
    """
    h, w = pixels.shape[2:]
    across, across_unit = _weights(w, w * height // h, width, pixels.device)
    down, down_unit = _weights(h, h * width // w, height, pixels.device)
    # float64 is exact here: a weight has 15 bits, a value 8.
    resized = _bytes(pixels.double() @ across.T, across_unit)
    return _bytes(down @ resized, down_unit)


def _weights(side: int, proportional: int, wanted: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Fixed-point weights [wanted, side] of a side's pixels in those that a crop keeps of the resized side.

    Args:
        side: its pixels.
        proportional: its length where the other side gets the length that is wanted of it.
        wanted: the length after the crop; the resized side has the larger of the two.
        device: of the weights.

    Returns:
        Whole numbers, and which of them stands for 1; both float64.
    """
    like: dict = {"dtype": torch.float64, "device": device}
    lengths, kept = torch.arange(proportional, **like), torch.arange(wanted, **like)
    resized = torch.full((), proportional, **like).clamp(min=wanted)
    scale = side / resized
    first = ((resized - wanted) / 2).round()  # half to even, as Python rounds for torchvision's crop
    # Weights fall linearly to 0 at a distance of one pixel of the coarser grid.
    reach = scale.clamp(min=1)
    distances = torch.arange(side, **like) + 0.5 - (scale * (first + kept + 0.5))[:, None]
    weights = (1 - (distances / reach).abs()).clamp(min=0)
    weights = weights / weights.sum(1, keepdim=True)
    # The unit is that of all the resized side, whatever is kept of it.
    unit = _unit(_largest(scale * (torch.cat([lengths, kept]) + 0.5), reach, side))
    return (weights * unit + 0.5).floor(), unit


def _largest(centers: Tensor, reach: Tensor, side: int) -> Tensor:
    """The largest weight of all pixels around any of the centres; its sums over pixels are sums of whole numbers."""
    low, high = (centers - reach - 0.5).ceil().clamp(min=0), (centers + reach + 0.5).floor().clamp(max=side)
    middle = (centers + 0.5).floor()
    left = (middle - low) * centers - (middle**2 - low**2) / 2
    right = (high**2 - middle**2) / 2 - (high - middle) * centers
    nearest = (centers.floor() + 0.5 - centers).abs()
    return ((1 - nearest / reach) / (high - low - (left + right) / reach)).amax(0)


def _unit(largest: Tensor) -> Tensor:
    """The largest power of 2 of which the largest weight is an int16."""
    powers = torch.tensor([2.0**bits for bits in range(MAX_BITS + 1)], dtype=torch.float64, device=largest.device)
    return torch.where((largest * powers + 0.5).floor() < WEIGHT, powers, 1.0).amax(0)


def _bytes(sums: Tensor, unit: Tensor) -> Tensor:
    return (sums / unit + 0.5).floor().clamp(0, 255)

"""Prototypes that are learned with the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import normalize


class Prototypes(nn.ParameterList):
    """A matrix ``[k, d]`` of unit rows for every number k, in random directions at first.

    Args:
        numbers: of prototypes; several give several matrices.
        dimension: d.
        seed: of the directions.
        device: where they are.
    """

    def __init__(self, numbers: Sequence[int], dimension: int, *, seed: int, device: torch.device):
        options = {"generator": torch.Generator().manual_seed(seed), "device": "cpu", "dtype": torch.float32}
        drawn = [normalize(torch.randn(k, dimension, **options)) for k in numbers]
        super().__init__(nn.Parameter(directions.to(device)) for directions in drawn)

    def hold(self) -> None:
        """Let the optimiser's next step leave them as they are."""
        for matrix in self:
            matrix.grad = None

    @torch.no_grad()
    def rescale(self) -> None:
        """Bring the prototypes back to unit length, after a step."""
        for matrix in self:
            matrix.copy_(normalize(matrix))

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
        super().__init__(nn.Parameter(torch.empty(k, dimension, dtype=torch.float32, device=device)) for k in numbers)
        self.seed = seed
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the directions, the same wherever they are."""
        options = {"generator": torch.Generator().manual_seed(self.seed), "device": "cpu", "dtype": torch.float32}
        for matrix in self:
            matrix.copy_(normalize(torch.randn(*matrix.shape, **options)))

    def hold(self) -> None:
        """Let the optimiser's next step leave them as they are."""
        for matrix in self:
            matrix.grad = None

    @torch.no_grad()
    def rescale(self) -> None:
        """Bring the prototypes back to unit length, after a step."""
        for matrix in self:
            matrix.copy_(normalize(matrix))

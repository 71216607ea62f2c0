"""Rows, keys and candidates of the operators over whole rows, and which pairs these are, by a matrix."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

SIZES = ((13, None), (1, None), (0, None), (13, 5), (4, 70), (7, 0), (0, 6))
every_size = pytest.mark.parametrize("n, m", SIZES)
every_choice = pytest.mark.parametrize("candidates", ("all", "other_id", "same_id"))


@dataclass
class Pairs:
    q: Tensor
    k: Tensor | None
    among: dict  # q_ids, k_ids and candidates

    @property
    def keys(self) -> Tensor:
        return self.q if self.k is None else self.k

    def mask(self) -> Tensor:
        """Which keys are a row's candidates, [n, m]."""
        mask = torch.ones(len(self.q), len(self.keys), dtype=torch.bool)
        if self.k is None:
            mask.fill_diagonal_(False)
        if self.among["candidates"] != "all":
            own = self.among["q_ids"]
            same = own[:, None] == (own if self.k is None else self.among["k_ids"])
            mask &= same if self.among["candidates"] == "same_id" else ~same
        return mask


def pairs(n: int, m: int | None, candidates: str = "all", d: int = 6, dtype=torch.float64, seed: int = 0) -> Pairs:
    """Normal random rows, of three ids."""
    generator = torch.Generator().manual_seed(seed)

    def rows(number):
        return torch.randn(number, d, generator=generator, dtype=torch.float64).to(dtype)

    def ids(number):
        return torch.randint(3, (number,), generator=generator)

    among = {"candidates": candidates}
    if candidates != "all":
        among |= {"q_ids": ids(n)} | ({} if m is None else {"k_ids": ids(m)})
    return Pairs(rows(n), None if m is None else rows(m), among)

"""How tensor cores have been seen to add: an oracle of the emulated ones that truncate, and of their bound."""

import torch
from torch import Tensor

DIGITS = 24  # of float32


def truncated_sum(start: Tensor, products: Tensor, addends: int) -> Tensor:
    """start [...] plus products [..., n], so many at a time; float64 that holds float32, n a multiple of addends.

    They and the sum so far are aligned to the largest of them, digits below the last of its 24 are cut off, and so are
    those of the result.
    """
    total = start.double()
    for some in products.double().split(addends, dim=-1):
        terms = torch.cat([total[..., None], some], dim=-1)
        last = _last_digit(terms.abs().amax(-1, keepdim=True))
        total = (terms / last).trunc().sum(-1) * last[..., 0]
        last = _last_digit(total.abs())
        total = (total / last).trunc() * last
    return total


def _last_digit(x: Tensor) -> Tensor:
    return torch.exp2(torch.frexp(x).exponent.double() - DIGITS)

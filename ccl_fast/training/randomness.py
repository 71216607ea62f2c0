"""Random numbers that depend on a name, not on what was drawn before: nothing of them need be saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def _mix(*keys: int) -> int:
    """Make a well-spread seed from several numbers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def seeded(device: torch.device, *keys: int) -> Iterator[None]:
    """Seed torch's generators by the keys within ``with``; afterwards they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(_mix(*keys))
        yield


def shuffled(n: int, *keys: int) -> Tensor:
    """Return a permutation of 0 ... n - 1, int64, on the CPU."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(_mix(*keys)), device="cpu")

"""Who takes part in a comparison, at which sizes, and what keeps one from it."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

# A contender whose arrays would take more than this share of the free memory is not started.
MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Size:
    n: int  # rows: one per view
    d: int
    dtype: torch.dtype = torch.float32
    clusters: int = 128


@dataclass(frozen=True)
class Contender:
    name: str
    build: Callable  # of a case: what is called with its inputs
    fairness: str
    package: str | None = None
    attribute: str | None = None  # of torch.nn, which older releases lack
    cuda_only: bool = False
    ignores_centers: bool = False  # then its truth has none either
    # Bytes of its N x N (or N x K) arrays at the peak, as measured for float32 at N = 4096; 0 for linear memory.
    arrays: Callable[[Size], int] = lambda size: 0

    def obstacle(self, size: Size, device: torch.device) -> str | None:
        """Why it cannot run this size here, or None."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.attribute and not hasattr(torch.nn, self.attribute):
            return f"torch {torch.__version__} has no torch.nn.{self.attribute}"
        if self.cuda_only and device.type != "cuda":
            return "runs on CUDA only"
        needed, available = self.arrays(size), free_memory(device)
        if needed > MEMORY_SHARE * available:
            return (
                f"not started: its arrays would take {needed / 2**30:,.0f} GiB, "
                f"over {MEMORY_SHARE:.0%} of the {available / 2**30:.0f} GiB free"
            )
        return None


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        # What torch's allocator keeps but does not use is free to us.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

"""The launch configurations of the kernels: one table, in the order of the padded D."""

from functools import cache
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Block sizes, and what Triton is told: warps per program and stages of the software pipeline."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        # Fused multiply-adds are said outright: Triton 3.9 warns where they are left to its default, which will change.
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


class Entry(NamedTuple):
    """Serves D padded to at most `limit`.

    The base launch fits the 99 KB of shared memory that a block has on sm_86, sm_89 and sm_120; an architecture with
    more room, or another way to multiply, may have a launch of its own.
    """

    limit: int
    base: Launch
    sm_80: Launch | None = None
    sm_90: Launch | None = None
    sm_100: Launch | None = None
    sm_120: Launch | None = None

    def on(self, architecture: int) -> Launch:
        return getattr(self, f"sm_{architecture}", None) or self.base


# By kernel, bytes per element, and whether there are cluster ids, which take registers. Where block_d is less than the
# padded D the products loop over chunks of it; a kernel whose list ends is not for larger D. Every entry is compiled
# for ARCHITECTURES in tests/kernels/test_triton_offline.py, which names the versions of Triton: no spills, tensor
# cores, shared memory that fits, and bounds on the inner loop.
# Chosen by these readings; not yet by timing on a GPU.
ANY = 1 << 30
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TABLE: dict[tuple[str, int, bool], list[Entry]] = {
    ("forward_rows", 2, False): [
        Entry(64, Launch(128, 64, 64, 4, 3)),
        Entry(128, Launch(128, 64, 128, 8, 3), sm_120=Launch(64, 64, 128, 4, 3)),
        Entry(ANY, Launch(128, 128, 64, 8, 3), sm_120=Launch(128, 64, 64, 8, 3)),
    ],
    ("forward_rows", 2, True): [
        Entry(64, Launch(128, 64, 64, 8, 3)),
        Entry(128, Launch(128, 64, 128, 8, 3), sm_120=Launch(64, 64, 128, 4, 3)),
        Entry(ANY, Launch(128, 128, 64, 8, 3), sm_120=Launch(128, 64, 64, 8, 3)),
    ],
    ("forward_triangle", 2, False): [
        Entry(64, Launch(128, 128, 64, 8, 3)),
        Entry(128, Launch(128, 64, 128, 8, 3), sm_90=Launch(128, 64, 128, 4, 3)),
        Entry(
            256,
            Launch(128, 128, 64, 8, 3),
            sm_90=Launch(128, 64, 256, 8, 3),
            sm_100=Launch(128, 128, 32, 8, 3),
            sm_120=Launch(128, 128, 32, 8, 3),
        ),
        Entry(
            ANY,
            Launch(128, 128, 64, 8, 3),
            sm_100=Launch(128, 128, 32, 8, 3),
            sm_120=Launch(128, 128, 32, 8, 3),
        ),
    ],
    ("forward_triangle", 2, True): [
        Entry(64, Launch(128, 128, 64, 8, 3), sm_100=Launch(64, 64, 64, 4, 3)),
        Entry(128, Launch(128, 64, 128, 8, 3)),
        Entry(
            256,
            Launch(128, 128, 32, 8, 3),
            sm_80=Launch(128, 128, 64, 8, 3),
            sm_90=Launch(128, 64, 256, 8, 3),
            sm_100=Launch(64, 64, 64, 8, 3),
        ),
        Entry(
            ANY,
            Launch(128, 128, 32, 8, 3),
            sm_80=Launch(128, 128, 64, 8, 3),
            sm_90=Launch(128, 128, 64, 8, 3),
            sm_100=Launch(64, 64, 64, 8, 3),
        ),
    ],
    ("backward_rows", 2, False): [
        Entry(64, Launch(128, 64, 64, 8, 3)),
        Entry(128, Launch(64, 64, 128, 4, 3), sm_120=Launch(64, 32, 128, 4, 3)),
        Entry(
            256,
            Launch(64, 32, 256, 4, 3),
            sm_90=Launch(128, 32, 256, 8, 3),
            sm_100=Launch(128, 32, 256, 8, 3),
            sm_120=Launch(32, 32, 256, 4, 3),
        ),
    ],
    ("backward_rows", 2, True): [
        Entry(64, Launch(128, 64, 64, 8, 3), sm_100=Launch(64, 64, 64, 8, 3)),
        Entry(128, Launch(64, 64, 128, 8, 3), sm_90=Launch(64, 64, 128, 4, 3)),
        Entry(256, Launch(32, 32, 256, 4, 3), sm_90=Launch(128, 32, 256, 8, 3), sm_100=Launch(128, 32, 256, 8, 3)),
    ],
    ("backward_weights", 2, False): [Entry(ANY, Launch(128, 64, 64, 8, 3), sm_90=Launch(128, 128, 64, 8, 3))],
    ("backward_weights", 2, True): [Entry(ANY, Launch(128, 64, 64, 8, 3))],
    ("forward_rows", 4, False): [Entry(ANY, Launch(128, 64, 32, 8, 3))],
    ("forward_rows", 4, True): [
        Entry(ANY, Launch(128, 64, 32, 8, 3), sm_90=Launch(64, 64, 32, 4, 3), sm_100=Launch(64, 64, 32, 4, 3)),
    ],
    ("forward_triangle", 4, False): [Entry(ANY, Launch(128, 64, 32, 8, 3))],
    ("forward_triangle", 4, True): [
        Entry(ANY, Launch(64, 64, 32, 8, 3), sm_90=Launch(64, 64, 32, 4, 3), sm_100=Launch(128, 64, 16, 8, 3)),
    ],
    ("backward_rows", 4, False): [
        Entry(64, Launch(32, 32, 64, 4, 2), sm_90=Launch(64, 32, 64, 4, 2), sm_100=Launch(64, 32, 64, 8, 2)),
    ],
    ("backward_rows", 4, True): [
        Entry(64, Launch(32, 32, 64, 4, 2), sm_90=Launch(64, 32, 64, 4, 2), sm_100=Launch(64, 32, 64, 8, 2)),
    ],
    ("backward_weights", 4, False): [Entry(ANY, Launch(64, 64, 32, 4, 3), sm_120=Launch(64, 64, 32, 8, 3))],
    ("backward_weights", 4, True): [
        Entry(ANY, Launch(64, 64, 32, 8, 3), sm_90=Launch(64, 64, 32, 4, 3), sm_100=Launch(64, 64, 32, 4, 3)),
    ],
}


def architecture_of(device: torch.device) -> int:
    """Of `ARCHITECTURES` the one whose launches the device takes; what is interpreted on a CPU takes those of sm_90."""
    return _architecture(device.index) if device.type == "cuda" else 90


@cache
def _architecture(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    if major == 8:
        return {0: 80, 9: 89}.get(minor, 86)
    return {9: 90, 10: 100, 11: 100, 12: 120}.get(major, 86)


def launch(kernel: str, dtype: torch.dtype, d: int, ids: bool, device: torch.device) -> Launch:
    """The launch of a kernel for a dtype, D, and whether there are ids. The kernel must take that D."""
    found = launch_on(architecture_of(device), kernel, dtype.itemsize, d, ids)
    if found is None:
        raise LookupError(f"{kernel} is not for D = {d} of {dtype}")
    return found


def takes(kernel: str, dtype: torch.dtype, d: int, ids: bool, device: torch.device) -> bool:
    """Tell whether a kernel takes that D."""
    return launch_on(architecture_of(device), kernel, dtype.itemsize, d, ids) is not None


def launch_on(architecture: int, kernel: str, element_size: int, d: int, ids: bool) -> Launch | None:
    """The same for one of `ARCHITECTURES`; None if the kernel does not take that D."""
    padded = max(16, 1 << (d - 1).bit_length())
    for entry in TABLE[kernel, element_size, ids]:
        if padded <= entry.limit:
            chosen = entry.on(architecture)
            return chosen._replace(block_d=min(chosen.block_d, padded))
    return None

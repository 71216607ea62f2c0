"""The launch configurations of the kernels: one table, in the order of the padded D."""

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
    """Serves D padded to at most `limit`; cluster ids take registers, so they may need a launch of their own."""

    limit: int
    plain: Launch
    with_ids: Launch


def _entry(limit: int, plain: Launch, with_ids: Launch | None = None) -> Entry:
    return Entry(limit, plain, with_ids or plain)


# By kernel and bytes per element. Where block_d is less than the padded D the products loop over chunks of it; a
# kernel whose list ends is not for larger D. Every entry is compiled for sm_80, sm_90 and sm_100 in
# tests/test_triton_offline.py: no spills under Triton 3.6 to 3.9, tensor cores, and shared memory that fits (on sm_80
# into the 99 KB that its smaller relatives have). Chosen by these readings; not yet by timing on a GPU.
ANY = 1 << 30
TABLE: dict[tuple[str, int], list[Entry]] = {
    ("forward_rows", 2): [
        _entry(64, Launch(128, 64, 64, 4, 3), Launch(128, 64, 64, 8, 3)),
        _entry(128, Launch(128, 64, 128, 8, 3)),
        _entry(ANY, Launch(128, 128, 64, 8, 3)),
    ],
    ("forward_rows", 4): [_entry(ANY, Launch(64, 64, 32, 4, 3))],
    ("forward_triangle", 2): [
        _entry(64, Launch(128, 128, 64, 8, 3), Launch(64, 64, 64, 4, 3)),
        _entry(128, Launch(128, 128, 128, 8, 2)),
        _entry(ANY, Launch(128, 128, 32, 8, 3), Launch(64, 64, 64, 4, 3)),
    ],
    ("forward_triangle", 4): [_entry(ANY, Launch(64, 64, 32, 4, 3))],
    ("backward_rows", 2): [
        _entry(64, Launch(128, 64, 64, 8, 3), Launch(64, 64, 64, 8, 3)),
        _entry(128, Launch(64, 64, 128, 4, 2), Launch(64, 64, 128, 8, 2)),
        _entry(256, Launch(64, 32, 256, 8, 2)),
    ],
    ("backward_rows", 4): [_entry(64, Launch(64, 32, 64, 4, 2))],
    ("backward_weights", 2): [_entry(ANY, Launch(128, 64, 64, 8, 3))],
    ("backward_weights", 4): [_entry(ANY, Launch(64, 64, 32, 4, 3))],
}


def launch(kernel: str, dtype: torch.dtype, d: int, ids: bool) -> Launch | None:
    """The launch of a kernel for a dtype, D, and whether there are ids; None if the kernel does not take that D."""
    padded = max(16, 1 << (d - 1).bit_length())
    for entry in TABLE[kernel, dtype.itemsize]:
        if padded <= entry.limit:
            chosen = entry.with_ids if ids else entry.plain
            return chosen._replace(block_d=min(chosen.block_d, padded))
    return None

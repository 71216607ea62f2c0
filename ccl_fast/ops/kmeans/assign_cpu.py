"""Nearest centres by the CPU extension: as the blocked backend, but no score ever leaves the registers.

The extension keeps of every row the lowest score, its centre and the second lowest score. Where the second could be the
lowest but for rounding, the row is compared with all centres in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccl_fast.kernels import cpu_extension
from ccl_fast.kernels.extension import address
from ccl_fast.ops.kmeans import assign_blocked
from ccl_fast.ops.kmeans.update_blocked import KEPT_ENTRIES
from ccl_fast.ops.normalize import normalize_rows

# Entries of rows that are converted at once, if the extension does not take them as they are.
ENTRIES = 1 << 20


class Rows(assign_blocked.Rows):
    """Rows [problems, rows, d], which are kept as panels if they are few."""

    def _prepare(self) -> None:
        self.cpu, self.scales = cpu_extension.best(), self.scale.tolist()
        problems, n, d = self.x.shape
        self.panels = self.lengths = None
        if self.x.numel() <= KEPT_ENTRIES:  # the first assignment writes them
            self.panels = self.origin.new_empty(problems, -(-n // self.cpu.rows), d, self.cpu.rows)
            self.lengths = self.origin.new_empty(problems, n)
        self.are_packed = [False] * problems

    def _nearest(self, problem: int, centers: Tensor, labels: Tensor) -> int:
        cosine, (n, d), k = self.metric == "cosine", self.x.shape[1:], centers.shape[1]
        directions = normalize_rows(centers.double()).to(self.dtype) if cosine else centers
        panels, lengths = (None if kept is None else kept[problem] for kept in (self.panels, self.lengths))
        in_one = panels is not None or cpu_extension.takes(self.x[problem])
        size = n if in_one else max(1, ENTRIES // d)
        unsure = 0
        for start in range(0, n, size):
            part = slice(start, start + size)
            x = cpu_extension.rows_of(self.x[problem, part])
            for i in range(len(centers)):
                unsure += self.cpu.nearest(
                    address(x), x.stride(0), len(x), d, address(self.origin[problem]), self.scales[problem],
                    address(panels), address(lengths), self.are_packed[problem],
                    address(centers[i]), address(directions[i]), k, cosine, self.rounding, self.distance_rounding,
                    address(labels[i, part]), torch.get_num_threads(),
                )  # fmt: skip
                self.are_packed[problem] = panels is not None
        return unsure

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

# Entries of the rows of one block, which meet all centres one cache of them after the other.
BLOCK_ENTRIES = 1 << 16


class Rows(assign_blocked.Rows):
    """Rows [problems, rows, d], which are kept as panels if they are few."""

    def _lengths(self) -> Tensor:
        self.cpu = cpu_extension.best()
        self.scales = self.scale.tolist()
        problems, n, _ = self.x.shape
        lengths = torch.empty(problems, n, dtype=self.dtype, device=self.x.device)
        keeps = self.x.numel() <= KEPT_ENTRIES
        self.panels = [self._pack(i, slice(0, n), lengths[i]) for i in range(problems)] if keeps else None
        if not keeps:
            size = self._block_rows(1)
            for problem in range(problems):
                for start in range(0, n, size):
                    self._pack(problem, slice(start, start + size), lengths[problem, start : start + size])
        return lengths

    def _block_rows(self, clusters: int) -> int:
        panels = max(4, BLOCK_ENTRIES // (self.cpu.rows * self.x.shape[2]))
        return self.cpu.rows * panels

    def _pack(self, problem: int, part: slice, lengths: Tensor | None = None) -> Tensor:
        """Return these rows, moved and scaled, as panels."""
        x = cpu_extension.rows_of(self.x[problem, part])
        return _panels(self.cpu, x, self.cpu.rows, self.origin[problem], self.scales[problem], lengths)

    def _aim(self, problem: int, centers: Tensor, towards: assign_blocked.Towards) -> Tensor:
        length = super()._aim(problem, centers, towards)
        self.packed = [_panels(self.cpu, minus, self.cpu.centers) for minus in towards.minus]
        sets, k, _ = centers.shape
        # A centre that only fills its panel is never the nearest.
        self.half_square = towards.square.new_full((sets, len(self.packed[0]) * self.cpu.centers), torch.inf)
        self.half_square[:, :k] = 0 if self.metric == "cosine" else 0.5 * towards.square
        return length

    def _label(
        self,
        problem: int,
        part: slice,
        centers: Tensor,
        towards: assign_blocked.Towards,
        margin: Tensor,
        labels: Tensor,
    ) -> int:
        if self.panels is None:
            panels = self._pack(problem, part)
        else:
            panels = self.panels[problem][part.start // self.cpu.rows :]
        (sets, n), (k, d) = labels.shape, centers.shape[1:]
        state = margin.new_empty(3, -(-n // self.cpu.rows) * self.cpu.rows)
        unsure = margin.new_empty(sets, n, dtype=torch.int32)
        counts = [
            self.cpu.nearest(
                address(panels), n, d, address(self.packed[i]), address(self.half_square[i]), k,
                address(margin[i]), address(state), address(labels[i]), address(unsure[i]),
            )
            for i in range(sets)
        ]  # fmt: skip
        if unsure_rows := sum(counts):
            x, cosine = cpu_extension.rows_of(self.x[problem, part]), self.metric == "cosine"
            for i, count in enumerate(counts):
                self.cpu.decide(
                    address(x), x.stride(0), address(unsure[i]), count, d, address(centers[i]), k, cosine,
                    address(labels[i]),
                )  # fmt: skip
        return unsure_rows


def _panels(
    cpu, x: Tensor, width: int, origin: Tensor | None = None, scale: float = 1.0, lengths: Tensor | None = None
) -> Tensor:
    """Return x [n, d], less the origin and times the scale, as panels [n / width, d, width]."""
    n, d = x.shape
    panels = x.new_empty(-(-n // width), d, width)
    cpu.pack(address(x), x.stride(0), n, d, address(origin), scale, width, address(panels), address(lengths))
    return panels

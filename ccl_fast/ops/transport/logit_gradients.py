"""What derivatives by logits of points and centres make of both, block after block."""

import torch
from torch import Tensor

from ccl_fast.ops.row_dot import row_dot
from ccl_fast.ops.rowwise.half_product import Weights, columns_of


class LogitGradients:
    """Of z [views, n, d], the centres and the scale, as far as they are wanted, summed up over blocks of rows."""

    def __init__(self, z: Tensor, centers: Tensor, scale: Tensor, dtype: torch.dtype, needs: list[bool]):
        self.need_z, self.need_centers, self.need_scale = needs
        self.scale, self.centers = scale, columns_of(centers)
        self.to_z = z.new_empty(z.shape if self.need_z else 0, dtype=dtype)
        self.to_centers = scale.new_zeros(self.centers.shape if self.need_centers else 0)
        self.to_scale = torch.zeros_like(scale)

    def add(self, rows: slice, points: Tensor, by_logits: Tensor) -> None:
        """Of rows of all views, [views * rows, d], with the derivatives by their logits, [views, rows, k]."""
        w = Weights(by_logits.flatten(0, 1), points.dtype)
        if self.need_z or self.need_scale:
            by_z = w.sums_of_keys(self.centers)
            self.to_scale += row_dot(by_z, points).sum()
            if self.need_z:
                to_rows = self.to_z[:, rows]
                to_rows.copy_(by_z.mul_(self.scale).view_as(to_rows))
        if self.need_centers:
            self.to_centers += w.sums_of_queries(columns_of(points))

    def all(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Those of z and of the centres in a dtype."""
        to_centers = self.to_centers.T.mul(self.scale).to(dtype).contiguous() if self.need_centers else self.to_centers
        return self.to_z, to_centers.to(dtype), self.to_scale

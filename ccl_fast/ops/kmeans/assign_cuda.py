"""Nearest centres by the CUDA extension: float16 tensor cores, and more digits where their rounding could matter."""

import torch
from torch import Tensor

from ccl_fast.errors import ArgumentError
from ccl_fast.kernels import extension
from ccl_fast.kernels.extension import address

# Packed entries lie below 2^15 in magnitude; float16 reaches to 65,504 and loses precision only below 2^-14.
TOP_EXPONENT = 15
# Rows in doubt are listed as int32.
MAX_ROWS = 2**31 - 1
# Beyond it the bound of a float32 sum would be none.
MAX_COLUMNS = 1 << 20
# Blocks that share a list, per multiprocessor.
LIST_BLOCKS = 4


class Rows:
    """Rows [problems, rows, d], packed once for many assignments."""

    def __init__(self, x: Tensor, metric: str):
        self.x, self.metric = x.contiguous(), metric
        problems, _, d = x.shape
        if problems > extension.MAX_PROBLEMS or problems * x.shape[1] > MAX_ROWS:
            limits = f"{extension.MAX_PROBLEMS} problems and {MAX_ROWS} rows in all"
            raise ArgumentError(
                f"x: expected at most {limits} for the cuda backend, got {problems} and {problems * x.shape[1]}"
            )
        if d > MAX_COLUMNS:
            raise ArgumentError(f"x: expected at most {MAX_COLUMNS} columns for the cuda backend, got {d}")
        self.padded_d = _round_up(d, extension.compiled().PAD_COLUMNS)
        if metric == "cosine":
            self.origin = None
            self.scale = torch.full((problems,), 2.0 ** (TOP_EXPONENT - 1), dtype=torch.float32, device=x.device)
        else:
            origin = x.mean(1, dtype=torch.float32)
            # The mean of huge values overflows; any origin is right.
            self.origin = torch.where(origin.isfinite(), origin, 0.0).contiguous()
            low, high = torch.aminmax(self.x, dim=1)
            largest = torch.maximum(high - self.origin, self.origin - low).amax(1)
            exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent, 128)
            self.scale = torch.exp2((TOP_EXPONENT - exponent).clamp(-126, 126).float())
        self.packed, self.norm, self.residue, _ = self._pack(self.x, x.shape[1])

    def nearest(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Labels int64 [problems, rows], and how many rows were in doubt and re-checked, int64 [2], on the device."""
        module, centers = extension.compiled(), centers.contiguous()
        problems, rows, d = self.x.shape
        clusters = centers.shape[1]
        padded = _round_up(clusters, module.PAD_CENTERS)
        packed, norm, residue, half_square = self._pack(centers, padded)
        tiles = (problems, padded // module.PAD_CENTERS, module.PAD_CENTERS)
        tile_norm = (norm + residue).view(tiles).amax(2)
        tile_residue = residue.view(tiles).amax(2)

        labels = torch.empty(problems, rows, dtype=torch.int64, device=centers.device)
        unsure, rivals, open_rows = torch.empty(3, problems * rows, dtype=torch.int32, device=centers.device)
        others = torch.empty(problems * rows, dtype=torch.float32, device=centers.device)
        counts = torch.zeros(2, dtype=torch.int32, device=centers.device)
        unsure_count, open_count = counts
        kind = extension.dtype_code(self.x.dtype)
        shape = rows, clusters, d, extension.metric_code(self.metric)
        where = LIST_BLOCKS * _multiprocessors(centers.device), *extension.where(centers)
        module.kmeans_assign(
            address(self.packed), address(self.norm), address(self.residue), address(packed), address(half_square),
            address(tile_norm), address(tile_residue), problems, rows, padded, self.padded_d,
            address(labels), address(unsure), address(rivals), address(others), address(unsure_count),
            *extension.where(centers),
        )  # fmt: skip
        module.kmeans_runoff(
            address(self.x), kind, address(centers), *shape, address(self.origin), address(self.scale),
            address(unsure), address(rivals), address(others), address(unsure_count), address(labels),
            address(open_rows), address(open_count), *where,
        )  # fmt: skip
        module.kmeans_recheck(
            address(self.x), kind, address(centers), *shape, address(open_rows), address(open_count),
            address(labels), *where,
        )  # fmt: skip
        return labels, counts.long()

    def _pack(self, x: Tensor, padded_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        problems, rows, d = x.shape
        packed = torch.empty(problems, padded_rows, self.padded_d, dtype=torch.float16, device=x.device)
        norm, residue, half_square = torch.empty(3, problems, padded_rows, dtype=torch.float32, device=x.device)
        extension.compiled().kmeans_pack(
            address(x), extension.dtype_code(x.dtype), problems, rows, d, extension.metric_code(self.metric),
            address(self.origin), address(self.scale), padded_rows, self.padded_d,
            address(packed), address(norm), address(residue), address(half_square), *extension.where(x),
        )  # fmt: skip
        return packed, norm, residue, half_square


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

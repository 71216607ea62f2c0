"""The matrix product of rows with rows, on a CPU by the fastest of torch's libraries."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

# Multiplications up to which oneDNN's setting up takes longer than MKL's product.
ONEDNN_ENTRY = 1 << 19
# Relative rounding of the factors of a product, by torch's setting of the precision of float32 products.
FACTOR_ROUNDING = {"tf32": 2.0**-10, "bf16": 2.0**-7}


def matmul_nt(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x [n, d], weight [m, d], bias [m] -> [n, m]. Not differentiable."""
    large = x.shape[0] * weight.shape[0] * x.shape[1] > ONEDNN_ENTRY
    if large and x.device.type == "cpu" and x.dtype == torch.float32 and (linear := _onednn_linear()):
        if not (weight.is_contiguous() or weight.T.is_contiguous()):
            weight = weight.contiguous()  # of other strides it takes some hundred times as long
        return linear(x, weight, bias, "none", [], "")
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)


@functools.cache
def _onednn_linear():
    """oneDNN's linear layer, as torch.compile uses it: on AMD's CPUs twice as fast as MKL's product. Or None.

    On Intel's, MKL's is never slower, and up to a third faster where a product takes less than a millisecond.
    """
    if _is_intels():
        return None
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
        # Explicit, as the answer is kept: the first caller may have set other defaults.
        plain = {"dtype": torch.float32, "device": "cpu"}
        x, one = torch.arange(6, **plain).view(2, 3), torch.ones(1, **plain)
        result = linear(x, x[:1], one, "none", [], "")
        return linear if result.tolist() == [[6.0], [15.0]] else None
    except (AttributeError, RuntimeError):
        return None


def _is_intels() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def factor_rounding(device: torch.device, dtype: torch.dtype) -> float:
    """How much the factors of a product are rounded before it, relatively."""
    if dtype != torch.float32:
        return 0.0
    backend = torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda
    # `matmul` is set when mkldnn is imported.
    return FACTOR_ROUNDING.get(str(backend.matmul.fp32_precision), 0.0)  # pyright: ignore[reportAttributeAccessIssue]

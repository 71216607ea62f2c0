"""The compiled CPU extension, which need not be there: k-means and rows of length 1, for several widths of vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccl_fast.kernels.extension import DTYPES, load

module, missing = load("CPU", "a C++ compiler")


def obstacles(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the extension cannot run on this device and dtype; empty if it can."""
    if module is None:
        return [missing]
    reasons = []
    if device.type != "cpu":
        reasons.append("it runs on CPU tensors only")
    if dtype not in DTYPES:
        reasons.append("it takes float32, float16 and bfloat16")
    return reasons


def best() -> Any:
    """The functions of the extension for the widest vectors of this CPU, where there are no `obstacles`."""
    if module is None:
        raise RuntimeError(missing)
    return module.cpus[0]


def rows_of(x: Tensor) -> Tensor:
    """Rows [n, d] as the functions take them: float32, the entries of a row side by side."""
    return x if takes(x) else x.to(torch.float32).contiguous()


def takes(x: Tensor) -> bool:
    """Tell whether rows [n, d] are as the functions take them."""
    return x.dtype == torch.float32 and (x.stride(1) == 1 or x.shape[1] == 1)

"""The compiled CUDA extension, which need not be there."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor


def load(of: str, compiler: str) -> tuple[ModuleType | None, str]:
    """The compiled extension "CUDA" or "CPU", if it is there; and why it is not."""
    name = f"ccl_fast._{of.lower()}"
    if importlib.util.find_spec(name) is None:
        how = f"CCL_FAST_{of}=on, with {compiler}, compiles it"
        return None, f"the {of} extension was not compiled when ccl_fast was installed ({how})"
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"the {of} extension cannot be loaded: {error}"


module, missing = load("CUDA", "nvcc")

# The second dimension of a grid.
MAX_PROBLEMS = 65535
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def obstacles(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why the extension's kernels cannot run on this device and dtype; empty if they can."""
    if module is None:
        return [missing]
    reasons = []
    if module.emulated:
        if device.type != "cpu":
            reasons.append("the emulated extension runs on CPU tensors only")
    elif device.type != "cuda":
        reasons.append("it runs on CUDA tensors only")
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append("it needs compute capability 8.0 or higher")
    if dtype not in DTYPES:
        reasons.append("it takes float32, float16 and bfloat16")
    return reasons


def compiled() -> ModuleType:
    """The extension, where there are no `obstacles`."""
    if module is None:
        raise RuntimeError(missing)
    return module


def dtype_code(dtype: torch.dtype) -> int:
    """The extension's number of a dtype."""
    names = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
    return getattr(compiled(), names[dtype])


def metric_code(metric: str) -> int:
    """The extension's number of a metric."""
    return compiled().COSINE if metric == "cosine" else compiled().EUCLIDEAN


def address(x: Tensor | None) -> int:
    """Of the data; 0, C's null pointer, for None."""
    return 0 if x is None else x.data_ptr()


def where(x: Tensor) -> tuple[int, int]:
    """The device and the current stream of x, as every function of the extension takes them last."""
    if x.device.type != "cuda":
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream

"""Which backend runs an operator here, and why the others do not."""

from collections.abc import Callable

import torch

# A backend states its obstacles on a device and dtype; none means that it can run.
Obstacles = Callable[[torch.device, torch.dtype], list[str]]


def choose_backend(
    op: str, backends: dict[str, Obstacles], requested: str, device: torch.device, dtype: torch.dtype
) -> str:
    """The requested backend if it can run; for "auto" the first in order that runs natively on the device."""
    if requested == "auto":
        return next(
            name for name, obstacles in backends.items() if _is_native(name, device) and not obstacles(device, dtype)
        )
    if requested not in backends:
        raise ValueError(f"backend: expected one of auto, {', '.join(backends)}, got {requested!r}")
    if reasons := backends[requested](device, dtype):
        raise ValueError(f"backend: {requested!r} cannot run {op} on {device} with {dtype}: {'; '.join(reasons)}")
    return requested


def _is_native(name: str, device: torch.device) -> bool:
    # Interpreted and emulated kernels run on CPU tensors, for tests only: they must be asked for by name.
    return name not in ("triton", "cuda") or device.type == "cuda"

"""Which backend runs an operator here, and why the others do not: one table for all operators."""

from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple

import torch

from ccl_fast.checks import check_choice
from ccl_fast.errors import ArgumentError
from ccl_fast.kernels import cpu_extension, extension
from ccl_fast.ops.kmeans import (
    assign_blocked,
    assign_cpu,
    assign_cuda,
    assign_reference,
    distance_blocked,
    distance_cpu,
    distance_cuda,
    update_blocked,
    update_cpu,
    update_cuda,
    update_reference,
)
from ccl_fast.ops.logsumexp import blocked, reference, triton

# What may be asked for: of the streaming log-sum-exp and all that stands on it, and of the steps of k-means.
ContrastBackend = Literal["auto", "triton", "blocked", "reference"]
KMeansBackend = Literal["auto", "cuda", "cpu", "blocked", "reference"]


class Backend(NamedTuple):
    """A module that implements an operator, and where it runs."""

    module: ModuleType  # what it has to define is said beside the operator
    # Why it cannot run on a device and dtype; none of them: it can.
    obstacles: Callable[[torch.device, torch.dtype], list[str]] = lambda device, dtype: []
    native: str | None = None  # the type of device that it is made for; None: any


# Of every operator in the order in which "auto" prefers them. What else takes a `backend` runs by these operators.
BACKENDS: dict[str, dict[str, Backend]] = {
    "streaming_logsumexp": {
        "triton": Backend(triton, triton.obstacles, native="cuda"),
        "blocked": Backend(blocked),
        "reference": Backend(reference),
    },
    "kmeans_assign": {
        "cuda": Backend(assign_cuda, extension.obstacles, native="cuda"),
        "cpu": Backend(assign_cpu, cpu_extension.obstacles, native="cpu"),
        "blocked": Backend(assign_blocked),
        "reference": Backend(assign_reference),
    },
    "kmeans_update": {
        "cuda": Backend(update_cuda, extension.obstacles, native="cuda"),
        "cpu": Backend(update_cpu, cpu_extension.obstacles, native="cpu"),
        "blocked": Backend(update_blocked),
        "reference": Backend(update_reference),
    },
    "center_distance": {
        "cuda": Backend(distance_cuda, extension.obstacles, native="cuda"),
        "cpu": Backend(distance_cpu, cpu_extension.obstacles, native="cpu"),
        "blocked": Backend(distance_blocked),
        "reference": Backend(distance_blocked),  # differences are exact enough to be the reference's too
    },
}


def check_backend(operator: str, requested: str) -> None:
    """Check that an operator has the backend."""
    check_choice("backend", requested, ("auto", *BACKENDS[operator]))


def choose_backend(operator: str, requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The requested backend if it can run; for "auto" the first in order that runs natively on the device.

    Interpreted and emulated kernels run on CPU tensors, for tests only: they must be asked for by name.
    """
    check_backend(operator, requested)
    backends = BACKENDS[operator]
    if requested == "auto":
        return next(
            name
            for name, backend in backends.items()
            if backend.native in (None, device.type) and not backend.obstacles(device, dtype)
        )
    if reasons := backends[requested].obstacles(device, dtype):
        why = "; ".join(reasons)
        raise ArgumentError(f"backend: {requested!r} cannot run {operator} on {device} with {dtype}: {why}")
    return requested


def chosen_module(operator: str, requested: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module of the backend that `choose_backend` chooses."""
    return BACKENDS[operator][choose_backend(operator, requested, device, dtype)].module

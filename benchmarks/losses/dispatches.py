"""How many operations a step of each loss dispatches: of a small batch that is what it costs.

A count is no time: it is the same on every machine. Kernels of Triton's are counted beside; what the interpreter does
to run one is not. They need TRITON_INTERPRET=1.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.losses.cases import TEMPERATURE
from ccl_fast import CCLLoss, InfoNCELoss, NTXentLoss, SupConLoss
from ccl_fast.ops import contrast_cpu, contrast_tile, normalize_triton
from tests.oracles import plain

N, D, CLUSTERS = 64, 128, 8
# Of `count` the paths: as a small batch goes on a CPU, as on a GPU, and as a larger batch goes on either.
PATHS = ("cpu", "gpu", "blocked", "triton")


class Counts(NamedTuple):
    operations: int  # of aten
    kernels: int  # of Triton


class _Counter(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # A mode is told of a detach for each tensor that autograd keeps or hands back, which is no operation elsewhere.
        self.operations += function is not torch.ops.aten.detach.default
        return function(*args, **(kwargs or {}))


def steps() -> dict[str, tuple[type, Callable[[Callable], Tensor], Callable[[], Tensor]]]:
    """By name: the loss, what it is given, and the plain formula."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(N, D, generator=random).requires_grad_()
    views = torch.randn(N // 2, 2, D, generator=random).requires_grad_()
    first, second = (torch.randn(N // 2, D, generator=random).requires_grad_() for _ in range(2))
    ids = torch.randint(CLUSTERS, (N,), generator=random)
    centers = torch.randn(CLUSTERS, D, generator=random)
    t = {"temperature": TEMPERATURE}
    return {
        "CCL": (CCLLoss, lambda loss: loss(rows, ids, centers), lambda: plain.supervised(rows, ids, centers, **t)),
        "SupCon": (SupConLoss, lambda loss: loss(rows, ids), lambda: plain.supervised(rows, ids, None, **t)),
        "NT-Xent": (NTXentLoss, lambda loss: loss(first, second), lambda: plain.nt_xent(views, **t)),
        "CLIP": (InfoNCELoss, lambda loss: loss(first, second), lambda: plain.clip(views, **t)),
    }


def count(step: Callable[[], Tensor]) -> Counts:
    """Of a forward and backward."""
    from triton.runtime.interpreter import GridExecutor

    launches, launch = [], GridExecutor.__call__

    def uncounted(self, *args, **kwargs):
        launches.append(1)
        with _disable_current_modes():
            return launch(self, *args, **kwargs)

    step().backward()  # what is done once
    GridExecutor.__call__ = uncounted
    try:
        launches.clear()
        with _Counter() as counter:
            step().backward()
    finally:
        GridExecutor.__call__ = launch
    return Counts(counter.operations, len(launches))


def count_all() -> dict[str, dict[str, Counts]]:
    """By loss and path; "plain" is the plain formula. Of "gpu" and "triton" the checks of ids are those of a CPU."""
    found = {}
    for name, (loss, call, formula) in steps().items():
        found[name] = {"plain": count(formula)}
        for path in PATHS if os.environ.get("TRITON_INTERPRET") == "1" else ("cpu", "blocked"):
            module = loss(TEMPERATURE, backend="auto" if path in ("cpu", "gpu") else path)
            with as_on_a_gpu() if path in ("gpu", "triton") else contextlib.nullcontext():
                found[name][path] = count(lambda call=call, module=module: call(module))
    return found


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The host does not look at values, and rows are normalised by kernels, here interpreted."""
    known, devices, serves = contrast_tile.is_known, normalize_triton.DEVICES, contrast_cpu.serves
    contrast_tile.is_known, normalize_triton.DEVICES = lambda x: False, ("cpu",)
    contrast_cpu.serves = lambda logits: False
    try:
        yield
    finally:
        contrast_tile.is_known, normalize_triton.DEVICES, contrast_cpu.serves = known, devices, serves


def table() -> str:
    found = count_all()
    lines = [f"aten operations (+ kernels of Triton) of a forward and backward, N = {N}, D = {D}, K = {CLUSTERS}"]
    lines += [f"{'':10}" + "".join(f"{path:>14}" for path in found["CCL"])]
    for name, paths in found.items():
        cells = (f"{c.operations}" + (f" + {c.kernels}" if c.kernels else "") for c in paths.values())
        lines.append(f"{name:10}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)

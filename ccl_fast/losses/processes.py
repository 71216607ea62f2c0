"""What losses do with several processes alone: compare their arguments, reduce over all rows."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from ccl_fast.checks import product_dtype
from ccl_fast.distributed import Exchange, Group, TorchGroup, outside_of_graphs
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.backends import choose_backend
from ccl_fast.ops.differentiable import are_transforms_active

if TYPE_CHECKING:
    from ccl_fast.losses.base import Loss


@outside_of_graphs
def join(loss: "Loss", check: Callable, rows: dict, same: Callable) -> tuple[int, Exchange, int]:
    """As `Loss.join_processes`, of several processes."""
    assert loss.process_group is not None
    if are_transforms_active():
        raise ArgumentError("process_group: expected None under torch.func, whose transforms reach no other process")
    group, found = TorchGroup(loss.process_group), []

    def samples() -> int:
        found.extend(check())
        return found[0]

    def described() -> dict:
        first = next(iter(rows.values()))
        choose_backend("streaming_logsumexp", loss.backend, first.device, product_dtype(first))
        own = {name: describe(x, rows="n") for name, x in rows.items()}
        return own | {name: describe(x) for name, x in (loss.settings | same()).items()}

    counts = group.check_everywhere(samples, described)
    samples_here, each = found
    exchange = Exchange(group, [each * count for count in counts], loss.exchange)
    return samples_here, exchange, sum(counts[: group.rank])


@outside_of_graphs
def reduce(total: Tensor, count: Tensor, mean: bool, group: Group) -> Tensor:
    """Sum, or mean over the counts, of all totals; the gradient is that of this process's, times their number."""
    value, all_count = group.sum(torch.stack((total.detach().double(), count.double())))
    share = group.size * total
    if mean:
        all_count = all_count.clamp(min=1)
        value, share = value / all_count, share / all_count.to(share.dtype)
    return _WithValue.apply(share, value.to(share.dtype))


class _WithValue(torch.autograd.Function):
    """Another value, the gradient of x."""

    @staticmethod
    def forward(ctx, x, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def describe(x, rows: str | None = None) -> object:
    """What the processes compare of an argument: of tensors all but their numbers, or the number of their rows too."""
    if isinstance(x, list | tuple):
        return f"[{', '.join(str(describe(each, rows)) for each in x)}]"
    if not isinstance(x, Tensor):
        return x if x is None or isinstance(x, bool | int | float | str) else type(x).__name__
    dtype = product_dtype(x) if x.is_floating_point() else x.dtype
    shape = ", ".join(map(str, x.shape if rows is None or x.ndim == 0 else [rows, *x.shape[1:]]))
    gradient = " with gradient" if x.requires_grad and torch.is_grad_enabled() else ""
    return f"{str(dtype).removeprefix('torch.')} [{shape}]{gradient}"


# Why several processes cannot take an argument of theirs.
OF_ONE_PROCESS = {
    "labels": "as pairs are those of one process (two views are taken), got labels",
    "indices_tuple": "as its indices are of the rows of one process, got a tuple",
    "ref_emb": "as its rows would be those of one process, got references",
    "ref_labels": "as its rows would be those of one process, got references",
    "mask": "as it tells nothing of the samples of other processes (labels do), got a mask",
}


def refuse(loss: "Loss", name: str) -> NoReturn:
    """Raise on every process, as one of them was given what several processes cannot take."""

    def check() -> tuple[int, int]:
        raise ArgumentError(f"{name}: expected None with process_group, {OF_ONE_PROCESS[name]}")

    join(loss, check, {}, dict)
    raise AssertionError("unreachable")


def check_views_only(loss: "Loss", keys: Tensor | None) -> None:
    """That two towers, whose two directions would need two passes, come to a single process alone."""
    if keys is not None and loss.process_group is not None:
        raise ArgumentError("keys: expected None with process_group (views [n, 2, d] as queries), got a tensor")

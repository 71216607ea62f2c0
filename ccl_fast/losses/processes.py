"""The part of the losses that concerns several processes: arguments that must be alike, sums over all rows."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ccl_fast.checks import Candidates
from ccl_fast.distributed import Peers, outside_of_graphs
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.batch import Batch, product_dtype
from ccl_fast.ops import logaddexp
from ccl_fast.ops.backends import ContrastBackend, choose_backend
from ccl_fast.ops.logsumexp.distributed import Exchange, Wanted, global_contrast

if TYPE_CHECKING:
    from ccl_fast.losses.base import Loss


@outside_of_graphs
def join(loss: "Loss", check: Callable, rows: dict, same: Callable) -> tuple[int, Exchange, int]:
    """As `Loss.join_processes`, of several processes."""
    assert loss.process_group is not None
    peers = Peers(loss.process_group)
    try:
        samples, each = check()
        first = next(iter(rows.values()))
        choose_backend("streaming_logsumexp", loss.backend, first.device, product_dtype(first))
        described = {name: describe(x, rows="n") for name, x in rows.items()}
        described |= {name: describe(x) for name, x in (loss.settings | same()).items()}
    except Exception as error:
        peers.agree(0, error)
        raise
    counts = peers.agree(samples, None, **described)
    return samples, Exchange(peers, [each * count for count in counts], loss.exchange), sum(counts[: peers.rank])


@outside_of_graphs
def share_gradient(x: Tensor, peers: Peers, mean: bool) -> Tensor:
    """x, whose gradient is the mean, or the sum, of those of all processes."""
    return peers.share_gradient(x, mean)


def logsumexp_over_rows(
    z: Tensor,
    ids: Tensor | None,
    candidates: Candidates,
    scale: float | Tensor,
    exchange: Exchange,
    backend: ContrastBackend,
) -> Tensor:
    """As `Loss.logsumexp_over_rows`, of the rows of all processes."""
    over = "same" if candidates == "same_id" else "other"
    wanted = Wanted(by_id=candidates != "all", **{over: True})
    return global_contrast(z, ids, scale=scale, wanted=wanted, exchange=exchange, backend=backend)[over]


def logsumexp_with_positives(
    batch: Batch, scale: float | Tensor, inside: bool, backend: ContrastBackend
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `ccl.logsumexp_with_positives`, of the rows of all processes."""
    assert batch.exchange is not None
    wanted = Wanted(same=True, other=True) if inside else Wanted(other=True, similarity=True)
    found = global_contrast(batch.z, batch.ids, scale=scale, wanted=wanted, exchange=batch.exchange, backend=backend)
    if inside:
        return logaddexp(found["same"], found["other"]), found["same"], None
    return found["other"], found["similarity"] * scale, found["count"]


@outside_of_graphs
def reduce(total: Tensor, count: Tensor, mean: bool, peers: Peers) -> Tensor:
    """Sum, or mean over the counts, of all totals; the gradient is that of this process's, times their number."""
    value, all_count = peers.sum(torch.stack((total.detach().double(), count.double())))
    share = peers.size * total
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


def check_views_only(loss: "Loss", keys: Tensor | None) -> None:
    """That two towers, whose two directions would need two passes, come to a single process alone."""
    if keys is not None and loss.process_group is not None:
        raise ArgumentError("keys: expected None with process_group (views [n, 2, d] as queries), got a tensor")

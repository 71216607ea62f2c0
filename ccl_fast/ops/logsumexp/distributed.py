"""Self-contrast among the rows of all processes: what the losses need of this process's own rows.

With s_ij = scale <z_i, z_j> over the rows of all processes, a row's sums fall into parts, one for each process, and a
pair of rows that live on two processes serves both. Forward, each pair is met on one of the two processes alone; what
it finds for the other's rows goes there, some numbers a row. Backward,

    dz_i = scale sum_j (C_i exp(s_ij - R_i) + C_j exp(s_ij - R_j)) z_j

with R the log-sum-exps and C their gradients: a process that knows z, R and C of all rows has the whole gradient of its
own. So no gradient of the size of z travels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ccl_fast.distributed import Exchange, outside_of_graphs
from ccl_fast.ops.backends import BACKENDS, ContrastBackend, choose_backend
from ccl_fast.ops.ids import consecutive_ids, groups_of, same_group_count
from ccl_fast.ops.logsumexp.operator import logaddexp, streaming_logsumexp
from ccl_fast.ops.logsumexp.positives import contrast_with_positives
from ccl_fast.ops.logsumexp.reference import contrast_by_relation, logsumexp_by_relation, mutual_by_relation
from ccl_fast.ops.precision import accumulation_dtype, without_autocast
from ccl_fast.ops.row_dot import row_dot
from ccl_fast.ops.same_id_similarity import mutual_similarity, same_id_similarity


class Wanted(NamedTuple):
    """Sums of a row, over all other rows of all processes."""

    same: bool = False  # log-sum-exp over the rows of its id
    other: bool = False  # log-sum-exp over those of other ids; without `same`, `by_id` tells whether only over those
    positives: bool = False  # with both: sum of its logits with the rows of its id, and their number
    by_id: bool = False
    partners: bool = False  # rows are two halves, by ids; row i of one and of the other are no candidates of each other


def global_contrast(
    z: Tensor,
    ids: Tensor | None,
    *,
    scale: float | Tensor,
    wanted: Wanted,
    exchange: Exchange,
    backend: ContrastBackend,
) -> dict[str, Tensor]:
    """Compare the rows of this process with those of all: "same", "other", "positives", "count" as far as wanted.

    Each is float32 [n] (float64 for float64). The gradient of z holds what the other processes' rows owe to it: it is
    that of the sum, over all processes, of whatever they make of these values. That of the scale is the own rows'
    share.

    Args:
        z: ``[n, d]``, this process's rows; n may be 0.
        ids: ``[n]`` int64, the same number for the same thing on every process; None if nothing depends on them.
        scale: a number, or a tensor of one element.
        backend: as of `streaming_logsumexp`; "reference" gathers with autograd, and is dense.
    """
    contrast = _contrast_of_own_rows if exchange.group.is_null else _contrast_of_all_rows
    return contrast(z, ids, scale, wanted, exchange, backend)


def _contrast_of_own_rows(
    z: Tensor, ids: Tensor | None, scale: float | Tensor, wanted: Wanted, exchange: Exchange, backend: ContrastBackend
) -> dict[str, Tensor]:
    found, options = {}, {"scale": scale, "backend": backend}
    if wanted.positives:
        group, _ = groups_of(_given(ids))
        found["other"], found["same"], found["positives"] = contrast_with_positives(z, group, by_id=True, **options)
        found["count"] = same_group_count(group).to(found["other"].dtype)
    elif wanted.same and wanted.other:
        both = streaming_logsumexp(z, q_ids=ids, candidates="other_id", return_same=True, **options)
        found["other"], found["same"] = both
    elif wanted.same:
        found["same"] = streaming_logsumexp(z, q_ids=ids, candidates="same_id", **options)
    elif wanted.by_id:
        found["other"] = streaming_logsumexp(z, q_ids=ids, candidates="other_id", **options)
    elif wanted.other:
        found["other"] = streaming_logsumexp(z, **options)
    return found


@outside_of_graphs
def _contrast_of_all_rows(
    z: Tensor, ids: Tensor | None, scale: float | Tensor, wanted: Wanted, exchange: Exchange, backend: ContrastBackend
) -> dict[str, Tensor]:
    chosen = choose_backend("streaming_logsumexp", backend, z.device, z.dtype)
    accumulation = accumulation_dtype(z)
    scale = torch.as_tensor(scale, dtype=accumulation, device=z.device).reshape(())
    with without_autocast(z.device):
        if chosen == "reference":
            return _reference(z, ids, scale, wanted, exchange)
        kernels = BACKENDS["streaming_logsumexp"][chosen].module
        numbers = _GlobalContrast.apply(z, scale, ids, wanted, exchange, kernels)
    return dict(zip(_names(wanted), numbers, strict=True))


def global_same_id_similarity(z: Tensor, ids: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """`same_id_similarity` over the rows of all processes, by the sums of the ids' rows: [ids, d] on every process.

    For ids beside those of `global_contrast`, which would send all rows once more. The gradient of z is as there.
    """
    return same_id_similarity(z, ids) if exchange.group.is_null else _similarity_by_sums(z, ids, exchange)


@outside_of_graphs
def _similarity_by_sums(z: Tensor, ids: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    x = z.to(accumulation_dtype(z))
    everyone = consecutive_ids(exchange.gather(ids))
    own, size = exchange.own(everyone), everyone.bincount()
    sums = exchange.group.sum_with_gradient(x.new_zeros(len(size), x.shape[1]).index_add(0, own, x))
    return row_dot(sums[own] - x, x), (size[own] - 1).to(x.dtype)


def _names(wanted: Wanted) -> list[str]:
    names = [name for name in ("same", "other") if getattr(wanted, name)]
    return [*names, "positives", "count"] if wanted.positives else names


class _GlobalContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, scale, ids, wanted, exchange, kernels):
        z = z.contiguous()
        rows = exchange.rows((z,) if ids is None else (z, ids))
        visit = rows.visit(half=True)

        if wanted.partners:
            halves = _halves(z)
            both = kernels.mutual_forward(*halves.rows, scale, halves.ids, halves.ids, False, True)
            same, other = (torch.cat(sums) for sums in zip(*both, strict=True))
            bounded = scale.new_zeros((), dtype=torch.bool)
        else:
            same, other, bounded = kernels.forward(z, None, scale, None, _of_kind(ids, wanted), None, *wanted[:2])
        positives = _logits_and_counts(same_id_similarity(z, _given(ids)), scale) if wanted.positives else ()
        numbers = _columns(wanted, same, other, *positives)
        others = [rank for rank in range(exchange.group.size) if rank != exchange.group.rank]
        found = {rank: _nothing(exchange.counts[rank], wanted, numbers) for rank in others}
        for block in visit:
            z_there, ids_there = block.tensors if ids is not None else (*block.tensors, None)
            own = block.own_rows
            z_here, ids_here = z[own], None if ids is None else ids[own]
            if not (len(z_here) and len(z_there)):
                continue
            both = kernels.mutual_forward(
                z_here, z_there, scale, _of_kind(ids_here, wanted), _of_kind(ids_there, wanted), *wanted[:2]
            )
            positives = ((), ())
            if wanted.positives:
                sums = mutual_similarity(z_here, _given(ids_here), z_there, _given(ids_there))
                positives = [_logits_and_counts(of_rows, scale) for of_rows in sums]
            here, there = (_columns(wanted, *sums, *more) for sums, more in zip(both, positives, strict=True))
            numbers[own] = _merged(wanted, numbers[own], here)
            sizes = [part.stop - part.start for _, part in block.owners]
            for (rank, part), of_rank in zip(block.owners, there.split(sizes), strict=True):
                found[rank][part] = of_rank
        for returned in exchange.return_to_owners(found, numbers):
            numbers = _merged(wanted, numbers, returned)

        # The rows go to autograd, which lets go of them after the backward.
        ctx.wanted, ctx.exchange, ctx.kernels = wanted, exchange, kernels
        ctx.save_for_backward(z, scale, ids, numbers, bounded, *rows.keep())
        results = [column.contiguous() for column in numbers.unbind(1)]
        if wanted.positives:
            ctx.mark_non_differentiable(results[-1])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        with without_autocast(grads[0].device):
            return _GlobalContrast._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx, *grads):
        z, scale, ids, numbers, bounded, *kept = ctx.saved_tensors
        wanted, kernels = ctx.wanted, ctx.kernels
        lses = sum(wanted[:2])
        # What the others must know of a row: its log-sum-exps and the gradients of all its numbers.
        known = torch.stack([*numbers.unbind(1)[:lses], *grads[: lses + wanted.positives]], 1)
        visit = ctx.exchange.restored(tuple(kept)).visit(known, half=False)

        anchors = _anchors(wanted, known)
        same, other, grad_same, grad_other = anchors
        if wanted.partners:
            halves = _halves(z)
            of_halves = zip(*(x.chunk(2) if x.numel() else (x, x) for x in anchors), strict=True)
            *to_halves, grad_scale = kernels.mutual_gradients(
                *halves.rows, scale, halves.ids, halves.ids, *of_halves, (True, True, True), dtype=known.dtype
            )
            grad_z = torch.cat(to_halves)
        else:
            grad_z, _, grad_scale, _ = kernels.backward(
                z, None, scale, None, _of_kind(ids, wanted), None, same, other, bounded, grad_same, grad_other,
                (True, False, True, False), dtype=known.dtype, positives=grads[lses] if wanted.positives else None,
            )  # fmt: skip
        for block in visit:
            z_there, ids_there, known_there = (
                block.tensors if ids is not None else (block.tensors[0], None, block.tensors[1])
            )
            if not (len(z) and len(z_there)):
                continue
            grad, to_scale = kernels.mutual_backward(
                z, z_there, scale, _of_kind(ids, wanted), _of_kind(ids_there, wanted),
                anchors, _anchors(wanted, known_there),
                positives=(grads[lses], known_there[:, -1]) if wanted.positives else None,
            )  # fmt: skip
            grad_z += grad
            grad_scale = grad_scale + to_scale
        return grad_z.to(z.dtype), grad_scale, None, None, None, None


def _given(ids: Tensor | None) -> Tensor:
    """The ids, without which no similarity can be wanted."""
    assert ids is not None
    return ids


class _Halves(NamedTuple):
    rows: tuple[Tensor, Tensor]
    ids: Tensor  # of each half: a number for each row


def _halves(z: Tensor) -> _Halves:
    first, second = z.chunk(2) if len(z) else (z, z)
    return _Halves((first, second), torch.arange(len(z) // 2, device=z.device))


def _of_kind(ids: Tensor | None, wanted: Wanted) -> Tensor | None:
    """The ids, if they decide what is summed in the log-sum-exps."""
    return ids if wanted.same or wanted.by_id else None


def _logits_and_counts(sums: tuple[Tensor, Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
    similarity, count = sums
    return similarity * scale, count


def _columns(wanted: Wanted, same: Tensor, other: Tensor, *more: Tensor) -> Tensor:
    return torch.stack([x for x, want in ((same, wanted.same), (other, wanted.other)) if want] + list(more), 1)


def _nothing(rows: int, wanted: Wanted, like: Tensor) -> Tensor:
    numbers = like.new_zeros(rows, like.shape[1])
    numbers[:, : sum(wanted[:2])] = -torch.inf
    return numbers


def _merged(wanted: Wanted, a: Tensor, b: Tensor) -> Tensor:
    """Of the sums over two sets of rows those over both."""
    lses = sum(wanted[:2])
    return torch.cat((logaddexp(a[:, :lses], b[:, :lses]), a[:, lses:] + b[:, lses:]), 1)


def _anchors(wanted: Wanted, known: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(same, other, grad_same, grad_other) as the kernels take them, empty where not wanted."""
    columns = iter(known.T.contiguous())
    empty = known.new_empty(0)
    same, other, grad_same, grad_other = (next(columns) if want else empty for want in (*wanted[:2], *wanted[:2]))
    return same, other, grad_same, grad_other


def _reference(z: Tensor, ids: Tensor | None, scale: Tensor, wanted: Wanted, exchange: Exchange) -> dict[str, Tensor]:
    everyone = exchange.group.gather_with_gradient(z, exchange.counts)
    all_ids = None if ids is None else exchange.gather(ids)
    if wanted.partners:
        of_ranks = everyone.split(exchange.counts)
        first_halves, second_halves = zip(*(_halves(of_rank).rows for of_rank in of_ranks), strict=True)
        samples = torch.arange(len(everyone) // 2, device=z.device)
        _, other = mutual_by_relation(torch.cat(first_halves), torch.cat(second_halves), scale, samples, samples)
        before = slice(exchange.first // 2, (exchange.first + len(z)) // 2)
        return {"other": torch.cat([half[before] for half in other.chunk(2)])}
    if wanted.positives:
        all_ids = _given(all_ids)
        other, same, positives = contrast_by_relation(everyone, None, scale, all_ids, None, None, True)
        count = same_group_count(groups_of(all_ids)[0]).to(other.dtype)
        found = {"same": same, "other": other, "positives": positives, "count": count}
    else:
        same, other = logsumexp_by_relation(everyone, None, scale, None, _of_kind(all_ids, wanted), None)
        found = {"same": same, "other": other}
    return {name: exchange.own(found[name]) for name in _names(wanted)}

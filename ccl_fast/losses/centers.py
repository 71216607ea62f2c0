"""Similarities to the centres of clusterings, which get no gradient."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ccl_fast.checks import check_sequence, check_tensor
from ccl_fast.distributed import Exchange
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import Loss
from ccl_fast.losses.batch import Batch, check_batch
from ccl_fast.ops import cross_entropy, row_dot, streaming_logsumexp
from ccl_fast.ops.differentiable import Differentiable, savable
from ccl_fast.ops.precision import accumulation_dtype


def center_logits(
    loss: Loss, batch: Batch, centers: Tensor, temperature: float | Tensor | None, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all other centres than the row's own, and the logit of its own (unassigned: all, and 0).

    ``temperature`` of the centres: a number, a tensor [k] (one per cluster), or None for 1 / ``scale``. Centres
    get no gradient. All are expected to be checked, as `check_batch` does.
    """
    temperature = loss.shared(temperature, batch.exchange.group)
    accumulation = accumulation_dtype(batch.z)
    centers = loss.unit(centers.detach().to(accumulation)).to(batch.z.dtype)
    own = batch.ids.clamp(min=0)
    own_center = _OWN_CENTER(batch.z, centers, own)
    if isinstance(temperature, Tensor):
        temperature = savable(temperature.to(accumulation))
    if isinstance(temperature, Tensor) and temperature.ndim == 1:
        own_center = own_center / temperature[own]
        centers, scale = (centers / temperature[:, None]).to(batch.z.dtype), 1.0
    else:
        scale = scale if temperature is None else 1.0 / temperature
        own_center = own_center * scale
    number = torch.arange(centers.shape[0], device=centers.device)
    others = streaming_logsumexp(
        batch.z,
        centers,
        scale=scale,
        q_ids=batch.ids,
        k_ids=number,
        candidates="other_id",
        backend=loss.backend,
    )
    return others, own_center.masked_fill(~batch.assigned, 0.0)


def _own_center(z: Tensor, centers: Tensor, ids: Tensor) -> Tensor:
    return row_dot(z, centers[ids])


def _save(ctx, inputs, output) -> None:
    z, centers, ids = inputs
    ctx.save_for_backward(centers, ids)
    ctx.dtype = z.dtype


def _gradients(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    centers, ids = ctx.saved_tensors
    return (grad[:, None] * centers[ids]).to(ctx.dtype), None, None


# <z_i, c_{y_i}> in float32: linear in z, so nothing of the size of z is kept for the backward.
_OWN_CENTER = Differentiable("own_center", _own_center, _save, _gradients)


def check_clusterings(
    embeddings: Tensor,
    cluster_ids: Sequence[Tensor],
    centers: Sequence[Tensor],
    center_temperature: Sequence[Tensor] | None = None,
) -> tuple[int, int]:
    """Numbers of samples, and of rows of each."""
    check_sequence("cluster_ids", cluster_ids, "integers [n]")
    check_sequence("centers", centers, "tensors [k, d]")
    if center_temperature is not None:
        check_sequence("center_temperature", center_temperature, "temperatures")
    if len(cluster_ids) == 0:
        raise ArgumentError("cluster_ids: expected a sequence with a tensor [n] for every clustering, got none")
    for name, given in (("centers", centers), ("center_temperature", center_temperature)):
        if given is not None and len(given) != len(cluster_ids):
            raise ArgumentError(f"{name}: expected {len(cluster_ids)} tensors, as of cluster_ids, got {len(given)}")
    temperatures = [None] * len(cluster_ids) if center_temperature is None else center_temperature
    for m, (ids, own, temperature) in enumerate(zip(cluster_ids, centers, temperatures, strict=True)):
        check_tensor(f"centers[{m}]", own)  # None would be no centres
        counts = check_batch(embeddings, ids, "cluster_ids", own, temperature, at=f"[{m}]")
    return counts


def center_cross_entropies(
    loss: Loss,
    embeddings: Tensor,
    cluster_ids: Sequence[Tensor],
    centers: Sequence[Tensor],
    center_temperature: Sequence[Tensor] | None,
    exchange: Exchange,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each clustering the cross-entropy of every row with its centre (0 if unassigned), and who is assigned."""
    z, scale = loss.unit(embeddings.flatten(0, -2)), 1.0 / loss.shared(loss.temperature, exchange.group)
    views = 1 if embeddings.ndim == 2 else embeddings.shape[1]
    temperatures = [None] * len(cluster_ids) if center_temperature is None else center_temperature
    for ids, own, temperature in zip(cluster_ids, centers, temperatures, strict=True):
        batch = Batch(z, ids.long().repeat_interleave(views), embeddings.shape[:-1], exchange)
        others, logit = center_logits(loss, batch, own, temperature, scale)
        yield cross_entropy(others, logit).masked_fill(~batch.assigned, 0.0), batch.assigned

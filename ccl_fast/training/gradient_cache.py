"""Large contrastive batches with the activations of small ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel


def cached_backward(
    model: nn.Module,
    inputs: Tensor,
    loss_fn: Callable[[Tensor], Tensor],
    micro_batch: int,
    backward: Callable[[Tensor, Tensor | None], None] | None = None,
) -> Tensor:
    r"""Run the backward pass of ``loss_fn(model(inputs))`` with the activations of ``micro_batch`` inputs at a time.

    The loss of a contrastive batch needs all embeddings, but its gradient passes through the model row by row:

    .. math::
        \frac{dL}{d\theta} = \sum_b \frac{\partial L}{\partial z_b} \frac{\partial z_b}{\partial \theta}

    So the inputs are embedded without a graph, the loss and its gradient are taken at the embeddings, and every
    micro-batch is embedded once more, with a graph, to pass its part of that gradient on. The gradient is that of the
    full batch (unlike gradient accumulation, which trains on small contrastive batches); the price is one more forward
    pass. Random numbers (dropout) are the same both times.

    BatchNorm takes its statistics over a micro-batch, as it does over the part of a batch that one GPU of several
    holds: gradients are then exact for the model that normalises each micro-batch by itself. Running statistics are
    updated once for each micro-batch.

    On several processes the model is a DistributedDataParallel, each process gives its own part of the inputs, and
    ``loss_fn`` is a loss with ``process_group``. Gradients are exchanged once, with the last micro-batch; the processes
    may have different numbers of inputs and of micro-batches.

    Args:
        model: maps inputs ``[n, ...]`` to embeddings ``[n, ...]``, row by row (but for BatchNorm). It may be, or wrap,
            a DistributedDataParallel.
        inputs: ``[n, ...]``.
        loss_fn: a scalar of the embeddings ``[n, ...]`` of all inputs; gradients of its own parameters are added too.
        micro_batch: inputs embedded at a time; n or more is an ordinary forward and backward pass.
        backward: how to call ``tensor.backward(gradient)``; for loops that scale gradients (``Fabric.backward``).

    Returns:
        The loss, detached. Gradients are added to the ``.grad`` of the parameters.

    Raises:
        ValueError: micro_batch is not a positive integer.

    Paper: Gao, Zhang, Han, Callan, "Scaling deep contrastive learning batch size under memory limited setup", 2021.
    """
    if not isinstance(micro_batch, int) or isinstance(micro_batch, bool) or micro_batch < 1:
        raise ValueError(f"micro_batch: expected a positive integer, got {micro_batch!r}")
    backward = backward or Tensor.backward
    if micro_batch >= len(inputs):
        loss = loss_fn(model(inputs))
        backward(loss, None)
        return loss.detach()

    blocks = inputs.split(micro_batch)
    parallel = _parallel(model)
    states, embeddings = [], []
    with _unsynchronised(parallel), _running_statistics_kept(model):
        for i, block in enumerate(blocks):
            states.append(_random_state(inputs.device))
            # In its first pass with a graph DistributedDataParallel may talk to the other processes (it rearranges
            # its buckets). That must be before the loss does, as it is for a process with a single micro-batch.
            with torch.set_grad_enabled(parallel is not None and i == 0):
                embeddings.append(model(block).detach())
    after = _random_state(inputs.device)
    leaves = torch.cat(embeddings).requires_grad_()
    loss = loss_fn(leaves)
    backward(loss, None)
    assert leaves.grad is not None
    *others, last = zip(blocks, states, leaves.grad.split(micro_batch), strict=True)
    with _unsynchronised(parallel):
        for block, state, gradient in others:
            _set_random_state(inputs.device, state)
            backward(model(block), gradient)
    block, state, gradient = last
    _set_random_state(inputs.device, state)
    backward(model(block), gradient)
    _set_random_state(inputs.device, after)
    return loss.detach()


def _parallel(model: nn.Module) -> DistributedDataParallel | None:
    """Find what averages the gradients over processes, if anything does; Fabric and torch.compile wrap it once more."""
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


def _unsynchronised(parallel: DistributedDataParallel | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if parallel is None else parallel.no_sync()


@contextlib.contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics within ``with``; it normalises by the batch, as in training."""
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)

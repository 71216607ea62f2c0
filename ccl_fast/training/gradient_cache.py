"""Large contrastive batches with the activations of small ones."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ccl_fast.checks import check_count, check_tensor
from ccl_fast.errors import ArgumentError, RecomputationError

# Of a row's length: 16-bit kernels that are chosen anew make less of a difference, and new random numbers far more.
TOLERANCE = 1e-2
TOLERANCE_OF_FLOAT64 = 1e-8


def cached_backward(
    model: nn.Module,
    inputs: Any,
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
    pass.

    Both times the model must do the same. The second pass starts from the random numbers of the first (those of torch,
    on the CPU and on the devices of the model and of the inputs, of Python's ``random`` and of NumPy's global state)
    and from its buffers, such as those of spectral normalisation. What differs all the same, by a generator of the
    model's own or by state elsewhere, is an error, not a wrong gradient.

    BatchNorm takes its statistics over a micro-batch, as it does over the part of a batch that one GPU of several
    holds: gradients are then exact for the model that normalises each micro-batch by itself. Running statistics, like
    all buffers, change once for each micro-batch.

    On several processes the model is a DistributedDataParallel, each process gives its own part of the inputs, and
    ``loss_fn`` is a loss with ``process_group``. Gradients are exchanged once, with the last micro-batch; the processes
    may have different numbers of inputs and of micro-batches.

    Args:
        model: maps inputs ``[n, ...]`` to embeddings ``[n, ...]``, row by row (but for BatchNorm). It may be, or wrap,
            a DistributedDataParallel. If it is frozen, the loss's own parameters alone get gradients.
        inputs: what the model is called with: a tensor ``[n, ...]``, or tuples, lists and dicts with such tensors. What
            else is in them, also tensors of no dimensions, goes to every micro-batch.
        loss_fn: a scalar of the embeddings ``[n, ...]`` of all inputs; gradients of its own parameters are added too.
        micro_batch: inputs embedded at a time; n or more is an ordinary forward and backward pass.
        backward: how to call ``tensor.backward(gradient)``; for loops that scale gradients (``Fabric.backward``).

    Returns:
        The loss, detached. Gradients are added to the ``.grad`` of the parameters.

    Raises:
        ValueError: micro_batch is not a positive integer, the inputs have no tensor, or tensors of different lengths,
            or the model's embeddings are no tensor.
        RecomputationError: (a RuntimeError) a micro-batch had other embeddings the second time. The gradients that
            have been added are wrong.

    Paper: Gao, Zhang, Han, Callan, "Scaling deep contrastive learning batch size under memory limited setup", 2021.

    Example:
        >>> import torch
        >>> from ccl_fast import InfoNCELoss
        >>> from ccl_fast.training import cached_backward
        >>> model, views = torch.nn.Linear(16, 8), torch.randn(64, 16)  # two views of each of 32 images
        >>> loss_fn = InfoNCELoss(0.1)
        >>> cached_backward(model, views, lambda z: loss_fn(z.unflatten(0, (-1, 2))), micro_batch=16).shape
        torch.Size([])
        >>> model.weight.grad.shape
        torch.Size([8, 16])
    """
    check_count("micro_batch", micro_batch)
    blocks = _blocks(inputs, int(micro_batch))
    backward = backward or Tensor.backward
    if len(blocks) == 1:
        loss = loss_fn(model(inputs))
        if loss.requires_grad:
            backward(loss, None)
        return loss.detach()

    parallel, devices = _parallel(model), _cuda_devices(model, inputs)
    states, embeddings = [], []
    with _unsynchronised(parallel):
        buffers = _Buffers(model, parallel)
        for i, block in enumerate(blocks):
            states.append(_RandomState.now(devices))
            # In its first pass with a graph DistributedDataParallel may talk to the other processes (it rearranges
            # its buckets). That must be before the loss does, as it is for a process with a single micro-batch.
            with torch.set_grad_enabled(parallel is not None and i == 0):
                z = model(block)
            check_tensor("model's embeddings", z)
            embeddings.append(z.detach())
        buffers.restore()
    leaves = torch.cat(embeddings).requires_grad_()
    sizes = [len(z) for z in embeddings]
    del embeddings, z
    loss = loss_fn(leaves)
    backward(loss, None)
    after = _RandomState.now(devices)
    gradient = torch.zeros_like(leaves) if leaves.grad is None else leaves.grad
    passes = zip(blocks, states, leaves.detach().split(sizes), gradient.split(sizes), strict=True)
    differences = []
    for i, (block, state, expected, of_block) in enumerate(passes):
        with contextlib.nullcontext() if i == len(blocks) - 1 else _unsynchronised(parallel):
            state.restore()
            z = model(block)
            differences.append(_difference(z.detach(), expected))
            if z.requires_grad:
                backward(z, of_block)
    after.restore()
    # Told once, at the end: the host need not wait for each micro-batch, nor another process for this one's gradients.
    difference = torch.stack(differences).max().item()
    if difference > (TOLERANCE_OF_FLOAT64 if leaves.dtype == torch.float64 else TOLERANCE):
        raise RecomputationError.of(difference)
    return loss.detach()


def _blocks(inputs: Any, micro_batch: int) -> list:
    """Split all tensors in the inputs."""
    leaves, structure = tree_flatten(inputs)
    lengths = {len(x) for x in leaves if _has_rows(x)}
    if not lengths:
        expected = "a tensor [n, ...], or tuples, lists or dicts with such"
        raise ArgumentError(f"inputs: expected {expected}, got {type(inputs).__name__} without one")
    if len(lengths) > 1:
        raise ArgumentError(f"inputs: expected tensors of one length, got {', '.join(map(str, sorted(lengths)))}")
    number = max(-(-lengths.pop() // micro_batch), 1)
    if number == 1:
        return [inputs]
    parts = [x.split(micro_batch) if _has_rows(x) else [x] * number for x in leaves]
    return [tree_unflatten(part, structure) for part in zip(*parts, strict=True)]


def _has_rows(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0


def _difference(z: Tensor, expected: Tensor) -> Tensor:
    """The largest distance of a row to what is expected, relative to its length or, if that is more, the mean one."""
    wide = torch.promote_types(z.dtype, torch.float32)
    z, expected = (x.to(wide).reshape(len(x), -1) for x in (z, expected))
    lengths = expected.norm(dim=1)
    return ((z - expected).norm(dim=1) / lengths.clamp(min=lengths.mean())).nan_to_num(0.0, posinf=torch.inf).max()


class _Buffers:
    """What the model's buffers hold before the first pass, once another process's have come."""

    def __init__(self, model: nn.Module, parallel: DistributedDataParallel | None):
        self.kept = _buffers_of(model)
        if parallel is not None:  # it sends them within the first call
            hook = parallel.module.register_forward_pre_hook(lambda *_: self._keep_anew(model))
            self._remove_hook = hook.remove

    def _keep_anew(self, model: nn.Module) -> None:
        self._remove_hook()
        self.kept = _buffers_of(model)

    @torch.no_grad()
    def restore(self) -> None:
        for module, name, buffer, value in self.kept:
            buffer.copy_(value)
            module._buffers[name] = buffer


def _buffers_of(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Modules, names, buffers and copies; without expanded ones, in which nothing can be written."""
    return [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and 0 not in buffer.stride()
    ]


class _RandomState(NamedTuple):
    """Of all global generators that a model may draw from."""

    cpu: Tensor
    cuda: dict[torch.device, Tensor]
    python: tuple
    numpy: dict

    @classmethod
    def now(cls, devices: set[torch.device]) -> _RandomState:
        cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(legacy=False))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


def _cuda_devices(model: nn.Module, inputs: Any) -> set[torch.device]:
    """Where the model may draw."""
    tensors = (*model.parameters(), *model.buffers(), *(x for x in tree_leaves(inputs) if isinstance(x, Tensor)))
    return {x.device for x in tensors if x.device.type == "cuda"}


def _parallel(model: nn.Module) -> DistributedDataParallel | None:
    """Find what averages the gradients over processes, if anything does; Fabric and torch.compile wrap it once more."""
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


def _unsynchronised(parallel: DistributedDataParallel | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if parallel is None else parallel.no_sync()

# ruff: noqa: E402 (the extra must be there)
"""Gradient caching against the full batch."""

import copy

import pytest
import torch
from torch import nn

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "matplotlib", "lightning"):
    pytest.importorskip(extra)  # importing ccl_fast.training needs the extra "train"

from ccl_fast import CCLLoss, InfoNCELoss
from ccl_fast.training.gradient_cache import cached_backward


def network(*, batch_norm: bool = False, dropout: float = 0.0) -> nn.Module:
    norm = nn.BatchNorm1d(32) if batch_norm else nn.Identity()
    return nn.Sequential(nn.Linear(12, 32), norm, nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 8))


def contrast(ids: torch.Tensor) -> tuple[CCLLoss, object]:
    loss_fn = CCLLoss(0.2)
    return lambda embeddings: loss_fn(embeddings.unflatten(0, (-1, 2)), ids, torch.eye(5, 8))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("micro_batch", [1, 7, 32, 59, 60, 1000])
def test_gradient_is_that_of_the_full_batch(micro_batch):
    model, inputs, loss_fn = network(), torch.randn(60, 12), contrast(torch.arange(30) % 5)
    full = copy.deepcopy(model)
    expected = loss_fn(full(inputs))
    expected.backward()
    loss = cached_backward(model, inputs, loss_fn, micro_batch)
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad
    for ours, theirs in zip(gradients(model), gradients(full), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_gradients_are_added_and_the_losss_own_parameters_get_theirs():
    model, inputs = network(), torch.randn(40, 12)
    loss_module = InfoNCELoss(0.3, learnable_temperature=True)

    def loss_fn(embeddings):
        return loss_module(embeddings[0::2], embeddings[1::2])

    loss_fn(model(inputs)).backward()
    once = [p.grad.clone() for p in [*model.parameters(), *loss_module.parameters()]]
    cached_backward(model, inputs, loss_fn, 9)
    twice = [p.grad for p in [*model.parameters(), *loss_module.parameters()]]
    assert len(once) == 5
    for first, both in zip(once, twice, strict=True):
        torch.testing.assert_close(both, 2 * first, rtol=1e-4, atol=1e-6)


def test_batch_norm_normalises_each_micro_batch_and_counts_it_once():
    model, inputs, loss_fn = network(batch_norm=True), torch.randn(60, 12), contrast(torch.arange(30) % 5)
    expected = copy.deepcopy(model)
    loss_fn(torch.cat([expected(block) for block in inputs.split(20)])).backward()
    cached_backward(model, inputs, loss_fn, 20)
    for ours, theirs in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name])
    assert model[1].num_batches_tracked == 3
    assert model[1].track_running_stats


def test_dropout_is_the_same_both_times_and_goes_on_afterwards():
    model, inputs, loss_fn = network(dropout=0.5), torch.randn(60, 12), contrast(torch.arange(30) % 5)
    expected = copy.deepcopy(model)
    torch.manual_seed(1)
    loss_fn(torch.cat([expected(block) for block in inputs.split(20)])).backward()
    next_number = torch.rand(1)
    torch.manual_seed(1)
    cached_backward(model, inputs, loss_fn, 20)
    assert torch.rand(1) == next_number
    for ours, theirs in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micro_batch", [0, -3, 2.0, True])
def test_wrong_micro_batch(micro_batch):
    with pytest.raises(ValueError, match=r"^micro_batch: expected a positive integer, got"):
        cached_backward(network(), torch.randn(4, 12), contrast(torch.arange(2)), micro_batch)


def peak_of_saved_bytes(run) -> int:
    """The most bytes that autograd keeps for the backward pass at any time of the run."""
    live = peak = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal live, peak
            self.tensor = tensor
            live += tensor.nbytes
            peak = max(peak, live)

        def __del__(self):
            nonlocal live
            live -= self.tensor.nbytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        run()
    assert live == 0
    return peak


def test_memory_follows_the_micro_batch():
    layers = [layer for _ in range(4) for layer in (nn.Linear(64, 64), nn.Sigmoid())]
    model, inputs = nn.Sequential(*layers, nn.Linear(64, 4)), torch.randn(4096, 64)

    def step(micro_batch):
        cached_backward(model, inputs, lambda z: z.sum(), micro_batch)

    full, half, little = (peak_of_saved_bytes(lambda size=size: step(size)) for size in (4096, 2048, 64))
    assert full >= 8 * inputs.nbytes
    assert half < 0.52 * full
    assert little < full / 45  # 64, but for the weights

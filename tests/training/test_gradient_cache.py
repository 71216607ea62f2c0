# ruff: noqa: E402 (the extra must be there)
"""Gradient caching against the full batch."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "matplotlib", "lightning"):
    pytest.importorskip(extra)  # importing ccl_fast.training needs the extra "train"

from ccl_fast import CCLLoss, InfoNCELoss
from ccl_fast.errors import RecomputationError
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


class Noisy(nn.Module):
    """Scales each row by a number that is drawn."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return x * torch.as_tensor(self.draw(len(x)), dtype=x.dtype, device=x.device)[:, None]


def noisy(draw) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), Noisy(draw), nn.Tanh(), nn.Linear(32, 8))


def seed_all():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


DRAWS = {
    "torch": torch.rand,
    "Python": lambda n: [random.random() for _ in range(n)],
    "NumPy": lambda n: np.random.rand(n),
    "NumPy, normal": lambda n: np.random.standard_normal(n),  # one in two is kept for the next call
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_global_random_numbers_are_the_same_both_times_and_go_on_afterwards(draw):
    """Also those that the loss draws between both passes."""
    model, inputs, of_ids = noisy(draw), torch.randn(60, 12), contrast(torch.arange(30) % 5)
    expected = copy.deepcopy(model)

    def loss_fn(embeddings):
        return of_ids(embeddings * (1 + torch.as_tensor(draw(60), dtype=torch.float32)[:, None]))

    seed_all()
    loss_fn(torch.cat([expected(block) for block in inputs.split(13)])).backward()
    later = list(draw(4))
    seed_all()
    cached_backward(model, inputs, loss_fn, 13)
    assert list(draw(4)) == later
    for ours, theirs in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def with_generator_of_torch(n, generator=torch.Generator().manual_seed(0)):  # noqa: B008 - one for all calls
    return torch.rand(n, generator=generator)


def with_generator_of_numpy(n, generator=np.random.default_rng(0)):  # noqa: B008
    return generator.random(n)


def with_generator_of_python(n, generator=random.Random(0)):  # noqa: B008
    return [generator.random() for _ in range(n)]


def counting(n, calls=[0]):  # noqa: B006
    calls[0] += 1
    return torch.full((n,), 1 + 0.1 * calls[0])


def in_one_row(n, generator=torch.Generator().manual_seed(0)):  # noqa: B008
    return torch.nn.functional.pad(torch.rand(1, generator=generator) + 1, (0, n - 1), value=1.0)


@pytest.mark.parametrize(
    "draw", (with_generator_of_torch, with_generator_of_numpy, with_generator_of_python, counting, in_one_row)
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_what_cannot_be_repeated_is_an_error(draw, dtype):
    model, inputs, loss_fn = noisy(draw).to(dtype), torch.randn(60, 12, dtype=dtype), contrast(torch.arange(30) % 5)
    with pytest.raises(RecomputationError, match=r"other embeddings .* a generator of its own.*micro_batch >= n"):
        cached_backward(model, inputs, lambda z: loss_fn(z.float()), 20)
    cached_backward(model, inputs, lambda z: loss_fn(z.float()), 60)


def test_rounding_is_no_error():
    """Of kernels that are chosen anew in the second pass."""

    class Rounded(nn.Module):
        def forward(self, x):
            return x.bfloat16().float() if torch.is_grad_enabled() else x

    model = nn.Sequential(nn.Linear(12, 8), Rounded())
    cached_backward(model, torch.randn(60, 12), contrast(torch.arange(30) % 5), 20)
    with pytest.raises(RecomputationError):
        cached_backward(model.double(), torch.randn(60, 12).double(), lambda z: z.square().sum(), 20)


def test_embeddings_of_zero_or_nan_are_no_error():
    for value in (0.0, torch.nan):
        model = nn.Linear(12, 8)
        nn.init.constant_(model.weight, value)
        nn.init.constant_(model.bias, value)
        cached_backward(model, torch.randn(60, 12), lambda z: z.sum(), 20)


def test_buffers_change_once_for_each_micro_batch():
    """Spectral normalisation computes with what it keeps, and goes on from it in every forward pass."""
    layers = [nn.utils.parametrizations.spectral_norm(nn.Linear(12, 12)) for _ in range(2)]
    model, inputs, loss_fn = nn.Sequential(*layers), torch.randn(60, 12), contrast(torch.arange(30) % 5)
    loss_fn = CCLLoss(0.2)
    model.register_buffer("expanded", torch.zeros(1).expand(3))
    expected = copy.deepcopy(model)

    def loss_of(z):
        return loss_fn(z.unflatten(0, (-1, 2)), torch.arange(30) % 5)

    loss_of(torch.cat([expected(block) for block in inputs.split(20)])).backward()
    kept = dict(model.named_buffers())
    cached_backward(model, inputs, loss_of, 20)
    for ours, theirs in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    for name, buffer in model.named_buffers():
        assert buffer is kept[name]
        torch.testing.assert_close(buffer, expected.get_buffer(name))


def test_a_buffer_that_is_replaced():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.register_buffer("none", None)

        def forward(self, x):
            self.count = self.count + 1
            return x * self.count

    model, inputs = nn.Sequential(nn.Linear(12, 8), Counter()), torch.randn(60, 12)
    expected = copy.deepcopy(model)
    torch.cat([expected(block) for block in inputs.split(20)]).square().sum().backward()
    cached_backward(model, inputs, lambda z: z.square().sum(), 20)
    assert model[1].count == 3
    for ours, theirs in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", (0.1, None))
def test_running_statistics_and_evaluation(momentum):
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8, momentum=momentum))
    inputs = torch.randn(60, 12)
    for training in (True, False):
        expected = copy.deepcopy(model.train(training))
        torch.cat([expected(block) for block in inputs.split(20)]).square().sum().backward()
        model.zero_grad()
        cached_backward(model, inputs, lambda z: z.square().sum(), 20)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected.state_dict()[name])
        assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize("micro_batch", (9, 40))
def test_a_frozen_model_leaves_the_losss_own_gradients(micro_batch):
    model, inputs = network(batch_norm=True).requires_grad_(False).eval(), torch.randn(40, 12)
    loss_module = InfoNCELoss(0.3, learnable_temperature=True)
    cached_backward(model, inputs, lambda z: loss_module(z[0::2], z[1::2]), micro_batch)
    found = loss_module.log_temperature.grad.clone()
    loss_module.zero_grad()
    z = model(inputs)
    expected = loss_module(z[0::2], z[1::2])
    expected.backward()
    torch.testing.assert_close(found, loss_module.log_temperature.grad)
    fixed = InfoNCELoss(0.3)
    loss = cached_backward(model, inputs, lambda z: fixed(z[0::2], z[1::2]), micro_batch)
    torch.testing.assert_close(loss, expected.detach())


def test_a_partly_frozen_model_and_inputs_that_need_a_gradient():
    model, inputs = network(), torch.randn(60, 12, requires_grad=True)
    model[0].requires_grad_(False)
    loss_fn = contrast(torch.arange(30) % 5)
    cached_backward(model, inputs, loss_fn, 20)
    found = [inputs.grad.clone(), *(p.grad for p in model[4].parameters())]
    expected = torch.autograd.grad(loss_fn(model(inputs)), [inputs, *model[4].parameters()])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert model[0].weight.grad is None


def test_a_loss_that_does_not_depend_on_the_embeddings():
    model, weight = network(), torch.ones((), requires_grad=True)
    cached_backward(model, torch.randn(60, 12), lambda z: 3 * weight, 20)
    assert weight.grad == 3 and all((g == 0).all() for g in gradients(model))


class Towers(nn.Module):
    """Called with structures of tensors."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 8)

    def forward(self, inputs):
        if isinstance(inputs, dict):
            (first, second), options = inputs["views"], inputs["options"]
            return self.layer(first * options[0]) + self.layer(second.cos()) * options[1]
        return self.layer(inputs[0]) + inputs[1]


@pytest.mark.parametrize("micro_batch", (13, np.int64(13), np.int32(20), torch.tensor(60).item(), np.int64(100)))
def test_structures_of_inputs(micro_batch):
    x, y, loss_fn = torch.randn(60, 12), torch.randn(60, 12), contrast(torch.arange(30) % 5)
    for inputs in (
        {"views": (x, y), "options": [torch.tensor(2.0), 3.0], "name": None},
        (x, y[:, :8]),
        [x, torch.tensor(0.5)],
    ):
        model = Towers()
        full = copy.deepcopy(model)
        expected = loss_fn(full(inputs))
        expected.backward()
        torch.testing.assert_close(cached_backward(model, inputs, loss_fn, micro_batch), expected.detach())
        for ours, theirs in zip(gradients(model), gradients(full), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "inputs, message",
    (
        ({"a": torch.zeros(4, 12), "b": torch.zeros(5, 12)}, "inputs: expected tensors of one length, got 4, 5"),
        ({"a": 3}, r"inputs: expected a tensor \[n, ...\], or tuples, lists or dicts with such, got dict without one"),
        (np.zeros((4, 12)), r"inputs: expected a tensor \[n, ...\].*, got ndarray without one"),
    ),
)
def test_wrong_inputs(inputs, message):
    with pytest.raises(ValueError, match=message):
        cached_backward(network(), inputs, lambda z: z.sum(), 2)


def test_embeddings_must_be_a_tensor():
    class Two(nn.Linear):
        def forward(self, x):
            return x, x

    with pytest.raises(ValueError, match=r"model's embeddings: expected a torch\.Tensor, got tuple"):
        cached_backward(Two(12, 8), torch.randn(4, 12), lambda z: z.sum(), 2)


@pytest.mark.parametrize("micro_batch", [0, -3, 2.0, True, np.float64(2), None])
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

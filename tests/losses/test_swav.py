"""SwAVLoss against its definition, lightly's loss, and its promise of memory."""

import subprocess
import sys

import pytest
import torch

from ccl_fast.losses import SwAVLoss
from tests import ROOT
from tests.oracles.losses import assert_matches, call, differentiate, learnable, reduced, unit
from tests.tolerance import OF_TORCH_2_11

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def inputs(n=9, k=5, views=2, d=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype) for _ in range(views)]
    return rows, torch.randn(k, d, generator=generator, dtype=torch.float64).to(dtype)


def stacked(views):
    """[n, views, d]"""
    return torch.stack(views, dim=1)


def assignments(scores, epsilon, iterations):
    q = (scores.detach() / epsilon).exp()
    for _ in range(iterations):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def swav(
    views, prototypes, queues=None, *, temperature=0.1, epsilon=0.05, iterations=3, global_views=2, normalize=True,
    reduction="mean",
):  # fmt: skip
    scaled = unit if normalize else torch.Tensor.double
    centers = scaled(prototypes.double())
    scores = [scaled(view.double()) @ centers.T for view in views]
    n, losses = len(views[0]), 0.0
    for g in range(global_views):
        pool = scores[g] if queues is None else torch.cat([scores[g], scaled(queues[g].double()) @ centers.T])
        q = assignments(pool, epsilon, iterations)[:n]
        others = [s for v, s in enumerate(scores) if v != g]
        losses = losses - sum((q * (s / temperature).log_softmax(1)).sum(1) for s in others) / (len(views) - 1)
    losses = losses / global_views
    return reduced(list(losses), [True] * n, (n,), reduction, views[0])


def check(views, prototypes, queues=None, *, backend="auto", temperature=0.1, tolerance=1e-10, **options):
    module = learnable(SwAVLoss, temperature, backend=backend, **options)
    leaves = [x.detach().requires_grad_() for x in (*views, prototypes)]
    value = module(stacked(leaves[:-1]), leaves[-1], queue=None if queues is None else stacked(queues))
    actual = differentiate(value, [*leaves, *module.parameters()])
    leaves = [x.detach().double().requires_grad_() for x in (*views, prototypes)]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    loss = swav(leaves[:-1], leaves[-1], queues, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(loss, [*leaves, log_temperature]), tolerance)


@pytest.mark.parametrize("n, k, views", ((9, 5, 2), (5, 9, 3), (7, 7, 5), (1, 3, 2), (4, 1, 2)))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(n, k, views, reduction, backend):
    check(*inputs(n, k, views), reduction=reduction, backend=backend)


@pytest.mark.parametrize("options", (
    {"temperature": 0.01}, {"temperature": 1.0}, {"epsilon": 0.01}, {"epsilon": 0.5}, {"iterations": 1},
    {"iterations": 10}, {"global_views": 1}, {"global_views": 3},
    {"normalize": False, "temperature": 0.5, "epsilon": 1},
))  # fmt: skip
def test_options(options, backend):
    check(*inputs(views=4), **options, backend=backend)


def test_a_queue_takes_part_in_the_assignment_alone(backend):
    views, prototypes = inputs(views=3)
    queues, _ = inputs(n=11, seed=1)
    check(views, prototypes, queues, backend=backend)


@pytest.mark.parametrize("views", (2, 5))
@pytest.mark.parametrize("queue", (False, True))
def test_lightly(views, queue):
    views, prototypes = inputs(views=views)
    views, prototypes = [unit(v).requires_grad_() for v in views], unit(prototypes).requires_grad_()
    queues = [unit(q) for q in inputs(n=11, seed=1)[0]] if queue else None
    ours = SwAVLoss(normalize=False)(stacked(views), prototypes, queue=stacked(queues) if queue else None)
    scores = [v @ prototypes.T for v in views]
    their_queues = [q @ prototypes.T for q in queues] if queue else None
    theirs = pytest.importorskip("lightly.loss").SwaVLoss()(scores[:2], scores[2:], their_queues)
    leaves = [*views, prototypes]
    assert_matches(differentiate(ours, leaves), differentiate(theirs[0], leaves))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)))
def test_dtypes(dtype, tolerance):
    views, prototypes = inputs(n=33, k=17, views=3, dtype=dtype)
    loss = SwAVLoss()(stacked(views), prototypes)
    assert loss.dtype == torch.float32
    check(views, prototypes, tolerance=tolerance)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    views, prototypes = inputs(n=33, k=17, dtype=torch.float32)
    leaves = [x.requires_grad_() for x in (*views, prototypes)]
    with torch.autocast("cpu", dtype=dtype):
        loss = SwAVLoss()(stacked(leaves[:-1]), leaves[-1])
    assert loss.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = differentiate(swav(exact[:-1], exact[-1]), exact)
    assert_matches(differentiate(loss, leaves), expected, tolerance=0.05)


def test_more_prototypes_than_points_and_a_prototype_far_from_all():
    views, prototypes = inputs(n=3, k=40)
    prototypes[0] = -100 * views[0].mean(0)
    check(views, prototypes)
    check(views, prototypes, epsilon=0.005)


def test_empty_batch_is_zero_with_a_graph():
    views, prototypes = inputs(n=0)
    leaves = [x.requires_grad_() for x in (*views, prototypes)]
    loss = SwAVLoss()(stacked(leaves[:-1]), leaves[-1])
    loss.backward()
    assert loss == 0 and all((x.grad == 0).all() for x in leaves)


def test_frozen_prototypes_and_frozen_embeddings():
    views, prototypes = inputs()
    (grad,) = torch.autograd.grad(SwAVLoss()(stacked(views), leaf := prototypes.clone().requires_grad_()), leaf)
    assert grad.isfinite().all() and grad.any()
    (grad,) = torch.autograd.grad(SwAVLoss()(leaf := stacked(views).requires_grad_(), prototypes), leaf)
    assert grad.isfinite().all() and grad.any()


@pytest.mark.parametrize("options, message", (
    ({"epsilon": 0}, "epsilon: expected a positive number, got 0"),
    ({"iterations": 0}, "iterations: expected a positive integer, got 0"),
    ({"global_views": 1.5}, "global_views: expected a positive integer, got 1.5"),
    ({"temperature": -1}, "temperature: expected a positive number, got -1"),
    ({"reduction": "max"}, "reduction: expected one of"),
))  # fmt: skip
def test_errors_of_options(options, message):
    with pytest.raises(ValueError, match=message):
        SwAVLoss(**options)


def test_errors_of_arguments():
    views, prototypes = stacked(inputs()[0]), inputs()[1]
    for arguments, message in (
        (([*views], prototypes), "embeddings: expected a torch.Tensor, got list"),
        ((views[:, 0], prototypes), r"embeddings: expected shape \[n, views, d\] with at least 2 views, got \[9, 6\]"),
        ((views[:, :1], prototypes), r"embeddings: expected shape .* at least 2 views, got \[9, 1, 6\]"),
        ((views.long(), prototypes), "embeddings: expected float64, float32"),
        ((views, prototypes[:, :2]), r"prototypes: expected shape \[rows, 6\], got \[5, 2\]"),
        ((views, prototypes[:0]), "prototypes: expected at least one row"),
        ((views, prototypes, views[:, :1]), r"queue: expected shape \[m, 2, 6\] .* got \[9, 1, 6\]"),
        ((views, prototypes, views[..., :2]), r"queue: expected shape \[m, 2, 6\] .* got \[9, 2, 2\]"),
        ((views, prototypes, views.float()), r"queue: expected dtype torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call(SwAVLoss(), *arguments)


@pytest.mark.slow  # a process of its own
@pytest.mark.parametrize("n, k", [(4096, 12_288), (8192, 20_480)])
def test_memory_is_linear(n, k):
    """One forward and backward in a process of its own, where a single n x k array would take 192 MiB, or 640."""
    code = """
import sys
import torch
from benchmarks.harness.memory import forget_peak, status
from ccl_fast.losses import SwAVLoss

def step(n, k, d=16):
    views = torch.randn(n, 2, d, requires_grad=True)
    prototypes = torch.randn(k, d, requires_grad=True)
    before = forget_peak()
    SwAVLoss(iterations=1)(views, prototypes).backward()
    return status("VmHWM") - before

step(512, 512)
print(step(*map(int, sys.argv[1:])))
"""
    command = [sys.executable, "-c", code, str(n), str(k)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 96 * 2**20 + OF_TORCH_2_11, f"{int(result.stdout) / 2**20:.0f} MiB"

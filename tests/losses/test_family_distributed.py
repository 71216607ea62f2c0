"""The family's losses over the batch of all processes against the single process on the concatenated batch."""

import functools
import importlib
import re

import pytest
import torch
import torch.distributed as dist

from ccl_fast.distributed import open_group
from ccl_fast.distributed.group import ALL_GATHER
from ccl_fast.losses import (
    CenterNegativesLoss,
    DeepClusterV2Loss,
    InfoNCELoss,
    MCLLoss,
    MEOWLoss,
    PamCLoss,
    ProtoNCELoss,
    SBCLLoss,
    SwAVLoss,
)
from ccl_fast.ops.logsumexp import blocked
from ccl_fast.ops.transport.sinkhorn import column_potentials
from tests.oracles.losses import assert_matches, call, learnable, unit
from tests.processes import run

pytestmark = pytest.mark.xdist_group("test_family_distributed")
CLUSTERS = (4, 9)
# The part of each process, by sample; the rest is the same on all.
ROWS = {"z", "keys", "ids", "queue"}
SIZES = [(7, 9), (6, 6), (5, 0, 9)]

# By name: the loss, its arguments, those that get a gradient.
USES = {
    "deepcluster": (DeepClusterV2Loss, lambda x: (x["z"], x["ids"], x["centers"]), ["z"]),
    "deepcluster rows": (DeepClusterV2Loss, lambda x: (x["z"][:, 0], x["ids"], x["centers"]), ["z"]),
    "protonce": (ProtoNCELoss, lambda x: (x["z"], x["ids"], x["centers"]), ["z"]),
    "protonce concentrations": (
        ProtoNCELoss,
        lambda x: (x["z"], x["ids"], x["centers"], x["concentrations"]),
        ["z", "concentrations"],
    ),
    "protonce keys": (
        ProtoNCELoss,
        lambda x: (x["z"][:, 0], x["ids"], x["centers"], None, x["keys"], x["negatives"]),
        ["z", "keys"],
    ),
    "meow": (MEOWLoss, lambda x: (x["z"], x["ids"][0]), ["z"]),
    "center negatives": (CenterNegativesLoss, lambda x: (x["z"], x["ids"][0], x["centers"][0]), ["z"]),
    "mcl": (MCLLoss, lambda x: (x["z"], x["ids"]), ["z"]),
    "mcl first stage": (MCLLoss, lambda x: (x["z"], []), ["z"]),
    "mcl towers": (MCLLoss, lambda x: (x["z"][:, 0], x["ids"], x["keys"]), ["z"]),
    "pamc": (PamCLoss, lambda x: (x["z"][:, 0], x["keys"], x["ids"][0]), ["z", "keys"]),
    "pamc of nodes": (
        functools.partial(PamCLoss, form="node"),
        lambda x: (x["z"][:, 0], x["keys"], x["ids"][0]),
        ["z", "keys"],
    ),
    "pamc of clusters": (
        functools.partial(PamCLoss, form="cluster"),
        lambda x: (x["z"][:, 0], x["keys"], x["ids"][1]),
        ["z", "keys"],
    ),
    "sbcl": (SBCLLoss, lambda x: (x["z"], *x["ids"]), ["z"]),
    "sbcl rows": (SBCLLoss, lambda x: (x["z"][:, 0], *x["ids"]), ["z"]),
    "swav": (SwAVLoss, lambda x: (x["z"], x["prototypes"]), ["z", "prototypes"]),
    "swav queue": (
        SwAVLoss,
        lambda x: (torch.cat((x["z"], x["keys"][:, None]), 1), x["prototypes"], x["queue"]),
        ["z", "keys", "prototypes"],
    ),
}
SEVERAL = ["deepcluster", "protonce", "meow", "mcl", "pamc", "sbcl", "swav"]


def whole(sizes, dtype):
    """The arguments of all processes."""
    draw = torch.Generator().manual_seed(0)
    n, d = sum(sizes), 10

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    return {
        "z": normal(n, 2, d),
        "keys": normal(n, d),
        "negatives": normal(5, d),
        "queue": torch.stack([normal(n, d) for _ in range(2)], 1),
        "prototypes": normal(7, d),
        "ids": [torch.randint(-1, k, (n,), generator=draw) for k in CLUSTERS],
        "centers": [normal(k, d) for k in CLUSTERS],
        "concentrations": [torch.rand(k, generator=draw, dtype=torch.float64).to(dtype) / 5 + 0.05 for k in CLUSTERS],
    }


def part(x, sizes, rank):
    if isinstance(x, list):
        return [part(each, sizes, rank) for each in x]
    return x.split(list(sizes))[rank].clone()


def tensors(x):
    return x if isinstance(x, list) else [x]


def evaluate(use, x, weights, **options):
    """Value, gradients of the rows, gradients of what all processes share; losses of rows get different cotangents."""
    loss, arguments, differentiable = USES[use]
    module = learnable(loss, **options)
    leaves = {name: [leaf.requires_grad_() for leaf in tensors(x[name])] for name in differentiable}
    value = call(module, *arguments(x))
    value.backward(weights.view(-1, *[1] * (value.ndim - 1)).expand_as(value) if value.ndim else None)
    found = {True: [], False: [p.grad for p in module.parameters()]}
    for name, of_name in leaves.items():
        found[name in ROWS] += [leaf.grad for leaf in of_name]
    return value.detach(), found[True], found[False]


def of_process(use, sizes, dtype, options):
    rank, x = dist.get_rank(), whole(sizes, dtype)
    x |= {name: part(x[name], sizes, rank) for name in ROWS & x.keys()}
    weights = part(torch.linspace(1, 2, sum(sizes), dtype=torch.float64), sizes, rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "BLOCK", 16)
        return evaluate(use, x, weights, process_group="world", **options)


def assert_exact(use, sizes, dtype=torch.float64, tolerance=1e-10, exchange=None, **options):
    weights = torch.linspace(1, 2, sum(sizes), dtype=torch.float64)
    value, of_rows, shared = evaluate(use, whole(sizes, dtype), weights, **options)
    travels = {} if exchange is None else {"exchange": exchange}
    none = options.get("reduction") == "none"
    results = run(of_process, len(sizes), use, sizes, dtype, options | travels)
    for rank, (value_there, of_rows_there, shared_there) in enumerate(results):
        times = 1 if none else len(sizes)
        expected = [part(value, sizes, rank) if none else value, *(times * part(g, sizes, rank) for g in of_rows)]
        assert_matches([value_there, *of_rows_there], expected, tolerance)
        assert_matches(shared_there, shared, tolerance)
        assert all(a.equal(b) for a, b in zip(shared_there, results[0][2], strict=True))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("use", [name for name in USES if name != "mcl towers"])
def test_every_loss_is_that_of_the_whole_batch(use, sizes):
    assert_exact(use, sizes)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("use", [name for name in USES if name != "mcl towers"])
def test_reductions(use, reduction):
    assert_exact(use, (5, 3, 4), reduction=reduction)


@pytest.mark.parametrize("sizes", [(4,), (0,), (1, 0), (0, 0), (1, 1, 1), (40, 3, 17)], ids=str)
@pytest.mark.parametrize("use", [*SEVERAL, "pamc of nodes", "pamc of clusters"])
def test_any_sizes(use, sizes):
    assert_exact(use, sizes)


@pytest.mark.parametrize("use", ["protonce", "protonce keys", "meow", "mcl", "sbcl"])
def test_the_ring(use):
    assert_exact(use, (5, 0, 9), exchange="ring")


@pytest.mark.parametrize("use", [name for name in USES if name != "mcl towers"])
def test_options(use):
    assert_exact(use, (7, 5), normalize=False, temperature=2.0)
    assert_exact(use, (7, 5), temperature=0.01, backend="reference")
    assert_exact(use, (7, 5), torch.float32, tolerance=1e-4)
    assert_exact(use, (7, 5), torch.bfloat16, tolerance=0.03)


def compiled_and_not(use):
    loss, arguments, differentiable = USES[use]
    found = []
    for compile_it in (False, True):
        x = whole((6,), torch.float64)
        leaves = [leaf.requires_grad_() for name in differentiable for leaf in tensors(x[name])]
        module = loss(process_group="world")
        value = (torch.compile(module, backend="aot_eager") if compile_it else module)(*arguments(x))
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    return found


# With prototypes and a plan that needs the rows of all; tests/losses/test_contract.py compiles losses in one process.
COMPILED = {"swav"}


@pytest.mark.parametrize("use", [pytest.param(x, marks=() if x in COMPILED else pytest.mark.slow) for x in SEVERAL])
def test_compiled(use):
    for plain, compiled in run(compiled_and_not, 2, use):
        assert_matches(compiled, plain)


@pytest.mark.parametrize("use", SEVERAL)
def test_triton_kernels(use):
    if torch.cuda.is_available():
        pytest.skip("its processes have CPU tensors")
    assert_exact(use, (3, 0, 4), torch.float32, tolerance=1e-4, backend="triton")


def of_unassigned(use, options):
    loss, arguments, _ = USES[use]
    x = whole((4,), torch.float64)
    x["ids"] = [torch.full((4,), -1) for _ in CLUSTERS]
    return call(loss(process_group="world", **options), *arguments(x))


def test_unassigned_samples_of_different_processes_are_apart():
    x = whole((4,), torch.float64)
    z = torch.cat((x["z"], x["z"]))
    for found in run(of_unassigned, 2, "meow", {"weigh_positive": False}):
        torch.testing.assert_close(found, InfoNCELoss()(z))
    assert max(run(of_unassigned, 2, "mcl", {})).abs() < 1e-12


# ---- SwAV's plan ----


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_plans(backend, sizes):
    for options in ({"epsilon": 0.01}, {"iterations": 1}, {"iterations": 5}):
        assert_exact("swav queue", sizes, backend=backend, **options)
    assert_exact("swav", sizes, backend=backend, global_views=1)


def potentials(rows, centers, scale, own):
    z = rows.split(own)[dist.get_rank()]
    return column_potentials(z, centers, scale=scale, iterations=3, group=open_group("world"))


@pytest.mark.parametrize("length", [1.0, 3.0, 300.0])
def test_processes_whose_logits_are_bounded_and_others_go_the_same_way(length):
    draw = torch.Generator().manual_seed(0)
    rows, centers = (torch.randn(n, 10, generator=draw, dtype=torch.float64) for n in (20, 6))
    rows, centers = unit(rows), unit(centers)
    rows[:3] *= length  # of the first process
    expected = column_potentials(rows, centers, scale=20.0, iterations=3, backend="reference")
    for found in run(potentials, 3, rows, centers, 20.0, [8, 0, 12]):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def lightlys(scores, own):
    peer = importlib.import_module("lightly.loss.swav_loss")
    return peer.sinkhorn(scores.split(own)[dist.get_rank()], iterations=3, epsilon=0.05, gather_distributed=True)


def test_lightlys_gathered_plan():
    pytest.importorskip("lightly.loss.swav_loss")
    draw = torch.Generator().manual_seed(0)
    rows, centers = (unit(torch.randn(n, 10, generator=draw, dtype=torch.float64)) for n in (12, 5))
    scores = rows @ centers.T
    theirs = torch.cat(run(lightlys, 2, scores, [6, 6]))
    for v in run(potentials, 2, rows, centers, 20.0, [6, 6]):
        torch.testing.assert_close((20.0 * scores + v).softmax(1), theirs, rtol=1e-10, atol=1e-12)


# ---- what travels ----


def numbers_summed(use):
    """How many numbers are summed over processes, and bytes gathered, in one forward and backward."""
    loss, arguments, differentiable = USES[use]
    x = whole((300,), torch.float32)
    leaves = [leaf.requires_grad_() for name in differentiable for leaf in tensors(x[name])]
    summed, gathered = [], []  # the latter in bytes
    with pytest.MonkeyPatch.context() as patch:
        all_reduce, all_gather = dist.all_reduce, getattr(dist, ALL_GATHER)
        patch.setattr(dist, "all_reduce", lambda x, *a, **k: (summed.append(x.numel()), all_reduce(x, *a, **k))[1])
        patch.setattr(dist, ALL_GATHER, lambda o, x, **k: (gathered.append(x.nbytes), all_gather(o, x, **k))[1])
        for name in ("all_to_all_single", "batch_isend_irecv"):
            patch.setattr(dist, name, None)
        torch.autograd.grad(call(loss(process_group="world"), *arguments(x)), leaves)
    return sum(summed), sum(gathered)


def test_no_rows_travel():
    agreed = 2 * 8  # number of rows, a checksum
    heads, (views, k, d) = len(CLUSTERS), (2, 7, 10)
    for summed, gathered in run(numbers_summed, 2, "deepcluster"):
        assert (summed, gathered) == (2 * heads, agreed)
    for summed, gathered in run(numbers_summed, 2, "swav"):
        assert (summed, gathered) == (views * (2 + 3 * k) + 2 + k * d, agreed)


# ---- when something is wrong ----


def caught(use, change, options):
    """What the processes are told if process 1 alone has the changes."""
    loss, arguments, _ = USES[use]
    x = whole((6,), torch.float64)
    if dist.get_rank() == 1:
        x |= change
    else:
        options = {}
    try:
        call(loss(process_group="world", **options), *arguments(x))
    except (ValueError, IndexError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def double(*shape):
    return torch.ones(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("use", "change", "options", "message"),
    [
        ("protonce", {"z": double(6, 2, 10).float()}, {}, r"queries: .* float64 \[n, 2, 10\] .* and float32 \[n"),
        ("protonce", {"centers": [double(4, 10), double(11, 10)]}, {}, r"centers: .*4, 10\], float64 \[9, 10\]"),
        ("protonce concentrations", {"concentrations": None}, {}, "center_temperature: .* and None on process 1"),
        ("protonce keys", {}, {"temperature": 0.3}, "temperature: .* got 0.1 on process 0 and 0.3 on process 1"),
        ("protonce", {}, {"exchange": "ring"}, "exchange: "),
        ("deepcluster", {"ids": [torch.zeros(6).long()], "centers": [double(4, 10)]}, {}, "centers: expected the same"),
        ("deepcluster", {}, {"reduction": "sum"}, "reduction: "),
        ("mcl", {"ids": []}, {}, "cluster_ids: .* got 2 tensors on process 0 and 0 tensors on process 1"),
        ("mcl towers", {}, {}, r"keys: expected None with process_group \(views"),
        ("meow", {}, {"symmetric": False}, "symmetric: "),
        ("pamc", {}, {"form": "cluster"}, "form: .* got meta-node on process 0 and cluster on process 1"),
        ("sbcl", {}, {"class_weight": 0.5}, "class_weight: "),
        ("swav", {"prototypes": double(8, 10)}, {}, r"prototypes: .*float64 \[7, 10\] on process 0 and float64 \[8"),
        ("swav", {}, {"epsilon": 0.1}, "epsilon: .* got 0.05 on process 0 and 0.1 on process 1"),
        ("swav", {}, {"iterations": 4}, "iterations: "),
        (
            "swav queue",
            {"queue": None},
            {},
            r"queue: .* got float64 \[n, 2, 10\] on process 0 and None",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_what_differs_is_named_on_every_process(use, change, options, message):
    for text in run(caught, 2, use, change, options):
        assert re.search(message, text), text
        assert text.startswith("ArgumentError")


@pytest.mark.parametrize(
    ("use", "change", "message"),
    [
        ("protonce", {"ids": [torch.full((6,), 9)] * 2}, "cluster_ids[0]: expected ids from -1 to 3"),
        ("protonce", {"ids": []}, "cluster_ids: expected a sequence"),
        ("protonce keys", {"keys": double(5, 10)}, "keys: expected shape [6, 10]"),
        ("deepcluster", {"ids": None}, "cluster_ids: expected a sequence"),
        ("deepcluster", {"centers": []}, "centers: expected 2 tensors"),
        ("meow", {"ids": [torch.zeros(5).long()]}, "cluster_ids: expected shape [6]"),
        ("mcl", {"ids": [torch.zeros(6).long(), torch.zeros(6)]}, "cluster_ids[1]: expected integers"),
        ("pamc", {"keys": double(5, 10)}, "keys: expected shape [6, 10]"),
        ("sbcl", {"ids": [torch.zeros(6).long(), torch.zeros(6)]}, "cluster_ids: expected integers"),
        ("swav", {"prototypes": double(7, 9)}, "prototypes: expected shape [rows, 10]"),
        ("swav queue", {"queue": double(6, 3, 10)}, "queue: expected shape [m, 2, 10]"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_an_error_of_one_process_reaches_all(use, change, message):
    first, second = run(caught, 2, use, change, {})
    assert message in second and "on process" not in second
    kind, words = second.split(": ", 1)
    assert first == f"{kind}: on process 1: {words}"

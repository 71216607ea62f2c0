"""Self-contrast taken apart into blocks of rows: together they make the whole, in value and gradient."""

import itertools
import sys

import pytest
import torch

from ccl_fast import streaming_logsumexp
from ccl_fast.ops import logaddexp, same_id_similarity
from ccl_fast.ops.logsumexp import blocked
from ccl_fast.ops.logsumexp import triton as triton_kernels
from ccl_fast.ops.same_id_similarity import (
    mutual_similarity,
    mutual_similarity_gradient,
    same_id_similarity_gradient,
)
from tests.tolerance import assert_as_accurate

# Of Triton's interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning")
KERNELS = {"blocked": blocked, "triton": triton_kernels}
DTYPES = [
    ("blocked", torch.float64),
    ("blocked", torch.float32),
    ("blocked", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.float16),
]
# Rows of the blocks; the widths take the kernels that keep an accumulator on chip, and those that write strips.
SIZES = [(5, 1, 7), (40, 33), (3, 0, 2), (70, 130)]


def problem(sizes, d, scale, ids, dtype):
    n = sum(sizes)
    z = torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64), dim=1).to(dtype)
    groups = torch.randint(3, (n,)) if ids else None
    grads = torch.randn(2, n, dtype=torch.float64)
    return z, groups, torch.tensor(scale, dtype=torch.float64), grads


def whole(z, ids, scale, grads, wanted, backend, dtype):
    """The log-sum-exps of self-contrast, and the gradients of z and of the scale."""
    wide = torch.promote_types(dtype, torch.float32)
    z, scale, grads = z.to(dtype).requires_grad_(), scale.to(wide).requires_grad_(), grads.to(wide)
    if ids is None:
        found = [streaming_logsumexp(z, scale=scale, backend=backend)]
    else:
        ask = {"scale": scale, "q_ids": ids, "backend": backend}
        found = [streaming_logsumexp(z, candidates=kind, **ask) for kind in ("same_id", "other_id")]
        found = [x for x, want in zip(found, wanted, strict=True) if want]
    total = sum((x.masked_fill(x == -torch.inf, 0.0) * g).sum() for x, g in zip(found, grads, strict=False))
    return found, *torch.autograd.grad(total, (z, scale))


def in_blocks(z, ids, scale, grads, wanted, kernels, sizes, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    scale, grads = scale.to(wide), grads.to(wide)
    parts = z.split(sizes)
    parts_ids = [None] * len(sizes) if ids is None else ids.split(sizes)
    own = [kernels.forward(x, None, scale, None, y, None, *wanted) for x, y in zip(parts, parts_ids, strict=True)]
    sums = [list(found[:2]) for found in own]
    for i, j in itertools.combinations(range(len(sizes)), 2):
        both = kernels.mutual_forward(parts[i], parts[j], scale, parts_ids[i], parts_ids[j], *wanted)
        for block, found in zip((i, j), both, strict=True):
            sums[block] = [logaddexp(a, b) if a.numel() else a for a, b in zip(sums[block], found, strict=True)]
    empty = grads.new_empty(0)
    kinds = [grads[row] if want else None for row, want in zip(_rows(wanted), wanted, strict=True)]
    kinds = [[empty] * len(sizes) if g is None else g.split(sizes) for g in kinds]
    anchors = [(*sums[i], kinds[0][i], kinds[1][i]) for i in range(len(sizes))]
    needs, grad_z, grad_scale = (True, False, True, False), [], 0.0
    for i in range(len(sizes)):
        grad, _, share, _ = kernels.backward(
            parts[i], None, scale, None, parts_ids[i], None, *anchors[i][:2], own[i][2], *anchors[i][2:], needs,
            dtype=wide,
        )  # fmt: skip
        assert grad.dtype == wide
        for j in range(len(sizes)):
            if j != i:
                more, of_scale = kernels.mutual_backward(
                    parts[i], parts[j], scale, parts_ids[i], parts_ids[j], anchors[i], anchors[j]
                )
                assert more.dtype == wide
                grad, share = grad + more, share + of_scale
        grad_z.append(grad)
        grad_scale = grad_scale + share
    found = [torch.cat([s[kind] for s in sums]) for kind in (0, 1) if wanted[kind]]
    return found, torch.cat(grad_z), grad_scale


def _rows(wanted):
    return (0, 1) if all(wanted) else (0, 0)


@pytest.mark.parametrize("wanted", [(False, True), (True, True), (True, False), None], ids=str)
@pytest.mark.parametrize("scale", [10.0, 200.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
def test_blocks_make_the_whole(backend, dtype, sizes, scale, wanted, monkeypatch, kernel_device):
    monkeypatch.setattr(blocked, "BLOCK", 16)
    ids, wanted = wanted is not None, wanted or (False, True)
    z, ids, scale, grads = problem(sizes, 24, scale, ids, dtype)
    device = kernel_device if backend == "triton" else torch.device("cpu")
    moved = [x if x is None else x.to(device) for x in (z, ids, scale, grads)]
    actual = in_blocks(*moved, wanted, KERNELS[backend], sizes, dtype)
    exact = whole(z.double(), ids, scale, grads, wanted, "reference", torch.float64)
    plain = whole(z, ids, scale, grads, wanted, "reference", dtype)
    terms = (exact[1] * z.double()).abs().sum() / scale  # of the gradient of the scale, which cancels
    for a, e, p in zip(actual[0], exact[0], plain[0], strict=True):
        assert_as_accurate(a, e, p, dtype, "log-sum-exp")
    assert_as_accurate(actual[1], exact[1], plain[1], dtype, "gradient of z")
    assert_as_accurate(actual[2], exact[2], plain[2], dtype, "gradient of the scale", magnitude=terms)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_make_the_whole_in_strips(dtype, ids, kernel_device, monkeypatch):
    """D for which the gradient does not fit on chip."""
    monkeypatch.setattr(triton_kernels, "STRIP_BYTES", 1 << 13)
    z, ids, scale, grads = problem((20, 150), 272, 10.0, ids, dtype)
    wanted = (False, True) if ids is None else (True, True)
    moved = [x if x is None else x.to(kernel_device) for x in (z, ids, scale, grads)]
    actual = in_blocks(*moved, wanted, triton_kernels, (20, 150), dtype)
    exact = whole(z.double(), ids, scale, grads, wanted, "reference", torch.float64)
    plain = whole(z, ids, scale, grads, wanted, "reference", dtype)
    terms = (exact[1] * z.double()).abs().sum() / scale
    assert_as_accurate(actual[1], exact[1], plain[1], dtype, "gradient of z")
    assert_as_accurate(actual[2], exact[2], plain[2], dtype, "gradient of the scale", magnitude=terms)


@pytest.mark.parametrize("scale", [10.0, 200.0])
def test_large_blocks_take_the_path_of_bounded_logits(scale, kernel_device, monkeypatch):
    monkeypatch.setattr(triton_kernels, "TRIANGLE_MIN_ROWS", 16)
    z, _, scale, grads = problem((40, 70), 24, scale, False, torch.float32)
    moved = [x if x is None else x.to(kernel_device) for x in (z, None, scale, grads)]
    actual = in_blocks(*moved, (False, True), triton_kernels, (40, 70), torch.float32)
    exact = whole(z.double(), None, scale, grads, (False, True), "reference", torch.float64)
    plain = whole(z, None, scale, grads, (False, True), "reference", torch.float32)
    assert_as_accurate(actual[1], exact[1], plain[1], torch.float32, "gradient of z")


@pytest.mark.parametrize("sizes", [(5, 7), (1, 4), (9, 1)], ids=str)
@pytest.mark.parametrize("part_rows", [2, 8192])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_similarities_of_blocks_make_those_of_the_whole(sizes, dtype, part_rows, monkeypatch):
    monkeypatch.setattr(sys.modules[same_id_similarity.__module__], "PART_ROWS", part_rows)
    z, ids = torch.randn(sum(sizes), 6, dtype=dtype), torch.randint(3, (sum(sizes),))
    grad = torch.randn(sum(sizes), dtype=torch.promote_types(dtype, torch.float32))
    leaf = z.to(grad.dtype).requires_grad_()
    expected, count = same_id_similarity(leaf, ids)
    (of_whole,) = torch.autograd.grad(expected, leaf, grad)
    (a, b), (a_ids, b_ids), (a_grad, b_grad) = z.split(sizes), ids.split(sizes), grad.split(sizes)
    both = mutual_similarity(a, a_ids, b, b_ids)
    for kind, of_all in enumerate((expected, count)):
        own = [same_id_similarity(x, y)[kind] for x, y in ((a, a_ids), (b, b_ids))]
        torch.testing.assert_close(torch.cat([x + p[kind] for x, p in zip(own, both, strict=True)]), of_all)
    gradient = torch.cat(
        [
            same_id_similarity_gradient(a, a_ids, a_grad)
            + mutual_similarity_gradient(a, a_ids, a_grad, b, b_ids, b_grad),
            same_id_similarity_gradient(b, b_ids, b_grad)
            + mutual_similarity_gradient(b, b_ids, b_grad, a, a_ids, a_grad),
        ]
    )
    torch.testing.assert_close(gradient, of_whole)

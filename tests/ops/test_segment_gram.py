"""Gram matrices of clusters against all outer products."""

import sys

import pytest
import torch

from benchmarks.harness.memory import forget_peak, status
from ccl_fast.ops import segment_gram
from ccl_fast.ops.segment_gram_reference import segment_gram as reference
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = pytest.mark.parametrize("n, d, k", ((60, 9, 5), (7, 3, 4), (1, 1, 1), (0, 4, 3), (5, 0, 2), (40, 2, 60)))


def rows(n, d, dtype=torch.float64, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_ids(n, k, dtype=torch.int64):
    return torch.randint(-1, k, (n,), generator=torch.Generator().manual_seed(1)).to(dtype)


def evaluate(function, leaves, call):
    """The value and the gradients of a function of leaves, weighted without symmetry."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    value = call(function, *leaves)
    weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape)
    return [value, *torch.autograd.grad((value * weights.to(value.dtype)).sum(), leaves)]


def check(leaves, call, dtype):
    actual = evaluate(segment_gram, leaves, call)
    exact = evaluate(reference, [x.double() for x in leaves], call)
    plain = evaluate(reference, leaves, call)
    assert actual[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in actual[1:]] == [dtype] * len(leaves)
    for a, e, p in zip(actual, exact, plain, strict=True):
        assert_as_accurate(a, e, p, dtype)


@SIZES
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("ids", (torch.int32, torch.int64))
def test_by_ids(n, d, k, dtype, ids):
    y = some_ids(n, k, ids)
    check([rows(n, d, dtype)], lambda function, z: function(z, y, k), dtype)


@SIZES
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_by_weights(n, d, k, dtype):
    check([rows(n, d, dtype), rows(n, k, dtype, 2)], lambda function, z, w: function(z, weights=w), dtype)


@pytest.mark.parametrize("size", (1, 7))
def test_in_several_blocks(size, monkeypatch):
    for name in ("SEGMENT_ROWS", "MIN_ROWS"):
        monkeypatch.setattr(sys.modules["ccl_fast.ops.segment_gram"], name, size)
    y = some_ids(60, 3)
    check([rows(60, 4)], lambda function, z: function(z, y, 3), torch.float64)
    check([rows(60, 4), rows(60, 3)], lambda function, z, w: function(z, weights=w), torch.float64)


def test_any_strides():
    z, w, y = rows(4, 60).T, rows(3, 60).T, some_ids(120, 3)[::2]
    check([z], lambda function, z: function(z.T.contiguous().T, y, 3), torch.float64)
    torch.testing.assert_close(segment_gram(z, weights=w), reference(z, weights=w))
    torch.testing.assert_close(segment_gram(z, y, 3), reference(z, y, 3))


def test_weights_of_ids_give_the_same():
    z, y = rows(30, 5), some_ids(30, 4).clamp(min=0)
    torch.testing.assert_close(segment_gram(z, y, 4), segment_gram(z, weights=torch.eye(4).double()[y]))


def test_a_column_of_ones_gives_sums_and_numbers():
    z, y = rows(30, 5), some_ids(30, 4)
    last = segment_gram(torch.cat((z, torch.ones(30, 1)), 1).double(), y, 4)[:, -1]
    for c in range(4):
        torch.testing.assert_close(last[c, :-1], z[y == c].sum(0))
        assert last[c, -1] == (y == c).sum()


def test_one_side_alone_may_require_a_gradient():
    z, w = rows(9, 3), rows(9, 2)
    for leaf in (0, 1):
        leaves = [x.clone().requires_grad_(i == leaf) for i, x in enumerate((z, w))]
        (actual,) = torch.autograd.grad(segment_gram(leaves[0], weights=leaves[1]).square().sum(), leaves[leaf])
        (expected,) = torch.autograd.grad(reference(leaves[0], weights=leaves[1]).square().sum(), leaves[leaf])
        torch.testing.assert_close(actual, expected)


def test_what_an_unassigned_row_holds_does_not_matter():
    z, y = rows(9, 3), some_ids(9, 2)
    strange = torch.where((y < 0)[:, None], torch.nan, z).requires_grad_()
    value = segment_gram(strange, y, 2)
    torch.testing.assert_close(value.detach(), segment_gram(z, y, 2))
    assert (torch.autograd.grad(value.sum(), strange)[0][y < 0] == 0).all()


def test_autocast_does_not_round():
    z, y = rows(20, 6, torch.float32), some_ids(20, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = segment_gram(z, y, 3), segment_gram(z, weights=z)
    assert under[0].equal(segment_gram(z, y, 3)) and under[1].equal(segment_gram(z, weights=z))


def test_compiles_as_one_graph(compiler):
    z, y = rows(20, 6).requires_grad_(), some_ids(20, 3)
    compiled = torch.compile(lambda z: segment_gram(z, y, 3).logsumexp((1, 2)), fullgraph=True, backend=compiler)
    expected = segment_gram(z, y, 3).logsumexp((1, 2))
    torch.testing.assert_close(compiled(z), expected)
    found, wanted = (torch.autograd.grad(x.sum(), z)[0] for x in (compiled(z), expected))
    torch.testing.assert_close(found, wanted)


def test_transforms_of_torch_func():
    z, w = rows(9, 3), rows(9, 2)
    found = torch.func.grad(lambda z: segment_gram(z, weights=w).square().sum())(z)
    torch.testing.assert_close(found, torch.func.grad(lambda z: reference(z, weights=w).square().sum())(z))


def test_second_derivative_raises():
    z, y = rows(9, 3).requires_grad_(), some_ids(9, 2)
    (gradient,) = torch.autograd.grad(segment_gram(z, y, 2).square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", ("ids", "weights"))
def test_memory_is_linear(kind):
    """All outer products would take 1 GiB."""
    n, d, k = 65_536, 64, 8
    z = rows(n, d, torch.float32).requires_grad_()
    call = {
        "ids": lambda z: segment_gram(z, some_ids(n, k), k),
        "weights": lambda z: segment_gram(z, weights=torch.ones(n, k)),
    }[kind]
    before = forget_peak()
    call(z).sum().backward()
    assert status("VmHWM") - before < 64 * 2**20 + 6 * z.numel() * 4


Z, Y = torch.ones(4, 3), torch.tensor([0, 1, 1, -1])
ERRORS = {
    "neither": ((Z,), {}, "ids, weights: expected one of the two, got none"),
    "both": ((Z, Y, 2), {"weights": Z}, "ids, weights: expected one of the two, got both"),
    "no number": ((Z, Y), {}, "n_clusters: expected a positive integer, got None"),
    "number": ((Z,), {"weights": Z, "n_clusters": 3}, "n_clusters: expected None with weights"),
    "length": ((Z, Y[:3], 2), {}, r"ids: expected shape \[4\], got \[3\]"),
    "dtype": ((Z, Y.float(), 2), {}, "ids: expected int32 or int64, got torch.float32"),
    "large": ((Z, Y, 1), {}, "ids: expected ids below n_clusters=1, got up to 1"),
    "rows": ((Z,), {"weights": Z[:3]}, r"weights: expected 4 rows \(as z has\), got 3"),
    "weights": ((Z,), {"weights": Z.double()}, "weights: expected dtype torch.float32"),
    "z": ((Z.long(), Y, 2), {}, "z: expected float64, float32, bfloat16 or float16, got torch.int64"),
}


@pytest.mark.parametrize("arguments, options, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(arguments, options, message):
    with pytest.raises((ValueError, IndexError), match=message):
        segment_gram(*arguments, **options)

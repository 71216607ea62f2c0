"""The largest similarity of each id against the matrix of all, and its promise of memory."""

import subprocess
import sys

import pytest
import torch

from ccl_fast.ops import max_by_id
from tests import ROOT
from tests.oracles.losses import assert_matches
from tests.tolerance import OF_TORCH_2_11

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
SIZES = ((7, 13, 4), (1, 5, 5), (5, 1, 3), (6, 9, 1), (0, 4, 2), (3, 0, 2))  # n, m, number of ids
every_size = pytest.mark.parametrize("n, m, number", SIZES)


@pytest.fixture(params=(4096, 5, 1))
def tile_keys(request, monkeypatch):
    monkeypatch.setattr("ccl_fast.ops.rowwise.max_by_id.TILE_KEYS", request.param)
    monkeypatch.setattr("ccl_fast.ops.rowwise.max_by_id.ENTRIES", 2 * request.param)


def given(n, m, number, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(x, d, generator=generator, dtype=torch.float64).to(dtype) for x in (n, m)]
    return *rows, torch.randint(-1, number, (m,), generator=generator), number


def definition(q, k, k_ids, num_ids):
    x = q @ k.T
    if not num_ids or not len(k):
        return x.new_full((len(q), num_ids), -torch.inf) + 0.0 * (q.sum() + k.sum())
    own = k_ids == torch.arange(num_ids)[:, None]
    return x[:, None].masked_fill(~own, -torch.inf).amax(2)


def evaluate(function, q, k, k_ids, num_ids):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    value = function(*leaves, k_ids, num_ids=num_ids)
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view_as(value)
    grads = torch.autograd.grad(value, leaves, weights.masked_fill(value == -torch.inf, 0.0))
    return [value.detach().nan_to_num(neginf=-99.0), *grads]


@every_size
def test_the_definition(n, m, number, tile_keys):
    arguments = given(n, m, number)
    assert_matches(evaluate(max_by_id, *arguments), evaluate(definition, *arguments))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(dtype):
    q, k, ids, number = given(7, 13, 4, dtype=dtype)
    actual = evaluate(max_by_id, q, k, ids, number)
    assert [x.dtype for x in actual] == [torch.float32, dtype, dtype]
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert_matches(actual, evaluate(definition, q.double(), k.double(), ids, number), tolerance)


def test_ids_of_very_different_sizes_in_any_order(tile_keys):
    ids = torch.tensor([3] * 40 + [0] + [1] * 3 + [5] * 7 + [3] * 9)[torch.randperm(60)]
    q, k, *_ = given(5, 60, 1)
    assert_matches(evaluate(max_by_id, q, k, ids, 7), evaluate(definition, q, k, ids, 7))


def test_the_number_of_ids_is_that_of_the_largest():
    q, k, _, _ = given(7, 4, 1)
    assert max_by_id(q, k, torch.tensor([2, 0, -1, 2])).shape == (7, 3)
    assert max_by_id(q, k, torch.full((4,), -3)).shape == (7, 0)
    assert max_by_id(q, k[:0], torch.zeros(0).long()).shape == (7, 0)


def test_ids_of_32_bits():
    q, k, ids, number = given(7, 13, 4)
    assert torch.equal(max_by_id(q, k, ids.int(), num_ids=number), max_by_id(q, k, ids, num_ids=number))


def test_of_equal_keys_one_gets_the_gradient():
    q, k = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]] * 3, requires_grad=True)
    max_by_id(q, k, torch.zeros(3).long()).sum().backward()
    assert k.grad.sum(0).tolist() == [1.0, 2.0] and (k.grad != 0).any(1).sum() == 1


def test_nan_reaches_its_row_and_its_id():
    q, k, *_ = given(4, 6, 1)
    ids = torch.arange(6) % 3
    q[1], k[4] = torch.nan, torch.nan
    assert max_by_id(q, k, ids).isnan().tolist() == [[i == 1 or c == 1 for c in range(3)] for i in range(4)]


def test_autocast_rounds_the_rows():
    q, k, ids, number = given(7, 13, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = max_by_id(q, k, ids, num_ids=number)
    assert torch.equal(actual, max_by_id(q.bfloat16(), k.bfloat16(), ids, num_ids=number))


def test_compiles_as_one_graph(compiler):
    arguments = given(7, 13, 4)
    compiled = torch.compile(max_by_id, fullgraph=True, backend=compiler)
    assert_matches(evaluate(compiled, *arguments), evaluate(max_by_id, *arguments), 1e-12)


def test_gradients_of_torch_func():
    q, k, ids, number = given(7, 13, 4)

    def total(k):
        return max_by_id(q, k, ids.clamp(min=0), num_ids=number).sum()

    leaf = k.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(k), torch.autograd.grad(total(leaf), leaf)[0])


def test_a_second_derivative_raises():
    q, k, ids, _ = given(7, 13, 4)
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(max_by_id(q, k, ids.clamp(min=0)).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"max_by_id: .*double backward"):
        gradient.square().sum().backward()


def test_errors_name_the_argument():
    q, k, ids, _ = given(7, 13, 4)
    for arguments, more, message in (
        ((q, k[:, :3], ids), {}, r"k: expected shape \[rows, 6\], got \[13, 3\]"),
        ((q, k.float(), ids), {}, r"k: expected dtype torch.float64 .*got torch.float32"),
        ((q, k, ids[1:]), {}, r"k_ids: expected shape \[13\], got \[12\]"),
        ((q, k, ids.float()), {}, r"k_ids: expected int32 or int64, got torch.float32"),
        ((q, k, ids), {"num_ids": -1}, r"num_ids: expected an integer >= 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            max_by_id(*arguments, **more)
    with pytest.raises(IndexError, match=r"k_ids: expected ids below num_ids=2, got up to 2"):
        max_by_id(q, k, ids, num_ids=2)


@pytest.mark.parametrize("n, m", [(2048, 16_384), pytest.param(8192, 65_536, marks=pytest.mark.slow)])
def test_memory_is_linear(n, m):
    """One forward and backward over 64 ids, where a single n x m array would take 128 MiB, or 2 GiB."""
    code = """
import sys
import torch
from benchmarks.harness.memory import forget_peak, status
from ccl_fast.ops import max_by_id

def step(n, m, d=16):
    q, k = torch.randn(n, d, requires_grad=True), torch.randn(m, d, requires_grad=True)
    ids = torch.randint(64, (m,))
    before = forget_peak()
    max_by_id(q, k, ids, num_ids=64).sum().backward()
    return status("VmHWM") - before

step(256, 512)
print(step(*map(int, sys.argv[1:])))
"""
    command = [sys.executable, "-c", code, str(n), str(m)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(result.stdout) <= 96 * 2**20 + OF_TORCH_2_11, f"{int(result.stdout) / 2**20:.0f} MiB"

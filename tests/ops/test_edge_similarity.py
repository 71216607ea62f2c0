"""Similarities of listed pairs, with gradients, against the dense matrix."""

import subprocess
import sys

import pytest
import torch

from ccl_fast.ops import edge_similarity
from tests.oracles.losses import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")


def graph(n, m, edges, seed=0):
    """CSR of random edges, repeated ones among them, in no order within a row."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(max(n, 1), (edges,), generator=generator).sort().values
    crow = torch.zeros(n + 1, dtype=torch.int64)
    crow[1:] = rows.bincount(minlength=n).cumsum(0)[:n]
    return crow, torch.randint(max(m, 1), (edges,), generator=generator), rows


def points(n, m, d=6, dtype=torch.float64):
    x = torch.randn(n + m, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return x[:n].clone().requires_grad_(), x[n:].clone().requires_grad_()


def evaluate(values, q, k):
    weights = torch.linspace(1, 2, len(values), dtype=values.dtype)
    return [values, *torch.autograd.grad(values, (q, k), weights, materialize_grads=True)]


def check(n, m, edges, dtype=torch.float64, indices=torch.int64, tolerance=1e-12):
    crow, cols, rows = graph(n, m, edges)
    q, k = points(n, m, dtype=dtype)
    actual = evaluate(edge_similarity(q, k, crow.to(indices), cols.to(indices)), q, k)
    assert actual[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [a.dtype for a in actual[1:]] == [dtype, dtype]
    q, k = (x.detach().double().requires_grad_() for x in (q, k))
    assert_matches(actual, evaluate((q @ k.T)[rows, cols], q, k), tolerance)


@pytest.mark.parametrize(
    "n, m, edges", ((7, 5, 20), (1, 1, 3), (5, 9, 1), (6, 3, 0), (0, 4, 0), (4, 0, 0), (90, 70, 999))
)
@pytest.mark.parametrize("indices", (torch.int32, torch.int64))
def test_the_definition(n, m, edges, indices):
    check(n, m, edges, indices=indices)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)))
def test_dtypes(dtype, tolerance):
    check(7, 5, 20, dtype, tolerance=tolerance)


def test_neighbours_of_a_regular_graph():
    q, k = points(4, 9)
    neighbours = torch.tensor([[8, 1], [0, 0], [3, 4], [5, 2]])
    actual = edge_similarity(q, k, torch.arange(5) * 2, neighbours.flatten()).view(4, 2)
    torch.testing.assert_close(actual, (q[:, None] * k[neighbours]).sum(2))


def test_rows_against_themselves():
    crow, cols, rows = graph(6, 6, 15)
    z, _ = points(6, 0)
    (actual,) = torch.autograd.grad(edge_similarity(z, z, crow, cols).square().sum(), z)
    (expected,) = torch.autograd.grad((z @ z.T)[rows, cols].square().sum(), z)
    torch.testing.assert_close(actual, expected)


def test_one_side_alone_may_require_a_gradient():
    crow, cols, rows = graph(7, 5, 20)
    for side in (0, 1):
        q, k = points(7, 5)
        (q, k)[1 - side].requires_grad_(False)
        (actual,) = torch.autograd.grad(edge_similarity(q, k, crow, cols).square().sum(), (q, k)[side])
        (expected,) = torch.autograd.grad((q @ k.T)[rows, cols].square().sum(), (q, k)[side])
        torch.testing.assert_close(actual, expected)


def test_autocast_rounds_the_rows():
    crow, cols, _ = graph(7, 5, 20)
    q, k = points(7, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = edge_similarity(q, k, crow, cols)
    assert torch.equal(actual, edge_similarity(q.bfloat16(), k.bfloat16(), crow, cols))


def test_compiles_as_one_graph(compiler):
    crow, cols, _ = graph(7, 5, 20)
    q, k = points(7, 5)
    compiled = torch.compile(lambda q, k: edge_similarity(q, k, crow, cols) * 2, fullgraph=True, backend=compiler)
    for a, e in zip(evaluate(compiled(q, k), q, k), evaluate(edge_similarity(q, k, crow, cols) * 2, q, k), strict=True):
        torch.testing.assert_close(a, e)


def test_torchs_note_on_its_sparse_rows_is_kept_from_the_caller():
    code = """
import torch, warnings
from ccl_fast.ops import edge_similarity
warnings.simplefilter("error")
q = torch.ones(2, 3, requires_grad=True)
edge_similarity(q, q, torch.tensor([0, 1, 2]), torch.tensor([1, 0])).sum().backward()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_second_derivative_raises():
    crow, cols, _ = graph(7, 5, 20)
    q, k = points(7, 5)
    (gradient,) = torch.autograd.grad(edge_similarity(q, k, crow, cols).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward"):
        gradient.sum().backward()


Q, K, CROW, COLS = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1, 3]), torch.tensor([3, 0, 1])
ERRORS = {
    "k width": ((Q, K[:, :2], CROW, COLS), ValueError, r"k: expected shape \[rows, 3\], got \[4, 2\]"),
    "crow length": ((Q, K, CROW[:2], COLS), ValueError, r"crow_indices: expected shape \[3\], got \[2\]"),
    "crow dtype": ((Q, K, CROW.float(), COLS), ValueError, r"crow_indices: expected int32 or int64, got torch.float32"),
    "cols dtype": (
        (Q, K, CROW, COLS.int()),
        ValueError,
        r"col_indices: expected dtype torch.int64 .*, got torch.int32",
    ),
    "cols 2-D": ((Q, K, CROW, COLS[None]), ValueError, r"col_indices: expected one dimension, got shape \[1, 3\]"),
    "edges": (
        (Q, K, CROW, COLS[:2]),
        ValueError,
        r"crow_indices: expected increasing numbers from 0 to 2 .*, got 0 to 3",
    ),
    "decreasing": ((Q, K, torch.tensor([0, 4, 3]), COLS), ValueError, r"crow_indices: expected increasing"),
    "column m": ((Q, K, CROW, COLS + 1), IndexError, r"col_indices: expected 0 to 3, .* got 1 to 4"),
    "column below 0": ((Q, K, CROW, COLS - 1), IndexError, r"col_indices: expected 0 to 3, .* got -1 to 2"),
}


@pytest.mark.parametrize("arguments, error, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        edge_similarity(*arguments)

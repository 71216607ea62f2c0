"""The log-sum-exp over all keys but a few of each row."""

import pytest
import torch

from ccl_fast.ops import logsumexp_excluding, streaming_logsumexp

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def operands(n=9, m=23, width=3, d=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, d, generator=generator, dtype=torch.float64).to(dtype) for rows in (n, m))
    return q, k, torch.randint(-1, m, (n, width), generator=generator)


def dense(q, k, excluded, scale):
    rows = []
    for i in range(len(q)):
        kept = [j for j in range(len(k)) if j not in excluded[i].tolist()]
        rows.append((k[kept] @ q[i] * scale).logsumexp(0) if kept else q.new_tensor(-torch.inf))
    return torch.stack(rows)


def gradients(value, leaves):
    finite = value != -torch.inf
    weights = torch.linspace(1, 2, len(value), dtype=value.dtype)
    return torch.autograd.grad((value[finite] * weights[finite]).sum(), leaves)


@pytest.mark.parametrize("n, m, width", ((9, 23, 3), (1, 1, 1), (7, 3, 9), (50, 8, 2), (3, 40, 0), (5, 40, 1)))
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_the_definition(n, m, width, dtype):
    q, k, excluded = operands(n, m, width)
    leaves = [q.requires_grad_(), k.requires_grad_(), torch.tensor(1.7, dtype=torch.float64, requires_grad=True)]
    actual = logsumexp_excluding(q, k, excluded.to(dtype), scale=leaves[2])
    expected = dense(*leaves[:2], excluded, leaves[2])
    torch.testing.assert_close(actual, expected)
    if (expected != -torch.inf).any():
        for a, e in zip(gradients(actual, leaves), gradients(expected, leaves), strict=True):
            torch.testing.assert_close(a, e)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)))
def test_dtypes(dtype, tolerance):
    q, k, excluded = operands(dtype=dtype)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    actual = logsumexp_excluding(*leaves, excluded, scale=2.0)
    expected = dense(*exact, excluded, 2.0)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    for a, e, leaf in zip(gradients(actual, leaves), gradients(expected, exact), leaves, strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


def test_nothing_cancels():
    # The difference of the sums with and without the first key would be 0 in every dtype.
    q, k = torch.tensor([[1.0]]), torch.tensor([[90.0], [1.0], [2.0]])
    actual = logsumexp_excluding(q, k, torch.tensor([[0]]), scale=1.0)
    torch.testing.assert_close(actual, torch.tensor([1.0, 2.0]).logsumexp(0)[None])


def test_nothing_excluded_is_the_streaming_one():
    q, k, excluded = operands()
    actual = logsumexp_excluding(q, k, torch.full_like(excluded, -1), scale=3.0)
    torch.testing.assert_close(actual, streaming_logsumexp(q, k, scale=3.0))


def test_no_key_left_is_minus_infinity_without_gradient():
    q, k, _ = operands(n=3, m=2)
    q, k = q.requires_grad_(), k.requires_grad_()
    value = logsumexp_excluding(q, k, torch.tensor([[0, 1], [1, -1], [-1, -1]]), scale=1.0)
    assert (value == -torch.inf).tolist() == [True, False, False]
    grad_q, grad_k = torch.autograd.grad(value, [q, k], torch.ones(3, dtype=torch.float64))
    assert (grad_q[0] == 0).all() and grad_q[1:].isfinite().all() and grad_k.isfinite().all()


def test_autocast_and_non_contiguous_operands():
    q, k, excluded = operands(dtype=torch.float32)
    expected = logsumexp_excluding(q, k, excluded, scale=1.0)
    strided = (torch.stack((x, x), dim=2)[..., 0] for x in (q, k, excluded))
    torch.testing.assert_close(logsumexp_excluding(*strided, scale=1.0), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = logsumexp_excluding(q, k, excluded, scale=1.0)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(actual, logsumexp_excluding(q.bfloat16(), k.bfloat16(), excluded, scale=1.0))


def test_a_second_derivative_raises():
    q, k, excluded = operands()
    (grad,) = torch.autograd.grad(
        logsumexp_excluding(q.requires_grad_(), k, excluded, scale=1.0).sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="gradient of its gradient"):
        grad.sum().backward()


def test_errors():
    q, k, excluded = operands()
    for arguments, message in (
        ((q, k[:, :2], excluded), r"k: expected shape \[rows, 6\], got \[23, 2\]"),
        ((q, k.float(), excluded), "k: expected dtype torch.float64"),
        ((q, k, excluded[:, 0]), r"excluded: expected shape \[rows, d\]"),
        ((q, k, excluded[:4]), r"excluded: expected 9 rows \(those of q\), got 4"),
        ((q, k, excluded.double()), "excluded: expected int32 or int64"),
    ):
        with pytest.raises(ValueError, match=message):
            logsumexp_excluding(*arguments, scale=1.0)

"""Sums over same-id pairs against the masked dense matrix."""

import pytest
import torch

from ccl_fast.ops import row_dot, same_id_similarity
from ccl_fast.ops.ids import consecutive_ids
from tests.tolerance import assert_as_accurate


def dense(z, ids):
    mask = (ids[:, None] == ids[None, :]).fill_diagonal_(False)
    wide = torch.promote_types(z.dtype, torch.float32)
    return ((z @ z.T).to(wide) * mask).sum(1), mask.sum(1).to(wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("clusters", [1, 5, 60])
def test_agrees_with_the_dense_matrix(dtype, clusters):
    z, weights = torch.randn(60, 9, dtype=torch.float64).to(dtype), torch.randn(60, dtype=torch.float64)
    ids = torch.randint(-clusters, clusters, (60,)) * 10**12
    results = []
    for function, x in ((same_id_similarity, z), (dense, z.double()), (dense, z)):
        x = x.clone().requires_grad_()
        sums, counts = function(x, ids)
        (grad,) = torch.autograd.grad((sums * weights.to(sums.dtype)).sum(), x)
        results.append((sums, grad, counts))
    (sums, grad, counts), exact, plain = results
    assert sums.dtype == torch.promote_types(dtype, torch.float32) and grad.dtype == dtype
    assert torch.equal(counts.double(), exact[2])
    assert_as_accurate(sums, exact[0], plain[0], dtype, "sums", magnitude=z.double().square().sum())
    assert_as_accurate(grad, exact[1], plain[1], dtype, "gradient")


def test_derivatives():
    ids = torch.tensor([0, 0, 1, 2, 2, 2])
    z = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: same_id_similarity(z, ids)[0], (z,))
    assert torch.autograd.gradgradcheck(lambda z: same_id_similarity(z, ids)[0], (z,))


def test_empty():
    sums, counts = same_id_similarity(torch.randn(0, 3), torch.zeros(0, dtype=torch.int64))
    assert sums.shape == counts.shape == (0,)


def test_consecutive_ids_are_those_of_unique():
    for dtype in (torch.int32, torch.int64):
        ids = torch.randint(-5, 5, (50,), dtype=dtype) * 1000
        assert torch.equal(consecutive_ids(ids), ids.unique(return_inverse=True)[1])


def test_autocast_does_not_round():
    a, b = torch.randn(20, 64), torch.randn(20, 64)
    ids = torch.randint(0, 3, (20,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = row_dot(a, b), *same_id_similarity(a, ids)
    for x, y in zip(under, (row_dot(a, b), *same_id_similarity(a, ids)), strict=True):
        assert torch.equal(x, y)

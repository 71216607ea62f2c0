"""The log of a sum of exponentials of several terms, of which some or all may be -inf; numbers of ids."""

import pytest
import torch

from ccl_fast.ops import logaddexp
from ccl_fast.ops.ids import int32_ids


def terms(number, dtype=torch.float64):
    x = torch.randn(number, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 1] = x[-1, 2] = x[:, 3] = -torch.inf
    x[0, 4], x[1, 4] = 800.0, -800.0
    return [row.to(dtype).requires_grad_() for row in x]


@pytest.mark.parametrize("number", (2, 3, 5))
def test_value_and_gradient(number):
    given = terms(number)
    value = logaddexp(*given)
    exact = torch.stack([x.detach() for x in given])
    torch.testing.assert_close(value, exact.logsumexp(0))
    weights = torch.linspace(1, 2, 6, dtype=torch.float64)
    expected = weights * (exact - exact.logsumexp(0).masked_fill(exact.isneginf().all(0), 0.0)).exp()
    torch.testing.assert_close(torch.stack(torch.autograd.grad(value, given, weights)), expected)


def test_second_derivatives():
    finite = [x.detach()[[0, 5]].requires_grad_() for x in terms(3)]
    assert torch.autograd.gradgradcheck(logaddexp, finite)
    given = terms(3)
    first = torch.autograd.grad(logaddexp(*given)[:4].exp().sum(), given, create_graph=True)
    assert all(x.isfinite().all() for x in torch.autograd.grad(torch.stack(first).square().sum(), given))


def test_one_that_prevails_leaves_the_other_its_share():
    given = [x.requires_grad_() for x in torch.tensor([[0.0], [-20.0]]).unbind()]
    value = logaddexp(*given)
    torch.testing.assert_close(value.detach(), torch.tensor([2.0611537e-9]), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("with_keys", (False, True))
def test_numbers_are_equal_where_ids_are(with_keys):
    ids = torch.tensor([5, -(2**60), 5, 2**40, 0, 2**40, -1])
    keys = torch.tensor([2**40, 7, -1]) if with_keys else None
    found = int32_ids(ids, keys)
    assert all(x is None or x.dtype == torch.int32 for x in found) and (found[1] is None) != with_keys
    everyone, numbers = (torch.cat([x for x in both if x is not None]) for both in ((ids, keys), found))
    assert torch.equal(everyone[:, None] == everyone, numbers[:, None] == numbers)
    assert int32_ids(*found) == found

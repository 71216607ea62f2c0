"""A log-sum-exp with the sum of the positives' logits: against the dense definition, with one gradient of both."""

import pytest
import torch

from ccl_fast.ops.ids import groups_of
from ccl_fast.ops.logsumexp import blocked
from ccl_fast.ops.logsumexp.positives import contrast_with_positives
from tests.tolerance import assert_as_accurate

# Of Triton's interpreter.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning"),
]
RUNS = [
    ("blocked", torch.float64),
    ("blocked", torch.float32),
    ("blocked", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.float16),
]


def problem(kind, n=57, m=45, d=24):
    q = torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64), dim=1)
    k = torch.nn.functional.normalize(torch.randn(m, d, dtype=torch.float64), dim=1)
    ids = torch.arange(n) % 7
    ids[::3] = torch.arange(len(ids[::3])) // 2 + 100  # pairs, and one that is alone
    if kind == "self":
        return q, ids, None, None
    return q, ids, k, torch.cat((torch.arange(m - 5) % 9, torch.arange(100, 105)))


def dense(q, ids, k, k_ids, scale, single, by_id):
    """Written out: logits, masks, sums."""
    wide = torch.promote_types(q.dtype, torch.float32)
    s = (q @ (q if k is None else k).T).to(wide) * scale
    itself = torch.eye(len(q), dtype=torch.bool) if k is None else torch.zeros(s.shape, dtype=torch.bool)
    same = (ids[:, None] == (ids if k is None else k_ids)) & ~itself
    left_out = itself | (same if by_id else same & single[:, None])
    sums = [s.masked_fill(left_out, -torch.inf).logsumexp(1)]
    if by_id:
        sums.append(s.masked_fill(~same, -1e30).logsumexp(1).masked_fill(~same.any(1), -torch.inf))
    return *sums, s.masked_fill(~same, 0.0).sum(1)


@pytest.mark.parametrize("kind", ["self", "keys"])
@pytest.mark.parametrize("by_id", [False, True])
@pytest.mark.parametrize("scale", [5.0, 200.0])  # bounded logits, and others
@pytest.mark.parametrize(("backend", "dtype"), [*RUNS, ("reference", torch.float32)], ids=str)
def test_value_and_gradient(backend, dtype, scale, by_id, kind, monkeypatch, kernel_device):
    monkeypatch.setattr(blocked, "BLOCK", 16)
    q, ids, k, k_ids = problem(kind)
    count = (ids[:, None] == (ids if k is None else k_ids)).sum(1) - int(k is None)
    single = count == 1
    assert single.any() and (count > 1).any() and (count == 0).any()
    grads = torch.randn(3, len(q), dtype=torch.float64)
    grads[:, ::5] = 0.0

    def run(function, dtype):
        wide = torch.promote_types(dtype, torch.float32)
        leaves = [x.to(dtype).requires_grad_() for x in (q, k) if x is not None]
        leaves.append(torch.tensor(scale, dtype=wide, requires_grad=True))
        found = [x for x in function(leaves[0], leaves[1] if k is not None else None, leaves[-1]) if x.numel()]
        total = sum(
            (x.masked_fill(x == -torch.inf, 0.0) * g.to(wide)).sum() for x, g in zip(found, grads, strict=False)
        )
        return found, torch.autograd.grad(total, leaves)

    def ours(a, b, s):
        device = kernel_device if backend == "triton" else a.device
        a, b, i, j, t, s = (x if x is None else x.to(device) for x in (a, b, ids, k_ids, single, s))
        i, j = groups_of(i, j)
        return contrast_with_positives(a, i, b, j, scale=s, single=t, by_id=by_id, backend=backend)

    actual = run(ours, dtype)
    plain, exact = (
        run(lambda a, b, s: dense(a, ids, b, k_ids, s, single, by_id), dtype) for dtype in (dtype, torch.float64)
    )
    for a, e, p in zip(actual[0], exact[0], plain[0], strict=True):
        assert_as_accurate(a, e, p, dtype, "sum", magnitude=scale * len(q) ** 0.5)
    rounded = 1.0 if scale < 10 else 2.0  # a weight is off by the rounding of its logit, which is as large as the scale
    for a, e, p, what in zip(
        actual[1], exact[1], plain[1], ("q", "k", "scale") if k is not None else "qs", strict=True
    ):
        assert_as_accurate(a, e, p, dtype, what, magnitude=rounded * e.norm() + (1e2 if e.ndim == 0 else 0.0))


@pytest.mark.parametrize("kind", ["self", "keys"])
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_nearly_equal_positives(backend, kind, monkeypatch):
    """Two products would err by the rounding of a row, of which next to nothing is left."""
    monkeypatch.setattr(blocked, "BLOCK", 64)
    centers = torch.nn.functional.normalize(torch.randn(40, 64, dtype=torch.float64), dim=1)
    z = torch.nn.functional.normalize(centers[:, None] + 0.003 * torch.randn(40, 5, 64, dtype=torch.float64), dim=2)
    ids, z = torch.arange(40).repeat_interleave(5), z.flatten(0, 1)
    keys = None if kind == "self" else torch.nn.functional.normalize(z + 0.003 * torch.randn_like(z), dim=1)
    count = 4 if kind == "self" else 5

    def tangential(function, dtype):
        x = z.to(dtype).requires_grad_()
        k = None if keys is None else keys.to(dtype)
        rest, *_, positives = function(x, k)
        (grad,) = torch.autograd.grad((rest - positives / count).mean(), x)
        grad = grad.double()
        return grad - (grad * z).sum(1, keepdim=True) * z

    def ours(x, k):
        group, k_group = groups_of(ids, None if k is None else ids)
        return contrast_with_positives(x, group, k, k_group, scale=20.0, backend=backend)

    nobody = torch.zeros(len(ids), dtype=torch.bool)
    exact, plain = (
        tangential(lambda x, k: dense(x, ids, k, ids, 20.0, nobody, False), dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_as_accurate(tangential(ours, torch.float32), exact, plain, torch.float32)


def test_a_second_derivative_is_refused():
    x = torch.randn(6, 3, requires_grad=True)
    rest, _, positives = contrast_with_positives(x, torch.zeros(6).long(), scale=1.0, backend="blocked")
    (grad,) = torch.autograd.grad((rest - positives).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="contrast_with_positives: the gradient of its gradient"):
        grad.sum().backward()

"""The log-sum-exp over the hardest keys and the mean similarity, with their gradients, against dense definitions."""

import pytest
import torch

from ccl_fast.ops import expected_similarity, streaming_logsumexp, topk_logsumexp
from tests.oracles.losses import assert_matches
from tests.oracles.pairs import every_choice, every_size, pairs

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def hardest(x, mask, topk, scale, bias=None):
    """Log-sum-exp over what is not below the row's topk-th largest candidate."""
    losses = []
    for row, candidates in zip(x, mask, strict=True):
        own = row[candidates]
        chosen = own[own >= own.detach().sort(descending=True).values[:topk][-1]] if len(own) else own
        losses.append(torch.logsumexp(scale * chosen, 0))
    return torch.stack(losses) if losses else x.sum(1)


def mean(x, mask, topk, scale, bias=None):
    logits = x * scale if bias is None else x * scale + bias
    rows = [
        (logits[i, mask[i]].softmax(0) * x[i, mask[i]]).sum() if (logits[i, mask[i]] > -torch.inf).any() else 0 * scale
        for i in range(len(x))
    ]
    return torch.stack(rows) if rows else x.sum(1)


def evaluate(call, given, scale, bias=None, k=None):
    """Values and gradients by q, k, scale and bias; rows with unequal cotangents, those of -inf with none."""
    leaves = [x.detach().requires_grad_() for x in (given.q, given.k, scale, bias) if x is not None]
    parts = iter(leaves)
    q, k = next(parts), None if given.k is None else next(parts)
    value = call(q, k, next(parts), next(parts, None))
    finite = value.masked_fill(value == -torch.inf, 0.0)
    weights = torch.linspace(1, 2, len(value), dtype=value.dtype)
    return [finite, *torch.autograd.grad(finite, leaves, weights, materialize_grads=True)]


def check(operator, oracle, given, scale, bias=None, topk=None, tolerance=1e-10):
    options = given.among | ({} if topk is None else {"topk": topk})
    wide = torch.promote_types(given.q.dtype, torch.float32)
    scale = torch.tensor(scale, dtype=wide)

    def fast(q, k, scale, bias):
        bias = {} if bias is None else {"key_bias": bias}
        return operator(q, k, scale=scale, **bias, **options)

    def dense(q, k, scale, bias):
        q, scale = q.double(), scale.double()
        return oracle(q @ (q if k is None else k.double()).T, given.mask(), topk, scale, bias)

    actual = evaluate(fast, given, scale, bias)
    assert actual[0].dtype == wide
    expected = evaluate(dense, given, scale, None if bias is None else bias.double())
    assert_matches(actual, [e.double() for e in expected], tolerance)


@every_size
@every_choice
@pytest.mark.parametrize("topk", (1, 3, 100))
def test_hardest(n, m, candidates, topk):
    check(topk_logsumexp, hardest, pairs(n, m, candidates), 2.0, topk=topk)


@every_size
@every_choice
@pytest.mark.parametrize("scale", (2.0, 0.0, -1.5))
@pytest.mark.parametrize("biased", (False, True))
def test_mean(n, m, candidates, scale, biased):
    given = pairs(n, m, candidates)
    bias = None
    if biased:
        bias = torch.linspace(-3, 3, len(given.keys), dtype=torch.float64)
        bias[::3] = -torch.inf
    check(expected_similarity, mean, given, scale, bias)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)))
@pytest.mark.parametrize("m", (None, 30))
def test_dtypes(dtype, tolerance, m):
    given = pairs(9, m, dtype=dtype)
    check(topk_logsumexp, hardest, given, 2.0, topk=3, tolerance=tolerance)
    check(expected_similarity, mean, given, 2.0, tolerance=tolerance)


@every_choice
@pytest.mark.parametrize("m", (None, 30))
def test_all_keys_are_the_log_sum_exp(candidates, m):
    given = pairs(9, m, candidates)
    actual = topk_logsumexp(given.q, given.k, scale=3.0, topk=30, **given.among)
    torch.testing.assert_close(actual, streaming_logsumexp(given.q, given.k, scale=3.0, **given.among))


@every_choice
def test_the_mean_is_the_log_sum_exps_derivative_by_the_scale(candidates):
    given, scale = pairs(9, 30, candidates), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    logsumexp = streaming_logsumexp(given.q, given.k, scale=scale, **given.among).masked_fill(~given.mask().any(1), 0)
    (by_scale,) = torch.autograd.grad(logsumexp.sum(), scale)
    torch.testing.assert_close(expected_similarity(given.q, given.k, scale=3.0, **given.among).sum(), by_scale)


def test_ties_with_the_last_key_count():
    q = torch.tensor([[1.0, 0.0]])
    keys = torch.tensor([[3.0, 0.0], [2.0, 0.0], [2.0, 5.0], [1.0, 0.0]])
    actual = topk_logsumexp(q, keys, scale=1.0, topk=2)
    torch.testing.assert_close(actual, torch.tensor([3.0, 2.0, 2.0]).logsumexp(0)[None])


@pytest.mark.parametrize("scale", (1e4, -1e4))
def test_logits_far_beyond_the_range_of_exp(scale):
    check(expected_similarity, mean, pairs(9, None, dtype=torch.float32), scale, tolerance=1e-3)
    check(topk_logsumexp, hardest, pairs(9, 30), abs(scale), topk=4)


def test_many_keys_by_groups():
    check(topk_logsumexp, hardest, pairs(5, 1003), 2.0, topk=5)


@pytest.mark.parametrize("operator", (expected_similarity, topk_logsumexp))
@pytest.mark.parametrize("backward_inside", (False, True))
def test_autocast_rounds_the_rows_and_nothing_else(operator, backward_inside):
    given, options = pairs(9, 30, dtype=torch.float32), {"topk": 3} if operator is topk_logsumexp else {}

    def results(q, k, autocast):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = operator(q, k, scale=2.0, **options)
            if backward_inside:
                value.sum().backward()
        if not backward_inside:
            value.sum().backward()
        return [value.detach(), q.grad.float(), k.grad.float()]

    for a, e in zip(
        results(given.q, given.k, True), results(given.q.bfloat16(), given.k.bfloat16(), False), strict=True
    ):
        assert torch.equal(a, e)


@pytest.mark.parametrize("operator", (expected_similarity, topk_logsumexp))
def test_compiles_as_one_graph(operator, compiler):
    given, options = pairs(9, None), {"topk": 3} if operator is topk_logsumexp else {}

    def value_and_gradient(q):
        q = q.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(operator(q, scale=2.0, **options).sum(), q)
        return gradient

    expected = value_and_gradient(given.q)
    compiled = torch.compile(lambda q: operator(q, scale=2.0, **options), fullgraph=True, backend=compiler)
    q = given.q.detach().requires_grad_()
    (actual,) = torch.autograd.grad(compiled(q).sum(), q)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("operator", (expected_similarity, topk_logsumexp))
def test_second_derivative_raises(operator):
    q, options = pairs(9, None).q.requires_grad_(), {"topk": 3} if operator is topk_logsumexp else {}
    (gradient,) = torch.autograd.grad(operator(q, scale=2.0, **options).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward"):
        gradient.sum().backward()


def test_errors_name_the_argument():
    q = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"topk: expected a positive integer, got 0"):
        topk_logsumexp(q, scale=1.0, topk=0)
    with pytest.raises(ValueError, match=r"scale: expected .* one element.*\(3,\)"):
        expected_similarity(q, scale=torch.ones(3))
    with pytest.raises(ValueError, match=r"key_bias: expected shape \[3\], got \[2\]"):
        expected_similarity(q, scale=1.0, key_bias=torch.ones(2))

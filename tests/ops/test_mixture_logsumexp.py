"""The log-sum-exp over mixtures, against all mixtures built."""

import pytest
import torch
from torch.nn.functional import normalize

from ccl_fast.ops.rowwise.mixtures import Mixing, mixture_logsumexp
from tests.oracles.losses import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def points(n, m, d=6, dtype=torch.float64):
    x = torch.randn(n + m, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return x[:n].clone().requires_grad_(), x[n:].clone()


def mixing_of(n, topk, s, t, dtype=torch.float64, places=torch.int64):
    random = torch.Generator().manual_seed(2)
    first, second = torch.randint(topk, (2, n, s), generator=random).to(places)
    alpha = torch.rand(n, s, generator=random, dtype=dtype)
    return Mixing(
        first,
        second,
        alpha,
        torch.randint(topk, (n, t), generator=random).to(places),
        torch.rand(n, t, generator=random, dtype=dtype) / 2,
    )


def dense(q, k, mixing, *, topk, scale):
    listed = k[(q.detach() @ k.T).topk(topk).indices]
    a, b, c = (
        listed.gather(1, x.long()[..., None].expand(-1, -1, q.shape[1]))
        for x in (mixing.first, mixing.second, mixing.other)
    )
    alpha, beta = mixing.alpha[..., None], mixing.beta[..., None]
    two = normalize(alpha * a + (1 - alpha) * b, dim=2)
    with_query = normalize(beta * q.detach()[:, None] + (1 - beta) * c, dim=2)
    return (torch.cat((two, with_query), 1) @ q[..., None])[..., 0].mul(scale).logsumexp(1)


def evaluate(function, q, k, mixing, topk):
    scale = torch.tensor(2.0, dtype=mixing.alpha.dtype, requires_grad=True)
    values = function(q, k, mixing, topk=topk, scale=scale)
    weights = torch.linspace(1, 2, len(values), dtype=values.dtype)
    return [values, *torch.autograd.grad(values, (q, scale), weights)]


def check(n, m, topk, s, t, dtype=torch.float64, tolerance=1e-12, places=torch.int64):
    q, k = points(n, m, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    mixing = mixing_of(n, topk, s, t, wide, places)
    actual = evaluate(mixture_logsumexp, q, k, mixing, topk)
    assert [x.dtype for x in actual] == [wide, dtype, wide]
    exact = mixing._replace(alpha=mixing.alpha.double(), beta=mixing.beta.double())
    q = q.detach().double().requires_grad_()
    assert_matches(actual, evaluate(dense, q, k.double(), exact, topk), tolerance)


@pytest.mark.parametrize("n, m, topk", ((7, 15, 4), (1, 1, 1), (5, 3, 3), (4, 90, 20)))
@pytest.mark.parametrize("s, t", ((5, 3), (0, 1), (1, 0), (40, 30)))
def test_the_definition(n, m, topk, s, t):
    check(n, m, topk, s, t)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)))
def test_dtypes(dtype, tolerance):
    check(7, 15, 4, 5, 3, dtype, tolerance)


@pytest.mark.parametrize("places", (torch.int16, torch.int32, torch.uint8))
def test_places_of_any_integer_dtype(places):
    check(7, 15, 4, 5, 3, places=places)


def test_no_rows():
    q, k = points(0, 5)
    assert [x.shape for x in evaluate(mixture_logsumexp, q, k, mixing_of(0, 2, 3, 3), 2)] == [(0,), (0, 6), ()]


def test_what_is_kept_for_the_backward_does_not_grow_with_the_mixtures():
    q, k = points(7, 40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        mixture_logsumexp(q, k, mixing_of(7, 30, 200, 100), topk=30, scale=2.0)
    assert 0 < max(kept) <= q.numel()


def test_compiles_as_one_graph(compiler):
    q, k = points(7, 15)
    mixing = mixing_of(7, 4, 5, 3)

    def function(*arguments, **options):
        return mixture_logsumexp(*arguments, **options) * 2

    fast = torch.compile(function, fullgraph=True, backend=compiler)
    for a, e in zip(evaluate(fast, q, k, mixing, 4), evaluate(function, q, k, mixing, 4), strict=True):
        torch.testing.assert_close(a, e)


def test_second_derivative_raises():
    q, k = points(7, 15)
    value = mixture_logsumexp(q, k, mixing_of(7, 4, 5, 3), topk=4, scale=2.0).sum()
    (gradient,) = torch.autograd.grad(value, q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"mixture_logsumexp: .*double backward"):
        gradient.sum().backward()


def test_errors():
    q, k = points(7, 15)
    mixing = mixing_of(7, 4, 5, 3)
    for arguments, options, message in (
        ((q, k[:, :2], mixing), {}, r"k: expected shape \[rows, 6\]"),
        ((q, k, mixing), {"topk": 16}, "topk: expected at most 15, the rows of k, got 16"),
        ((q, k, mixing), {"topk": 0}, "topk: expected a positive integer, got 0"),
        ((q, k, mixing), {"scale": "1"}, "scale: expected a number"),
        ((q, k, mixing._replace(alpha=mixing.beta)), {}, r"mixing.alpha: expected shape \[7, 5\], got \[7, 3\]"),
        ((q, k, mixing._replace(second=None)), {}, r"mixing.second: expected a torch.Tensor"),
        ((q, k, mixing_of(7, 4, 0, 0)), {}, "mixing: expected a mixture of each row at least, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture_logsumexp(*arguments, **({"topk": 4, "scale": 2.0} | options))

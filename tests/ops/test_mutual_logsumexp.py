"""The log-sum-exp of two sets of rows over each other, by one pass, against both by their own."""

import pytest
import torch

from ccl_fast.ops import mutual_logsumexp, streaming_logsumexp
from ccl_fast.ops.logsumexp import blocked
from tests.tolerance import assert_as_accurate

pytestmark = [
    pytest.mark.usefixtures("one_thread", "several_tiles"),
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning"),
]
NAMES = ("of q", "of k", "gradient of q", "gradient of k", "gradient of scale")


def results(q, k, scale, ids, candidates, backend, one_pass=True):
    """Both log-sum-exps and all gradients of a weighted sum of them."""
    q, k = (x.clone().requires_grad_() for x in (q, k))
    scale = torch.tensor(scale, dtype=torch.promote_types(q.dtype, torch.float32), requires_grad=True)
    q_ids, k_ids = (None, None) if ids is None else ids
    if one_pass:
        both = mutual_logsumexp(q, k, scale=scale, q_ids=q_ids, k_ids=k_ids, candidates=candidates, backend=backend)
    else:
        options = {"scale": scale, "candidates": candidates, "backend": backend}
        both = (
            streaming_logsumexp(q, k, q_ids=q_ids, k_ids=k_ids, **options),
            streaming_logsumexp(k, q, q_ids=k_ids, k_ids=q_ids, **options),
        )
    total = sum((x[x.isfinite()] * torch.linspace(1, 2, len(x), dtype=x.dtype)[x.isfinite()]).sum() for x in both)
    return *(x.detach() for x in both), *torch.autograd.grad(total, (q, k, scale))


def operands(n, m, dtype, seed=0, d=7):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.nn.functional.normalize(torch.randn(rows, d, generator=generator).double()) for rows in (n, m))
    ids = torch.randint(5, (n,), generator=generator), torch.randint(5, (m,), generator=generator)
    return q.to(dtype), k.to(dtype), ids


@pytest.mark.parametrize("n, m", ((40, 40), (9, 70), (1, 1)))
@pytest.mark.parametrize("scale", (3.0, 90.0))
@pytest.mark.parametrize("candidates", ("all", "other_id", "same_id", "no ids", "partners"))
@pytest.mark.parametrize(
    "backend, dtype",
    (
        ("blocked", torch.float64),
        ("blocked", torch.float32),
        ("blocked", torch.bfloat16),
        ("triton", torch.float32),
        ("triton", torch.float16),
        ("reference", torch.float64),
    ),
)
def test_it_is_both_directions(n, m, scale, candidates, backend, dtype):
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, ids = operands(n, m, dtype)
    if candidates == "no ids":
        ids, candidates = None, "all"
    elif candidates == "partners":
        ids, candidates = (torch.arange(n), torch.arange(m)), "other_id"
    actual = results(q, k, scale, ids, candidates, backend)
    exact = results(q.double(), k.double(), scale, ids, candidates, "reference", one_pass=False)
    plain = results(q, k, scale, ids, candidates, "reference", one_pass=False)
    for name, *values in zip(NAMES, actual, exact, plain, strict=True):
        assert_as_accurate(*values, dtype, name)


def test_one_gradient_alone():
    q, k, _ = operands(30, 20, torch.float32)
    ids = torch.arange(30), torch.arange(20)
    expected = results(q, k, 5.0, ids, "other_id", "blocked")[2:4]
    for needed in (0, 1):
        rows = [q.clone(), k.clone()]
        rows[needed].requires_grad_()
        both = mutual_logsumexp(*rows, scale=5.0, q_ids=ids[0], k_ids=ids[1], candidates="other_id")
        total = sum((x * torch.linspace(1, 2, len(x))).sum() for x in both)
        torch.testing.assert_close(torch.autograd.grad(total, rows[needed])[0], expected[needed])


def test_each_tile_is_made_once(monkeypatch):
    """The reason to be of the operator."""
    made = []
    product = blocked.matmul_nt
    monkeypatch.setattr(blocked, "matmul_nt", lambda *args: made.append(1) or product(*args))
    monkeypatch.setattr(blocked, "BLOCK", 4)
    q, k, _ = operands(8, 12, torch.float32)
    mutual_logsumexp(q, k, scale=5.0)
    assert len(made) == 2 * 3


def test_a_second_derivative_raises():
    q, k, _ = operands(5, 4, torch.float64)
    value = sum(x.sum() for x in mutual_logsumexp(q.requires_grad_(), k, scale=1.0))
    (grad,) = torch.autograd.grad(value, q, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of its gradient"):
        grad.sum().backward()


def test_compiles():
    q, k, _ = operands(12, 9, torch.float32)

    def f(q, k):
        return torch.cat(mutual_logsumexp(q, k, scale=3.0, backend="blocked"))

    q.requires_grad_()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(q, k)
    torch.testing.assert_close(compiled, f(q, k))
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), q)[0] for x in (compiled, f(q, k))))


@pytest.mark.parametrize("pairs", (1, 3, 30))
def test_few_pairs_of_an_id_are_listed_and_many_masked(pairs):
    """Both ways of leaving pairs out, of self-contrast too."""
    n = 60
    z, _, _ = operands(n, 1, torch.float64)
    ids = torch.arange(n).remainder(n // pairs)[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    problem = blocked._Problem(z, None, torch.tensor(3.0), None, ids, None, False, True, torch.tensor(True))
    assert (problem.pairs is None) == (pairs > blocked.LISTED_PAIRS)
    for scale in (3.0, 90.0):
        found = []
        for backend in ("blocked", "reference"):
            rows = z.clone().requires_grad_()
            lse = streaming_logsumexp(rows, scale=scale, q_ids=ids, candidates="other_id", backend=backend)
            found.append((lse, torch.autograd.grad((lse * torch.linspace(1, 2, n)).sum(), rows)[0]))
        for actual, expected in zip(*found, strict=True):
            torch.testing.assert_close(actual, expected)

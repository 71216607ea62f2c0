"""The mass of the last places against the whole matrix of probabilities, and against diffsort."""

import importlib

import pytest
import torch

from ccl_fast.ops import soft_rank_mass
from ccl_fast.ops.soft_rank_mass_reference import soft_permutation
from ccl_fast.ops.soft_rank_mass_reference import soft_rank_mass as reference
from tests.oracles.losses import assert_matches, differentiate
from tests.peak import peak_bytes
from tests.tolerance import OF_TORCH_2_11, assert_as_accurate

operator = importlib.import_module("ccl_fast.ops.soft_rank_mass")  # the function has the module's name
pytestmark = pytest.mark.usefixtures("one_thread", "few_lists")


@pytest.fixture
def few_lists(monkeypatch):
    """At a time, so that there are several blocks of them."""
    monkeypatch.setattr(operator, "CPU_NUMBERS", 1)
    monkeypatch.setattr(operator, "MIN_LISTS", 4)


def lists(b, m, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, m, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def evaluate(function, s, *arguments, **options):
    return differentiate(function(s, *arguments, **options), [s], unused=True)


@pytest.mark.parametrize("b, m, n_top", ((7, 5, 1), (1, 1, 1), (3, 2, 1), (5, 6, 0), (5, 6, 6), (0, 4, 2), (30, 11, 3)))
@pytest.mark.parametrize("steepness", (1.0, 0.1, 30.0))
def test_the_definition(b, m, n_top, steepness):
    s = lists(b, m)
    actual = evaluate(soft_rank_mass, s, n_top, steepness=steepness)
    # (Of a list of one the reference does not depend on it.)
    expected = evaluate(lambda x, n: reference(x, n, steepness=steepness) + 0 * x, s, n_top)
    assert_matches(actual, expected, 1e-12)
    torch.testing.assert_close(actual[0].sum(1), torch.full((b,), float(n_top), dtype=torch.float64))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(dtype):
    s = lists(9, 7, dtype)
    exact, plain = s.detach().double().requires_grad_(), s.detach().clone().requires_grad_()
    actual = evaluate(soft_rank_mass, s, 3)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    of_plain = evaluate(lambda x, n: reference(x.float(), n), plain, 3)
    for a, e, p in zip(actual, evaluate(reference, exact, 3), of_plain, strict=True):
        assert_as_accurate(a, e, p, dtype)


def test_lists_in_any_shape_and_strides():
    s = lists(12, 5)
    expected = soft_rank_mass(s, 2)
    torch.testing.assert_close(soft_rank_mass(s.view(3, 4, 5), 2), expected.view(3, 4, 5))
    torch.testing.assert_close(soft_rank_mass(s[0], 2), expected[0])
    torch.testing.assert_close(soft_rank_mass(s.T.contiguous().T, 2), expected)


@pytest.mark.parametrize("shape", ((3, 0), (2, 3, 0), (0,), (0, 0), (2, 0, 4)))
def test_nothing_gives_nothing(shape):
    s = torch.zeros(shape, requires_grad=True)
    mass = soft_rank_mass(s, 0)
    mass.sum().backward()
    assert mass.shape == s.grad.shape == shape


def test_hard_swaps_find_the_largest():
    s = lists(20, 9).detach()
    largest = torch.zeros_like(s).scatter_(1, s.topk(3).indices, 1.0)
    torch.testing.assert_close(soft_rank_mass(s, 3, steepness=1e8), largest, rtol=0, atol=1e-4)


def test_only_differences_matter():
    s = lists(5, 6)
    torch.testing.assert_close(soft_rank_mass(s + 3.0, 2), soft_rank_mass(s, 2))
    torch.testing.assert_close(soft_rank_mass(2 * s, 2), soft_rank_mass(s, 2, steepness=2.0))
    assert evaluate(soft_rank_mass, s, 2)[1].sum(1).abs().max() < 1e-12


def test_top_and_bottom_share_each_item():
    s = lists(5, 6)
    bottom = 1 - soft_rank_mass(s, 6 - 2)
    torch.testing.assert_close(soft_permutation(s, 1.0)[:, :, :2].sum(2), bottom)


@pytest.mark.parametrize("m", (2, 5, 8))
def test_it_is_diffsorts_network(m):
    diffsort = pytest.importorskip("diffsort")
    s = lists(6, m).detach()
    for steepness in (1.0, 10.0):
        _, matrix = diffsort.DiffSortNet("odd_even", m, steepness=steepness, distribution="cauchy")(s)
        torch.testing.assert_close(soft_permutation(s, steepness), matrix)
        torch.testing.assert_close(soft_rank_mass(s, 1, steepness=steepness), matrix[:, :, -1])


def test_autocast_is_no_matter():
    s = lists(5, 6, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_rank_mass(s, 2), soft_rank_mass(s.detach(), 2))


def test_a_second_derivative_raises():
    s = lists(5, 6)
    (gradient,) = torch.autograd.grad(soft_rank_mass(s, 2).square().sum(), s, create_graph=True)
    with pytest.raises(RuntimeError, match="soft_rank_mass: the gradient of its gradient"):
        gradient.sum().backward()


def test_compiles_as_one_graph(compiler):
    s = lists(5, 6)
    fast = torch.compile(soft_rank_mass, fullgraph=True, backend=compiler)
    assert_matches(evaluate(fast, s, 2), evaluate(soft_rank_mass, s, 2), 1e-12)


def test_gradients_under_func_and_vmap():
    s = lists(5, 6).detach()
    expected = evaluate(soft_rank_mass, s.clone().requires_grad_(), 2)[1]
    weights = torch.linspace(1, 2, 30, dtype=torch.float64).view(5, 6)
    torch.testing.assert_close(torch.func.grad(lambda x: (weights * soft_rank_mass(x, 2)).sum())(s), expected)
    torch.testing.assert_close(torch.func.vmap(lambda x: soft_rank_mass(x, 2))(s), soft_rank_mass(s, 2))


STEP = """
from ccl_fast.ops import soft_rank_mass

def prepare(b, m):
    s = torch.randn(b, m, requires_grad=True)
    return lambda: soft_rank_mass(s, 3).square().sum().backward()
"""


@pytest.mark.slow
def test_memory_is_linear_in_the_lists():
    """A matrix for each list would take 156 MiB, and what is known of all layers of all lists more than that."""
    assert peak_bytes(STEP, (4096, 100), (64, 8)) <= 64 * 2**20 + OF_TORCH_2_11


def test_errors():
    s = torch.ones(3, 4)
    for arguments, options, message in (
        (([1.0], 1), {}, r"s: expected a torch.Tensor, got list"),
        ((s.long(), 1), {}, r"s: expected float64.*int64"),
        ((torch.tensor(1.0), 1), {}, r"s: expected lists \[..., m\], got a number"),
        ((s, -1), {}, r"n_top: expected an integer >= 0, got -1"),
        ((s, 5), {}, r"n_top: expected at most 4, the length of a list, got 5"),
        ((s, 1.0), {}, r"n_top: expected an integer >= 0, got 1.0"),
        ((s, 1), {"steepness": 0}, r"steepness: expected a positive number, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_rank_mass(*arguments, **options)

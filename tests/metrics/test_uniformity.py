"""uniformity and tolerance against their definitions over all pairs."""

import math

import pytest
import torch

from ccl_fast.metrics import tolerance, uniformity
from tests.oracles.losses import assert_matches, batch, differentiate, unit

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = torch.tensor([0, 3, -1, 0, 3, 0, 2, -1, 3])


def dense_uniformity(x, t=2.0):
    return torch.pdist(unit(x.double())).pow(2).mul(-t).exp().mean().log()  # as in Wang and Isola's code


def dense_tolerance(x, labels):
    z, n = unit(x.double()), len(x)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j and labels[i] == labels[j] and labels[i] >= 0]
    return sum(z[i] @ z[j] for i, j in pairs) / len(pairs)


def check(actual, expected, x, bound=1e-10):
    leaf, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    value = actual(leaf)
    assert value.dtype == torch.promote_types(x.dtype, torch.float32)
    assert_matches(differentiate(value, [leaf]), differentiate(expected(exact), [exact]), bound)


DTYPES = ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005))


@pytest.mark.parametrize("n, d", ((2, 3), (9, 6), (70, 1)))
@pytest.mark.parametrize("t", (0.5, 2.0, 40.0))
@pytest.mark.parametrize("backend", ("reference", "blocked"))
def test_uniformity(n, d, t, backend):
    x = batch(n, 0, d, 1)[0]
    check(lambda x: uniformity(x, t=t, backend=backend), lambda x: dense_uniformity(x, t), x)


@pytest.mark.parametrize("dtype, bound", DTYPES)
def test_dtypes(dtype, bound):
    x = batch(9, 0, 6, 1, dtype=dtype)[0]
    check(uniformity, dense_uniformity, x, bound)
    check(lambda x: tolerance(x, LABELS), lambda x: dense_tolerance(x, LABELS), x, bound)


def test_extremes():
    equal = torch.ones(5, 3)
    torch.testing.assert_close(uniformity(equal), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert tolerance(equal, torch.zeros(5).int()).item() == pytest.approx(1.0)
    opposite = torch.tensor([[1.0, 0.0], [-3.0, 0.0]])
    assert uniformity(opposite).item() == pytest.approx(-8.0)
    assert tolerance(opposite, torch.zeros(2).int()).item() == pytest.approx(-1.0)


def test_many_uniform_points_reach_the_expectation():
    # E exp(-2 |x - y|^2) over the circle is exp(-4) I_0(4).
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    assert uniformity(x).item() == pytest.approx(math.log(math.exp(-4) * torch.i0(torch.tensor(4.0)).item()), abs=0.01)


def test_no_class_of_two_is_zero_with_a_graph():
    for x, labels in (
        (torch.randn(4, 3), torch.arange(4)),
        (torch.randn(4, 3), torch.full((4,), -1)),
        (torch.zeros(0, 3), torch.zeros(0).int()),
    ):
        x.requires_grad_()
        value = tolerance(x, labels)
        value.backward()
        assert value == 0 and (x.grad == 0).all()


def test_errors():
    x = torch.randn(4, 3)
    for call, message in (
        (lambda: uniformity(x[:1]), "embeddings: expected at least two rows, got 1"),
        (lambda: uniformity(x, t=0), "t: expected a positive number, got 0"),
        (lambda: uniformity(x[0]), r"embeddings: expected shape \[rows, d\]"),
        (lambda: tolerance(x, LABELS), r"labels: expected shape \[4\], got \[9\]"),
        (lambda: tolerance(x.int(), LABELS[:4]), "embeddings: expected float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

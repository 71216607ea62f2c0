"""The mass of prototypes against the sum of a dense softmax."""

import pytest
import torch

from ccl_fast.ops import assignment_mass, log_assignment_mass
from tests.oracles.losses import assert_matches, unit

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
SIZES = ((9, 5), (5, 9), (1, 4), (6, 1), (0, 3))
every_size = pytest.mark.parametrize("n, k", SIZES)


def given(n, k, d=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [unit(torch.randn(m, d, generator=generator, dtype=torch.float64)).to(dtype) for m in (n, k)]


def definition(z, centers, *, scale):
    return (scale * z @ centers.T).softmax(1).sum(0)


def evaluate(function, z, centers, scale=10.0, **options):
    wide = torch.promote_types(z.dtype, torch.float32)
    leaves = [x.detach().requires_grad_() for x in (z, centers, torch.tensor(scale, dtype=wide))]
    value = function(*leaves[:2], scale=leaves[2], **options)
    weights = torch.linspace(1, 2, len(value), dtype=value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, weights)]


@every_size
@pytest.mark.parametrize("scale", (0.5, 10.0, 300.0))
def test_the_definition(n, k, scale, backend):
    rows = given(n, k)
    actual = evaluate(assignment_mass, *rows, scale, backend=backend)
    assert_matches(actual, evaluate(definition, *rows, scale))
    torch.testing.assert_close(actual[0].sum(), torch.tensor(float(n), dtype=torch.float64))


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 4e-3)))
def test_dtypes(dtype, tolerance):
    rows = given(9, 5, dtype=dtype)
    actual = evaluate(assignment_mass, *rows)
    assert [x.dtype for x in actual] == [torch.float32, dtype, dtype, torch.float32]
    assert_matches(actual, evaluate(definition, *(x.double() for x in rows)), tolerance)


def test_the_logarithm_of_a_mass_that_vanishes():
    z, centers = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert assignment_mass(z, centers, scale=200.0)[1] == 0
    torch.testing.assert_close(log_assignment_mass(z, centers, scale=200.0), torch.tensor([0.0, -400.0]))


def test_compiles_as_one_graph(compiler):
    rows = given(9, 5)
    compiled = torch.compile(assignment_mass, fullgraph=True, backend=compiler)
    assert_matches(evaluate(compiled, *rows), evaluate(assignment_mass, *rows), 1e-12)

"""CMIMLoss against its definition and its figure."""

import math

import pytest
import torch

from ccl_fast.losses import CMIMLoss
from tests.oracles.losses import assert_matches, batch, evaluate, evaluate_oracle, learnable, reduced, unit
from tests.oracles.waves import waves

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def cmim(embeddings, *, temperature=0.1, normalize=True, reduction="mean"):
    """Of every row in turn; that of a sample alone is 0."""
    z = unit(embeddings.double()) if normalize else embeddings.double()
    views = z.ndim == 3
    rows = z.flatten(0, -2)
    losses = []
    for r in range(len(rows)):
        samples = range(len(rows))
        others = [j for j in samples if (j // 2 != r // 2 if views else j != r)]
        own = rows[r] @ rows[r ^ 1 if views else r] / temperature
        if others:
            mean = (rows[others] @ rows[r] / temperature).logsumexp(0) - math.log(len(others))
            losses.append(torch.stack((own, mean)).logsumexp(0) - own)
        else:
            losses.append(0.0 * own)
    return reduced(losses, [True] * len(losses), embeddings.shape[:-1], reduction, embeddings)


def rows(n, views=0, dtype=torch.float64):
    return batch(n, views, 6, 1, dtype=dtype)[0]


def check(z, *, temperature=0.1, backend="auto", tolerance=1e-10, **options):
    actual = evaluate(learnable(CMIMLoss, temperature, backend=backend, **options), z)
    assert_matches(actual, evaluate_oracle(cmim, z, temperature=temperature, **options), tolerance)


@pytest.mark.parametrize("n", (1, 2, 9))
@pytest.mark.parametrize("views", (0, 2))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(n, views, reduction, backend):
    check(rows(n, views), reduction=reduction, backend=backend)


@pytest.mark.parametrize("temperature, normalize", ((0.02, True), (1.0, True), (2.0, False)))
@pytest.mark.parametrize("views", (0, 2))
def test_options(temperature, normalize, views, backend):
    check(rows(9, views), temperature=temperature, normalize=normalize, backend=backend)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
@pytest.mark.parametrize("views", (0, 2))
def test_dtypes(dtype, tolerance, views):
    check(rows(9, views, dtype), tolerance=tolerance)


def test_the_figure(backend):
    loss = CMIMLoss(0.1, backend=backend)(waves(6, 4))
    torch.testing.assert_close(loss.item(), 0.01527037, rtol=0, atol=5e-9)


def test_repeating_the_negatives_makes_no_difference():
    z = rows(9, 2)
    first = CMIMLoss(reduction="none")(z)[0]
    again = CMIMLoss(reduction="none")(torch.cat((z, z[1:])))[0]
    torch.testing.assert_close(first, again)


def test_an_empty_batch_is_zero_with_a_graph():
    for shape in ((0, 6), (0, 2, 6)):
        z = torch.zeros(shape, requires_grad=True)
        loss = CMIMLoss()(z)
        loss.backward()
        assert loss == 0


def test_errors():
    for z, message in (
        (torch.ones(3), r"embeddings: expected shape \[n, d\] or \[n, 2, d\], got \[3\]"),
        (torch.ones(4, 3, 2), r"embeddings: expected shape \[n, d\] or \[n, 2, d\], got \[4, 3, 2\]"),
        (torch.ones(4, 3).long(), r"embeddings: expected float64.*int64"),
        ([[1.0]], r"embeddings: expected a torch.Tensor, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            CMIMLoss()(z)

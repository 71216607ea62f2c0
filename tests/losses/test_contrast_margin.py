"""contrast_margin against its definition and the authors' figure."""

import pytest
import torch

from ccl_fast.losses import contrast_margin
from tests.oracles.losses import assert_matches, batch, differentiate
from tests.oracles.waves import other_waves, waves
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def definition(first, second):
    z = torch.cat((first, second))
    n = len(first)
    s = z @ z.T
    samples = torch.arange(n).repeat(2)
    other = samples[:, None] != samples
    positive = torch.cat((s.diagonal(n), s.diagonal(-n)))
    hardest = s.masked_fill(~other, -torch.inf).amax(1)
    mean = s.masked_fill(~other, 0.0).sum(1) / (2 * n - 2)
    return ((positive - hardest).clamp(min=0) + torch.maximum(positive, hardest) - mean).mean()


def views(n=9, dtype=torch.float64):
    return [x.requires_grad_() for x in batch(n, 2, 6, 1, dtype=dtype)[0].unbind(1)]


@pytest.mark.parametrize("n", (2, 3, 17))
def test_the_definition(n):
    given = views(n)
    actual = differentiate(contrast_margin(*given), given)
    assert_matches(actual, differentiate(definition(*given), given), 1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(dtype):
    given = [x.detach().requires_grad_() for x in views(dtype=dtype)]
    wide = [x.detach().double().requires_grad_() for x in given]
    plain = [x.detach().float().requires_grad_() for x in given]
    actual, exact, plain = (
        differentiate(f(*x), x) for f, x in ((contrast_margin, given), (definition, wide), (definition, plain))
    )
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    for a, e, p in zip(actual, exact, plain, strict=True):
        assert_as_accurate(a, e, p, dtype)


def test_it_is_the_authors():
    torch.testing.assert_close(contrast_margin(waves(6, 4), other_waves(6, 4)).item(), 2.259039, rtol=0, atol=5e-7)


def test_it_is_symmetric_and_quadratic():
    first, second = views()
    value = contrast_margin(first, second)
    torch.testing.assert_close(contrast_margin(second, first), value)
    torch.testing.assert_close(contrast_margin(3 * first, 3 * second), 9 * value)


@pytest.mark.parametrize("n", (0, 1))
def test_without_negatives_it_is_zero(n):
    given = views(n)
    value = contrast_margin(*given)
    value.backward()
    assert value == 0


def test_errors():
    with pytest.raises(ValueError, match=r"keys: expected shape \[4, 3\] .*got \[3, 3\]"):
        contrast_margin(torch.ones(4, 3), torch.ones(3, 3))

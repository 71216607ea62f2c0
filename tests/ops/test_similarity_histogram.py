"""The histogram of similarities against counting in the whole matrix."""

import numpy as np
import pytest
import torch

from ccl_fast.ops import similarity_histogram
from tests.oracles.losses import unit
from tests.oracles.pairs import every_choice, every_size, pairs

pytestmark = pytest.mark.usefixtures("one_thread")
tiny = pytest.mark.usefixtures("several_tiles")


def counts(given, bins, low=-1.0, high=1.0):
    x = (given.q.double() @ given.keys.double().T)[given.mask()].clamp(low, high)
    return np.histogram(x.numpy(), bins, (low, high))[0].tolist()


@tiny
@every_size
@every_choice
@pytest.mark.parametrize("bins", (1, 7, 50))
def test_the_definition(n, m, candidates, bins):
    given = pairs(n, m, candidates)
    given.q, given.k = unit(given.q), None if m is None else unit(given.k)
    actual = similarity_histogram(given.q, given.k, bins=bins, **given.among)
    assert actual.dtype == torch.int64 and actual.tolist() == counts(given, bins)


@tiny
def test_what_lies_outside_counts_at_the_ends():
    given = pairs(9, 30)
    actual = similarity_histogram(given.q, given.k, bins=4, range=(-0.5, 0.5))
    assert actual.sum() == 270 and actual[0] > 50 and actual[-1] > 50
    assert actual.tolist() == counts(given, 4, -0.5, 0.5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(dtype):
    given = pairs(9, 30, dtype=dtype)
    assert similarity_histogram(given.q, given.k, bins=5, range=(-4, 4)).tolist() == counts(given, 5, -4, 4)


def test_more_pairs_in_a_bin_than_float32_counts():
    # 33 rows of 600,000 ones: an odd number beyond 2^24 in one block of rows.
    q, k = torch.ones(33, 1), torch.ones(599_999, 1)
    assert similarity_histogram(q, k, bins=2, range=(0, 2)).tolist() == [0, 33 * 599_999]
    # Edges that float32 does not have.
    assert similarity_histogram(q, k, bins=2, range=(-0.1, 0.9)).tolist() == [0, 33 * 599_999]


def test_compiles_as_one_graph(compiler):
    given = pairs(9, 30)
    compiled = torch.compile(lambda q, k: similarity_histogram(q, k, bins=5), fullgraph=True, backend=compiler)
    assert torch.equal(compiled(given.q, given.k), similarity_histogram(given.q, given.k, bins=5))


@pytest.mark.parametrize(
    "options, message",
    (
        ({"bins": 0}, r"bins: expected a positive integer, got 0"),
        ({"bins": 2.0}, r"bins: expected a positive integer, got 2.0"),
        ({"bins": 2, "range": (1.0, 1.0)}, r"range: expected two increasing numbers, got \(1.0, 1.0\)"),
        ({"bins": 2, "candidates": "same_id"}, r"q_ids: expected integers"),
    ),
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        similarity_histogram(torch.ones(3, 2), **options)

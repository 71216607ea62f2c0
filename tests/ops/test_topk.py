"""The most similar keys against a sort of the whole matrix."""

import pytest
import torch

from ccl_fast.ops import streaming_topk
from tests.oracles.pairs import every_choice, every_size, pairs

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def definition(given, topk, ceiling=torch.inf):
    x = (given.q.double() @ given.keys.double().T).masked_fill(~given.mask(), -torch.inf)
    x = x.masked_fill(x > (ceiling[:, None] if getattr(ceiling, "ndim", 0) else ceiling), -torch.inf)
    values, indices = x.sort(dim=1, descending=True)
    padding = max(topk - x.shape[1], 0)
    values = torch.nn.functional.pad(values, (0, padding), value=-torch.inf)[:, :topk]
    indices = torch.nn.functional.pad(indices, (0, padding), value=-1)[:, :topk]
    return values, indices.masked_fill(values == -torch.inf, -1)


@every_size
@every_choice
@pytest.mark.parametrize("topk", (1, 3, 8))
def test_the_definition(n, m, candidates, topk):
    given = pairs(n, m, candidates)
    values, indices = streaming_topk(given.q, given.k, topk=topk, **given.among)
    expected, whose = definition(given, topk)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(indices, whose)


@every_size
@every_choice
@pytest.mark.parametrize("topk", (1, 3))
def test_a_ceiling_of_similarities(n, m, candidates, topk):
    given = pairs(n, m, candidates)
    for ceiling in (0.5, torch.tensor(0.5), torch.linspace(-3, 3, n, dtype=torch.float64), -1e9):
        values, indices = streaming_topk(given.q, given.k, topk=topk, ceiling=ceiling, **given.among)
        expected, whose = definition(given, topk, ceiling)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(indices, whose)


def test_what_equals_the_ceiling_counts():
    keys = torch.tensor([[1.0], [2.0], [3.0]])
    values, indices = streaming_topk(torch.ones(1, 1), keys, topk=2, ceiling=2.0)
    assert values.tolist() == [[2, 1]] and indices.tolist() == [[1, 0]]


@pytest.mark.parametrize("m", (64, 1000, 1023, 4096))
@pytest.mark.parametrize("topk", (1, 5, 40))
def test_many_keys(m, topk):
    # Enough for them to be judged in groups, also with a remainder.
    given = pairs(6, m)
    values, indices = streaming_topk(given.q, given.k, topk=topk)
    expected, whose = definition(given, topk)
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(indices, whose)


def test_the_best_may_all_be_neighbours():
    keys = torch.zeros(640, 2, dtype=torch.float64)
    keys[32:40, 0] = torch.arange(1.0, 9.0)
    values, indices = streaming_topk(torch.tensor([[1.0, 0.0]]).double(), keys, topk=8)
    assert values.tolist() == [[8, 7, 6, 5, 4, 3, 2, 1]] and indices.tolist() == [list(range(39, 31, -1))]


def test_equal_keys_are_all_found():
    keys = torch.ones(200, 3)
    values, indices = streaming_topk(keys[:4], keys, topk=7)
    assert (values == 3).all() and all(len(set(row)) == 7 for row in indices.tolist())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(dtype):
    given = pairs(9, 500, dtype=dtype)
    values, indices = streaming_topk(given.q, given.k, topk=3)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), definition(given, 3)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((given.q.double()[:, None] * given.k.double()[indices]).sum(2), values.double())


def test_autocast_rounds_the_rows():
    given = pairs(9, 30, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values, _ = streaming_topk(given.q, given.k, topk=3)
    expected, _ = streaming_topk(given.q.bfloat16(), given.k.bfloat16(), topk=3)
    assert torch.equal(values, expected)


def test_no_gradient_flows():
    given = pairs(9, 30)
    assert not streaming_topk(given.q.requires_grad_(), given.k, topk=3)[0].requires_grad


def test_compiles_as_one_graph(compiler):
    given = pairs(9, 30)
    expected = streaming_topk(given.q, given.k, topk=3)
    actual = torch.compile(streaming_topk, fullgraph=True, backend=compiler)(given.q, given.k, topk=3)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("topk", (0, -1, 2.0, True, None))
def test_topk_must_be_positive(topk):
    given = pairs(3, 4)
    with pytest.raises(ValueError, match=rf"topk: expected a positive integer, got {topk}"):
        streaming_topk(given.q, given.k, topk=topk)


def test_errors_name_the_argument():
    q, k = torch.ones(3, 2), torch.ones(4, 2)
    for arguments, options, message in (
        ((q.long(), k), {}, r"q: expected float64.*int64"),
        ((q, k[:, :1]), {}, r"k: expected shape \[rows, 2\], got \[4, 1\]"),
        ((q, k), {"candidates": "others"}, r"candidates: .*'others'"),
        ((q, k), {"ceiling": torch.ones(2)}, r"ceiling: expected shape \[3\], got \[2\]"),
        ((q, k), {"ceiling": "1"}, r"ceiling: expected a number or a tensor of one element, got '1'"),
        ((q, k), {"candidates": "same_id"}, r"q_ids: expected integers \[n\]"),
    ):
        with pytest.raises(ValueError, match=message):
            streaming_topk(*arguments, topk=1, **options)

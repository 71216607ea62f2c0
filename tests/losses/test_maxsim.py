"""MaxSimLoss against its definition, and the clusters that make its vectors."""

import pytest
import torch

from ccl_fast.clustering import pool_by_clusters
from ccl_fast.losses import MaxSimLoss
from ccl_fast.ops import max_by_id
from tests.oracles.losses import assert_matches, differentiate, infonce, learnable, unit
from tests.oracles.matrices import maxsim
from tests.oracles.waves import waves

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
IDS = {
    "in order": ([0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 2, 2, 2, 2]),
    "in no order": ([2, 0, 1, 1, 0, 2], [2, 1, 0, 0, 2, 1, 1, 2]),
    "padding": ([0, 0, -1, 1, 1, -1], [0, 1, 1, -1, 0, -1, 1, -1]),
    "a query without a document": ([0, 1, 2, 3, 3, 3], [0, 0, 0, 3, 3, 1, 1, 1]),
    "a document without a query": ([0, 0, 0, 2, 2, 2], [0, 1, 2, 0, 1, 2, 3, 3]),
    "one of both": ([0] * 6, [0] * 8),
}


def given(ids, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(len(x), 5, generator=generator, dtype=torch.float64).to(dtype) for x in IDS[ids]]
    x, y = (torch.tensor(ids) for ids in IDS[ids])
    return *rows, x, y, 1 + max(max(ids) for ids in IDS[ids])


def check(ids, dtype=torch.float64, tolerance=1e-10, temperature=0.3, **options):
    queries, keys, x, y, number = given(ids, dtype)
    module = learnable(MaxSimLoss, temperature, **options)
    leaves = [rows.clone().requires_grad_() for rows in (queries, keys)]
    value = module(*leaves, query_ids=x, key_ids=y)
    actual = differentiate(value, [*leaves, *module.parameters()])
    exact = [rows.double().requires_grad_() for rows in (queries, keys)]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = maxsim(*exact, x, y, number, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature], unused=True), tolerance)


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(ids, reduction):
    check(ids, reduction=reduction)


@pytest.mark.parametrize("temperature, normalize", ((1.0, True), (0.02, True), (2.0, False)))
def test_options(temperature, normalize):
    check("in no order", temperature=temperature, normalize=normalize)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)))
def test_dtypes(dtype, tolerance):
    check("in no order", dtype, tolerance)


def test_the_figures():
    queries, keys = waves(5, 4), waves(9, 4, 1.1, 0.4)
    of = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0] * 4 + [1] * 5)
    similarity = max_by_id(unit(queries), unit(keys), of[1])
    assert similarity[:2, 0].sum().item() == pytest.approx(0.931206, abs=1e-6)
    assert MaxSimLoss()(queries, keys, query_ids=of[0], key_ids=of[1]).item() == pytest.approx(0.815758, abs=1e-6)


def test_of_single_vectors_it_is_infonce():
    queries, keys, *_ = given("in order")
    keys, each = keys[:6], torch.arange(6)
    loss = MaxSimLoss(temperature=0.1)(queries, keys, query_ids=each, key_ids=each)
    torch.testing.assert_close(loss, infonce(queries, keys, symmetric=False))


def test_more_sets_than_occur_change_nothing():
    queries, keys, x, y, number = given("in no order")
    loss = MaxSimLoss()(queries, keys, query_ids=x, key_ids=y)
    assert torch.equal(MaxSimLoss()(queries, keys, query_ids=x, key_ids=y, num_ids=number + 3), loss)


def test_nothing_is_zero_with_a_graph():
    queries, keys = (torch.zeros(n, 5, requires_grad=True) for n in (0, 3))
    none, padding = torch.zeros(0, dtype=torch.int64), torch.full((3,), -1)
    loss = MaxSimLoss()(queries, keys, query_ids=none, key_ids=padding)
    loss.backward()
    assert loss == 0 and queries.grad is not None and (keys.grad == 0).all()


def test_errors():
    queries, keys, x, y, _ = given("in order")
    for arguments, ids, message in (
        ((queries, keys[:, :2]), (x, y), r"keys: expected shape \[rows, 5\], got \[8, 2\]"),
        ((queries, keys), (x[1:], y), r"query_ids: expected shape \[6\], got \[5\]"),
        ((queries, keys), (x, y.float()), r"key_ids: expected integers, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            MaxSimLoss()(*arguments, query_ids=ids[0], key_ids=ids[1])
    with pytest.raises(IndexError, match=r"key_ids: expected ids from -1 to 1 \(there are 2 sets\), got 0 to 2"):
        MaxSimLoss()(queries, keys, query_ids=x.clamp(max=1), key_ids=y, num_ids=2)


# ---- the means of a sequence's clusters ----


def test_means_of_the_clusters_of_each_sequence():
    generator = torch.Generator().manual_seed(0)
    sizes = (40, 3, 25, 8, 1)
    x = torch.randn(sum(sizes), 6, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    ids = ids[torch.randperm(len(ids), generator=generator)]
    means, of = pool_by_clusters(x, ids, 8)
    assert of.tolist() == [i for i, size in enumerate(sizes) for _ in range(min(size, 8))]
    # What a mean depends on is its cluster.
    shares = torch.stack([torch.autograd.grad(mean.sum(), x, retain_graph=True)[0][:, 0] for mean in means])
    cluster = shares.argmax(0)
    is_own = cluster == torch.arange(len(means))[:, None]
    torch.testing.assert_close(shares, is_own / is_own.sum(1, keepdim=True).double())
    torch.testing.assert_close(means, shares @ x)
    assert torch.equal(of[cluster], ids)
    directions = unit(is_own.double() @ unit(x.detach()))
    similarity = (unit(x.detach()) @ directions.T).masked_fill(ids[:, None] != of, -2.0)
    assert torch.equal(similarity.argmax(1), cluster)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_means_of_many_vectors_of_half_precision(dtype):
    """More of them than bfloat16 counts to, with a sum that float16 does not have."""
    x = (300 + torch.randn(3000, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    means, _ = pool_by_clusters(x, torch.zeros(3000).long(), 1)
    torch.testing.assert_close(means, x.float().mean(0, keepdim=True).to(dtype))


def test_padding_is_left_out_and_half_precision_stays():
    x, ids = torch.randn(30, 4).bfloat16(), torch.arange(30) % 4 - 1
    means, of = pool_by_clusters(x, ids, 3)
    assert means.dtype == torch.bfloat16 and of.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert pool_by_clusters(x, torch.full((30,), -1), 3)[0].shape == (0, 4)
    with pytest.raises(ValueError, match=r"n_clusters: expected a positive integer, got 0"):
        pool_by_clusters(x, ids, 0)

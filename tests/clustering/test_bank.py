"""BECLR's bank and its transport of prototypes: against plain loops, and the authors' algorithm over the whole plan."""

import pytest
import torch

from ccl_fast import KMeans
from ccl_fast.clustering import ClusteredBank, transport_prototypes
from ccl_fast.errors import NotFittedError
from ccl_fast.ops import sinkhorn
from tests.oracles.losses import unit

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def directions(n, seed=0, groups=4, d=6):
    """Rows about some directions."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(groups, d, generator=torch.Generator().manual_seed(9))
    of = torch.randint(groups, (n,), generator=generator)
    return centers[of] + 0.3 * torch.randn(n, d, generator=generator)


def full_bank(**options):
    bank = ClusteredBank(6, size=60, n_clusters=4, **options)
    for seed in range(2):
        bank.update(directions(30, seed))
    return bank


def test_the_first_clusters_are_those_of_k_means():
    bank, rows = full_bank(), torch.cat((directions(30, 0), directions(30, 1)))
    torch.testing.assert_close(bank.features, unit(rows))
    kmeans = KMeans(4, metric="cosine").fit(bank.features)
    assert torch.equal(bank.labels, kmeans.labels_)
    torch.testing.assert_close(bank.centers, kmeans.cluster_centers_)


@pytest.mark.parametrize("momentum", (0.0, 0.9))
def test_a_batch_takes_the_place_of_the_oldest_by_the_plan(momentum):
    bank = full_bank(momentum=momentum)
    labels, centers = bank.labels.clone(), bank.centers.clone()
    for seed in (2, 3):  # rows 0 to 39, then 40 to 59 and 0 to 19
        new = unit(directions(40, seed))
        u, v = sinkhorn(new, unit(centers), scale=20.0, iterations=10)
        plan = (20 * new @ unit(centers).T + u[:, None] + v).exp()
        places = (torch.arange(40) + (seed - 2) * 40) % 60
        labels[places] = plan.argmax(1)
        bank.update(new)
        torch.testing.assert_close(bank.features[places], new)
        assert torch.equal(bank.labels, labels)
        for k in range(4):
            centers[k] = momentum * centers[k] + (1 - momentum) * bank.features[labels == k].mean(0)
        torch.testing.assert_close(bank.centers, centers)


def test_equal_claims_part_a_batch_that_one_centre_would_take():
    bank = full_bank()
    new = unit(bank.centers[:1] + 0.05 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    assert (new @ unit(bank.centers).T).argmax(1).unique().tolist() == [0]
    bank.update(new)
    assert bank.labels[:40].bincount(minlength=4).min() > 0


@pytest.mark.parametrize("k", (1, 3, 30))
def test_neighbors_are_of_the_nearest_centres_cluster_or_of_all(k):
    bank, new = full_bank(), directions(20, 5)
    found = bank.neighbors(new, k)
    for z, rows in zip(unit(new), found, strict=True):
        nearest = (unit(bank.centers) @ z).argmax()
        members = bank.features[bank.labels == nearest]
        pool = members if len(members) >= k else bank.features
        torch.testing.assert_close(rows, pool[(pool @ z).argsort(descending=True)[:k]])


def test_autocast_changes_nothing():
    found = []
    for enabled in (False, True):
        bank, new = full_bank(), directions(40, 5)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            bank.update(new)
            found.append((bank.labels, bank.neighbors(new, 7), transport_prototypes(new[:4], new)))
    for plain, under_autocast in zip(*found, strict=True):
        assert torch.equal(plain, under_autocast)


def test_the_state_is_the_banks():
    bank, again = full_bank(), ClusteredBank(6, size=60, n_clusters=4)
    again.load_state_dict(bank.state_dict())
    for each in (bank, again):
        each.update(directions(7, 3))
    assert all(torch.equal(a, b) for a, b in zip(bank.state_dict().values(), again.state_dict().values(), strict=True))


def test_errors_of_the_bank():
    with pytest.raises(ValueError, match=r"n_clusters: expected at most size=3, got 4"):
        ClusteredBank(6, size=3, n_clusters=4)
    with pytest.raises(ValueError, match=r"momentum: expected a number from 0, below 1, got 1"):
        ClusteredBank(6, momentum=1)
    bank = ClusteredBank(6, size=60, n_clusters=4)
    with pytest.raises(ValueError, match=r"embeddings: expected at most 60 rows, got 61"):
        bank.update(directions(61))
    with pytest.raises(NotFittedError, match=r"this ClusteredBank has 0 of its 60 rows yet"):
        bank.neighbors(directions(3))
    with pytest.raises(ValueError, match=r"k: expected at most 60, the rows of the bank, got 61"):
        full_bank().neighbors(directions(3), 61)


# ---- the transport of prototypes ----


def by_the_whole_plan(support, queries, epsilon, iterations):
    """As the authors write it, without the 1e-8 that they add to the masses."""
    cost = (support[:, None] - queries).square().sum(2)
    cost = cost / cost.max() / epsilon
    u, v = torch.zeros(len(support)).double(), torch.zeros(len(queries)).double()
    for _ in range(iterations):
        u = -torch.tensor(len(support)).log() - (v - cost).logsumexp(1)
        v = -torch.tensor(len(queries)).log() - (u[:, None] - cost).logsumexp(0)
    plan = (u[:, None] + v - cost).exp()
    return plan / plan.sum(1, keepdim=True) @ queries


@pytest.mark.parametrize("k, n", ((5, 30), (3, 2), (1, 7), (4, 1)))
@pytest.mark.parametrize("iterations", (1, 20))
@pytest.mark.parametrize("epsilon", (0.05, 0.5))
def test_prototypes_go_where_the_plan_takes_them(k, n, iterations, epsilon):
    support, queries = 2 * directions(k).double(), directions(n, 1).double()
    expected = support
    for passes in (1, 2) if n > 1 else (1,):  # then all are at the only query
        expected = by_the_whole_plan(expected, queries, epsilon, iterations)
        found = transport_prototypes(support, queries, epsilon=epsilon, iterations=iterations, passes=passes)
        torch.testing.assert_close(found, expected)


def test_of_halves_it_is_float32s_and_of_one_point_that_point():
    support, queries = directions(5), directions(30, 1)
    found = transport_prototypes(support.bfloat16(), queries.bfloat16())
    assert found.dtype == torch.float32
    expected = transport_prototypes(support.bfloat16().float(), queries.bfloat16().float())
    torch.testing.assert_close(found, expected)
    point = torch.ones(3, 2)
    assert torch.equal(transport_prototypes(point, point[:2]), point)


@pytest.mark.parametrize("scale, shift", ((1.0, 300.0), (1e25, 0.0), (1e-25, 0.0)))
def test_where_the_points_are_and_in_which_unit_does_not_count(scale, shift):
    support, queries = directions(5), directions(30, 1)
    found = (transport_prototypes(scale * support + shift, scale * queries + shift) - shift) / scale
    torch.testing.assert_close(found, transport_prototypes(support, queries), rtol=0, atol=1e-3)


def test_errors_of_the_transport():
    support, queries = directions(5), directions(30, 1)
    for arguments, message in (
        ((support, queries[:, :3]), r"queries: expected shape \[rows, 6\], got \[30, 3\]"),
        ((support[:0], queries), r"support: expected at least one row, got none"),
        ((support, queries.double()), r"queries: expected dtype torch.float32 .*got torch.float64"),
        ((support, queries * torch.inf), r"queries: expected finite values"),
    ):
        with pytest.raises(ValueError, match=message):
            transport_prototypes(*arguments)
    with pytest.raises(ValueError, match=r"passes: expected a positive integer, got 0"):
        transport_prototypes(support, queries, passes=0)

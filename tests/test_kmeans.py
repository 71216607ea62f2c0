"""KMeans against scikit-learn from the same start, and where k-means implementations go wrong."""

import pytest
import torch
from sklearn.cluster import KMeans as Oracle
from torch.nn import functional as F

from ccl_fast.clustering import KMeans, kmeans


def blobs(seed: int, n: int = 400, d: int = 7, k: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(k, d, generator=generator, dtype=torch.float64)
    which = torch.randint(k, (n,), generator=generator)
    return centers[which] + torch.randn(n, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(8))
def test_equals_scikit_learn_from_the_same_start(seed):
    x = blobs(seed)
    ours = KMeans(11, init=x[:11], tol=0).fit(x)
    oracle = Oracle(11, init=x[:11].numpy(), n_init=1, tol=0).fit(x.numpy())
    torch.testing.assert_close(ours.cluster_centers_, torch.from_numpy(oracle.cluster_centers_))
    assert ours.labels_.tolist() == oracle.labels_.tolist()
    assert ours.inertia_ == pytest.approx(oracle.inertia_)
    new = blobs(seed + 100)
    assert ours.predict(new).tolist() == oracle.predict(new.numpy()).tolist()
    torch.testing.assert_close(ours.transform(new), torch.from_numpy(oracle.transform(new.numpy())))


@pytest.mark.parametrize("seed", range(3))
def test_empty_cluster_takes_the_farthest_sample_as_in_scikit_learn(seed):
    x = blobs(seed)
    init = x[:5].clone()
    init[3] = 1e3  # nearest to nothing
    ours = KMeans(5, init=init, max_iter=1).fit(x)
    oracle = Oracle(5, init=init.numpy(), n_init=1, max_iter=1).fit(x.numpy())
    torch.testing.assert_close(ours.cluster_centers_, torch.from_numpy(oracle.cluster_centers_))
    assert ours.labels_.bincount(minlength=5).min() > 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("max_iter", [1, 2, 100])
def test_labels_and_inertia_belong_to_the_returned_centers(metric, max_iter):
    x = blobs(0)
    model = KMeans(9, metric=metric, max_iter=max_iter, seed=3).fit(x)
    assert model.n_iter_ <= max_iter
    assert model.labels_.equal(model.predict(x))
    distance = model.transform(x).amin(1)
    inertia = distance.square().sum() if metric == "euclidean" else distance.sum()
    assert model.inertia_ == pytest.approx(inertia.item())


def test_cosine_centers_are_the_mean_directions():
    x = blobs(1) * torch.rand(400, 1, dtype=torch.float64)
    model = KMeans(9, metric="cosine", tol=0).fit(x)
    unit = F.normalize(x, dim=1)
    expected = torch.stack([F.normalize(unit[model.labels_ == c].mean(0), dim=0) for c in range(9)])
    torch.testing.assert_close(model.cluster_centers_, expected)
    torch.testing.assert_close(model.transform(x), 1 - unit @ expected.T)
    assert model.labels_.equal(KMeans(9, metric="cosine", tol=0).fit(1000 * x).labels_)  # lengths do not count


def test_cosine_keeps_the_center_of_a_cluster_without_direction():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    center = KMeans(1, metric="cosine", init=torch.tensor([[0.0, 2.0]])).fit(x).cluster_centers_
    assert center.tolist() == [[0, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_plus_plus_never_draws_a_row_twice(seed):
    x = torch.arange(6.0)[:, None].repeat_interleave(4, dim=0)  # six values, four copies of each
    generator = torch.Generator().manual_seed(seed)
    few = KMeans(6)._plus_plus(x, generator)
    assert few.flatten().sort().values.tolist() == [0, 1, 2, 3, 4, 5]
    x = torch.tensor([[0.0], [1.0], [1.0], [1.0], [1.0], [1.0]])
    every = KMeans(6)._plus_plus(x, generator)  # copies of drawn rows, when nothing else is left
    assert every.flatten().sort().values.equal(x.flatten())


def test_fewer_distinct_rows_than_clusters():
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(10, 1)
    model = KMeans(5).fit(x)
    assert model.inertia_ == 0
    assert model.cluster_centers_.isfinite().all()
    assert len(model.labels_.unique()) == 2


def test_one_cluster_per_row():
    x = blobs(2, n=20)
    model = KMeans(20).fit(x)
    assert model.inertia_ == pytest.approx(0, abs=1e-10)
    assert sorted(model.labels_.tolist()) == list(range(20))


def test_blocks_of_rows_change_nothing(monkeypatch):
    x = blobs(3)
    whole = KMeans(9).fit(x)
    monkeypatch.setattr(kmeans, "BLOCK_ENTRIES", 50)
    blocked = KMeans(9).fit(x)
    assert whole.labels_.equal(blocked.labels_)
    torch.testing.assert_close(whole.cluster_centers_, blocked.cluster_centers_)


def test_far_from_the_origin_float32_keeps_its_digits():
    x = blobs(4).float()
    expected = KMeans(9, init=x[:9]).fit(x).labels_
    assert KMeans(9, init=x[:9] + 2048).fit(x + 2048).labels_.equal(expected)


def test_half_precision_does_not_overflow():
    x = (100 * blobs(5)).half()  # squared norms beyond 65504
    model = KMeans(9, init=x[:9]).fit(x)
    assert model.cluster_centers_.dtype == torch.float32
    assert model.labels_.equal(KMeans(9, init=x[:9].float()).fit(x.float()).labels_)


def test_more_starts_are_never_worse_and_the_best_is_kept():
    x = blobs(6)
    inertias = [KMeans(9, n_init=n, seed=1).fit(x).inertia_ for n in (1, 2, 4, 8)]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < inertias[0]


def test_seeded_and_private():
    x = blobs(7)
    state = torch.get_rng_state()
    first, again, other = (KMeans(9, seed=seed, max_iter=1).fit(x) for seed in (5, 5, 6))
    assert torch.get_rng_state().equal(state)
    assert first.cluster_centers_.equal(again.cluster_centers_)
    assert not first.cluster_centers_.equal(other.cluster_centers_)


def test_warm_start_from_its_own_result_stops_at_once():
    x = blobs(8)
    cold = KMeans(9, tol=0).fit(x)
    warm = KMeans(9, tol=0, init=cold.cluster_centers_).fit(x)
    assert warm.n_iter_ == 1
    assert warm.labels_.equal(cold.labels_)


def test_leaves_input_and_autograd_alone():
    x = blobs(9).requires_grad_()
    before = x.detach().clone()
    model = KMeans(9, metric="cosine").fit(x)
    assert x.detach().equal(before)
    assert not model.cluster_centers_.requires_grad


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"n_clusters": 0}, "n_clusters"),
        ({"n_clusters": 2.5}, "n_clusters"),
        ({"metric": "manhattan"}, "metric"),
        ({"init": "random"}, "init"),
        ({"max_iter": 0}, "max_iter"),
        ({"n_init": 0}, "n_init"),
        ({"tol": -1}, "tol"),
        ({"tol": float("nan")}, "tol"),
    ],
)
def test_wrong_settings(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        KMeans(**{"n_clusters": 3} | arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3), r"^x: expected at least n_clusters=3 rows, got 2"),
        (torch.zeros(0, 3), r"^x: expected at least n_clusters=3 rows, got 0"),
        (torch.zeros(9), r"^x: expected .*, got torch.float32 \[9\]"),
        (torch.zeros(9, 3, dtype=torch.int64), r"^x: expected .*, got torch.int64"),
        ([[1.0, 2.0]], r"^x: expected .*, got list"),
        (torch.full((9, 3), float("nan")), r"^x: expected finite"),
        (torch.full((9, 3), float("inf")), r"^x: expected finite"),
    ],
)
def test_wrong_data(x, message):
    with pytest.raises(ValueError, match=message):
        KMeans(3).fit(x)


def test_wrong_centers_and_wrong_use():
    x = blobs(0)
    with pytest.raises(ValueError, match=r"^init: expected shape \[3, 7\], got \[4, 7\]"):
        KMeans(3, init=x[:4]).fit(x)
    with pytest.raises(ValueError, match=r"^init: expected finite"):
        KMeans(3, init=x[:3] * float("nan")).fit(x)
    with pytest.raises(RuntimeError, match="call fit first"):
        KMeans(3).predict(x)
    with pytest.raises(ValueError, match=r"^x: expected 7 features as in fit, got 2"):
        KMeans(3).fit(x).predict(x[:, :2])

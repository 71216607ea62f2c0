"""KMeans against scikit-learn from the same start, and where k-means implementations go wrong."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans as Oracle
from sklearn.cluster import kmeans_plusplus
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ccl_fast.clustering import KMeans
from ccl_fast.clustering.data import Data
from ccl_fast.clustering.lloyd import LateFlag
from ccl_fast.clustering.rejection_sampling import MAX_CANDIDATES, plain_k_means_plus_plus, plus_plus_rows
from ccl_fast.clustering.seeding import greedy_rows, k_means_plus_plus
from ccl_fast.ops.backends import BACKENDS
from ccl_fast.ops.kmeans import assign_blocked
from tests.ops.kmeans_cases import blobs


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
    ours = KMeans(5, init=init, max_iter=1, empty_cluster="farthest").fit(x)
    oracle = Oracle(5, init=init.numpy(), n_init=1, max_iter=1).fit(x.numpy())
    torch.testing.assert_close(ours.cluster_centers_, torch.from_numpy(oracle.cluster_centers_))
    assert ours.labels_.bincount(minlength=5).min() > 0


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("max_iter", [1, 2, 100])
def test_labels_and_inertia_belong_to_the_returned_centers(metric, max_iter):
    x = blobs(0)
    model = KMeans(9, metric=metric, max_iter=max_iter, random_state=3).fit(x)
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


PLUS_PLUS = pytest.mark.parametrize("plus_plus", [k_means_plus_plus, plain_k_means_plus_plus], ids=["greedy", "plain"])


def start(seeding, x: torch.Tensor, k: int, seed: int, **options) -> torch.Tensor:
    options = {"weights": None, "metric": "euclidean", "batch_size": None} | options
    data = Data(x[None], device=x.device, backend="auto", **options)
    return seeding(data, k, [torch.Generator().manual_seed(seed)])[0]


@PLUS_PLUS
@pytest.mark.parametrize("seed", range(5))
def test_plus_plus_never_draws_a_row_twice(plus_plus, seed):
    x = torch.arange(6.0)[:, None].repeat_interleave(4, dim=0)  # six values, four copies of each
    assert start(plus_plus, x, 6, seed).flatten().sort().values.tolist() == [0, 1, 2, 3, 4, 5]
    x = torch.tensor([[0.0], [1.0], [1.0], [1.0], [1.0], [1.0]])
    every = start(plus_plus, x, 6, seed)  # copies of drawn rows, when nothing else is left
    assert every.flatten().sort().values.equal(x.flatten())
    weights = torch.tensor([[1.0, 0.5, 0.0, 0.0, 1.0, 0.0]])  # of those that have a weight
    assert start(plus_plus, x, 3, seed, weights=weights).flatten().sort().values.tolist() == [0, 1, 1]
    x = torch.eye(4).repeat(5, 1) * torch.rand(20, 1)  # four directions
    directions = start(plus_plus, x, 4, seed, metric="cosine")
    assert directions.sum(0).tolist() == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize("rows_of", [greedy_rows, plus_plus_rows], ids=["greedy", "plain"])
@pytest.mark.parametrize("seed", range(5))
def test_rows_of_one_direction_are_different_rows(rows_of, seed):
    # One direction, up to rounding: ten rows of ten lengths are ten different rows.
    x = torch.randn(1, 9, dtype=torch.float64) * torch.arange(1.0, 11.0)[:, None]
    data = Data(x[None], None, "cosine", None, x.device, "auto")
    rows = rows_of(data, torch.ones(10, dtype=torch.float64), 10, torch.Generator().manual_seed(seed))
    assert rows.sort().values.tolist() == list(range(10))


def chance_by_definition(x: torch.Tensor, weights: torch.Tensor, candidates: int) -> torch.Tensor:
    """The probability of every ordered triple of rows, with so many candidates for each centre after the first."""
    n, distance = len(x), torch.cdist(x, x).square()

    def next_center(nearest):
        """The probability of every row to come next, when the rows are so far from the centres."""
        drawn, chance = weights * nearest / (weights * nearest).sum(), torch.zeros(n, dtype=torch.float64)
        left = (weights * torch.minimum(distance, nearest)).sum(1)  # if a row were a centre too
        for rows in itertools.product(range(n), repeat=candidates):
            chance[min(rows, key=lambda row: left[row])] += drawn[list(rows)].prod()
        return chance

    chances = torch.zeros(n, n, n, dtype=torch.float64)
    for first in range(n):
        second = next_center(distance[first])
        for row in range(n):
            third = next_center(torch.minimum(distance[first], distance[row]))
            chances[first, row] = weights[first] / weights.sum() * second[row] * third
    return chances


@pytest.mark.parametrize("draws", [1000, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("plus_plus, candidates", [(k_means_plus_plus, 3), (plain_k_means_plus_plus, 1)])
def test_plus_plus_has_the_distribution_of_its_definition(plus_plus, candidates, weighted, draws):
    x = torch.tensor([[0.0], [1.0], [3.0], [7.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 4.0, 2.0, 0.5], dtype=torch.float64) if weighted else torch.ones(4).double()
    expected = chance_by_definition(x, weights, candidates)
    assert expected.sum() == pytest.approx(1)
    seen = torch.zeros(4, 4, 4)
    for seed in range(draws):
        rows = start(plus_plus, x, 3, seed, weights=weights[None] if weighted else None).flatten()
        seen[tuple((rows[:, None] == x[:, 0]).nonzero()[:, 1].tolist())] += 1
    possible = draws * expected > 1e-3
    assert (seen[~possible] == 0).all()
    likely = draws * expected > 1
    observed = torch.cat([seen[likely], seen[~likely].sum()[None]])
    predicted = torch.cat([draws * expected[likely], (draws * expected[~likely]).sum()[None].clamp(min=0.1)])
    chi_square = ((observed - predicted).square() / predicted).sum()
    assert chi_square < 60  # at most 24 possibilities: expected 23, above 60 once in 40,000


def separated_blobs(k: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = 20 * torch.randn(k, 8, generator=generator)
    return (centers[:, None] + torch.randn(k, 25, 8, generator=generator)).flatten(0, 1)


def test_the_precision_of_float32_products_does_not_matter_to_the_start():
    x = separated_blobs()
    expected = start(k_means_plus_plus, x, 40, 0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert start(k_means_plus_plus, x, 40, 0).equal(expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_separated_blobs_are_found(metric):
    x = separated_blobs()
    if metric == "cosine":
        x = F.normalize(x) * torch.rand(len(x), 1)
    inertias = torch.tensor([KMeans(40, metric=metric, random_state=seed).fit(x).inertia_ for seed in range(15)])
    assert inertias.median() < 1.03 * inertias.min()
    plain = [KMeans(40, metric=metric, init="plain-k-means++", random_state=seed).fit(x).inertia_ for seed in range(15)]
    assert torch.tensor(plain).min() > 0.97 * inertias.min() and torch.tensor(plain).median() > inertias.median()


def test_plus_plus_with_more_centers_than_candidates_is_as_good_as_scikit_learns():
    x = blobs(0, n=3000, d=5, k=400)
    k = 2 * MAX_CANDIDATES
    ours = [KMeans(k, init="plain-k-means++", random_state=seed, max_iter=1).fit(x).inertia_ for seed in range(5)]
    one_trial = [
        Oracle(k, init=kmeans_plusplus(x.numpy(), k, random_state=seed, n_local_trials=1)[0], n_init=1, max_iter=1)
        .fit(x.numpy())
        .inertia_
        for seed in range(5)
    ]
    assert sum(ours) < 1.03 * sum(one_trial)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_starts_are_different_rows_of_positive_weight(init):
    x = blobs(1, n=60)
    weights = (torch.arange(60) % 3 == 0).double()
    model = KMeans(20, init=init, max_iter=1, tol=0).fit(x, sample_weight=weights)  # every usable row is drawn
    assert model.labels_[weights > 0].unique().numel() == 20
    assert model.inertia_ == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("empty_cluster", ["split", "farthest"])
@pytest.mark.parametrize("init", ["k-means++", "plain-k-means++", "random"])
def test_fewer_distinct_rows_than_clusters(empty_cluster, init):
    x = torch.tensor([[0.0, 1.0], [0.1, 0.3]]).repeat(10, 1)
    model = KMeans(5, init=init, empty_cluster=empty_cluster)
    with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(2\) found smaller than n_clusters \(5\)") as seen:
        model.fit(x)
    assert seen[0].filename == __file__
    with pytest.warns(ConvergenceWarning, match=r"distinct clusters \(2\) found smaller than n_clusters \(5\)"):
        Oracle(5).fit(x.numpy())
    assert model.inertia_ == 0
    assert model.cluster_centers_.isfinite().all()
    assert len(model.labels_.unique()) == 2


def test_one_cluster_per_row():
    x = blobs(2, n=20)
    model = KMeans(20).fit(x)
    assert model.inertia_ == pytest.approx(0, abs=1e-10)
    assert sorted(model.labels_.tolist()) == list(range(20))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("batch_size", [7, 399, 400, 1000])
def test_rows_brought_in_chunks_change_nothing(metric, batch_size):
    x, weights = blobs(3), torch.rand(400, dtype=torch.float64)
    whole = KMeans(9, metric=metric).fit(x, sample_weight=weights)
    chunked = KMeans(9, metric=metric, batch_size=batch_size).fit(x, sample_weight=weights)
    assert whole.labels_.equal(chunked.labels_)
    torch.testing.assert_close(whole.cluster_centers_, chunked.cluster_centers_)
    assert chunked.predict(x).equal(whole.labels_)
    torch.testing.assert_close(chunked.transform(x), whole.transform(x))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_batch_of_problems_is_each_of_them_alone(metric):
    x = torch.stack([blobs(seed) for seed in range(4)])
    x[2] = x[2, :1]  # one is done at once
    weights = torch.rand(4, 400, dtype=torch.float64)
    ours = KMeans(9, metric=metric, init="plain-k-means++", n_init=2, tol=0, empty_cluster="keep")
    batch = clone(ours).fit(x, sample_weight=weights)
    assert batch.n_iter_.unique().numel() > 1
    for i in range(4):
        alone = clone(ours).fit(x[i], sample_weight=weights[i])
        assert batch.labels_[i].equal(alone.labels_)
        assert batch.cluster_centers_[i].equal(alone.cluster_centers_)
        assert batch.inertia_[i].item() == alone.inertia_
        assert batch.n_iter_[i].item() == alone.n_iter_
    assert batch.predict(x).equal(batch.labels_)
    assert batch.transform(x).shape == (4, 400, 9)
    torch.testing.assert_close(batch.score(x, sample_weight=weights), -batch.inertia_)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cuda", "cpu"])
def test_the_extensions_fit_as_plain_torch_does(backend, kmeans_device, metric, dtype):
    if reasons := BACKENDS["kmeans_assign"][backend].obstacles(kmeans_device, dtype):
        pytest.skip(reasons[0])
    x, weights = blobs(4).to(kmeans_device, dtype), torch.rand(400, device=kmeans_device)
    for weight, n_init in ((weights, 1), (None, 1), (None, 3), (weights, 3)):
        arguments = {"metric": metric, "init": "random", "random_state": 0, "n_init": n_init}
        ours = KMeans(9, backend=backend, **arguments).fit(x, sample_weight=weight)
        plain = KMeans(9, backend="blocked", **arguments).fit(x, sample_weight=weight)
        assert ours.labels_.equal(plain.labels_)
        torch.testing.assert_close(ours.cluster_centers_, plain.cluster_centers_)
        assert ours.inertia_ == pytest.approx(plain.inertia_)


@pytest.mark.parametrize("seed", range(4))
def test_weights_equal_scikit_learns(seed):
    x, weights = blobs(seed), torch.rand(400, dtype=torch.float64)
    weights[::5] = 0
    ours = KMeans(11, init=x[1:12], tol=0).fit(x, sample_weight=weights)
    oracle = Oracle(11, init=x[1:12].numpy(), n_init=1, tol=0).fit(x.numpy(), sample_weight=weights.numpy())
    torch.testing.assert_close(ours.cluster_centers_, torch.from_numpy(oracle.cluster_centers_))
    assert ours.labels_.tolist() == oracle.labels_.tolist()
    assert ours.inertia_ == pytest.approx(oracle.inertia_)
    assert ours.score(x, sample_weight=weights) == pytest.approx(oracle.score(x.numpy(), sample_weight=weights.numpy()))


def with_empty_clusters(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = blobs(seed)
    init = x[:8].clone()
    init[2], init[5] = 1e3, -1e3  # nearest to nothing
    return x, init


def test_empty_clusters_are_split_off_the_largest():
    x, init = with_empty_clusters(0)
    sizes = KMeans(8, init=init, max_iter=1, empty_cluster="keep").fit(x).labels_.bincount(minlength=8)
    start = KMeans(8, init=init, max_iter=1).fit(x)
    assert start.labels_.bincount(minlength=8).min() > 0
    assert start.cluster_centers_[[2, 5]].norm(dim=1).max() < 100
    assert sizes[[2, 5]].tolist() == [0, 0]


def test_empty_clusters_stay_where_they_are():
    x, init = with_empty_clusters(1)
    model = KMeans(8, init=init, empty_cluster="keep").fit(x)
    assert model.cluster_centers_[[2, 5]].equal(init[[2, 5]])


def test_empty_clusters_are_an_error():
    x, init = with_empty_clusters(2)
    with pytest.raises(RuntimeError, match=r"2 empty clusters, the first of them 2; see empty_cluster"):
        KMeans(8, init=init, empty_cluster="error").fit(x)
    KMeans(8, init=x[:8], empty_cluster="error").fit(x)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("empty_cluster", ["split", "farthest", "keep"])
@pytest.mark.parametrize("weighted", [False, True])
def test_inertia_never_rises(metric, empty_cluster, weighted):
    for seed in range(3):
        x, init = with_empty_clusters(seed)
        weights = torch.rand(400, dtype=torch.float64) if weighted else None
        options = {"metric": metric, "init": init, "tol": 0, "empty_cluster": empty_cluster}
        inertias = [KMeans(8, max_iter=n, **options).fit(x, sample_weight=weights).inertia_ for n in range(1, 12)]
        assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(inertias))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
@pytest.mark.parametrize("empty_cluster", ["split", "farthest", "keep"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mean_of_equal_rows_is_that_row(empty_cluster, metric, dtype):
    """Whatever their sum is rounded to: else rows would go to another of the equal centres at every iteration."""
    x = torch.full((50, 4), 0.1, dtype=dtype)
    model = KMeans(3, metric=metric, empty_cluster=empty_cluster).fit(x)
    assert model.inertia_ == pytest.approx(0, abs=0 if metric == "euclidean" else 1e-12)
    assert model.labels_.unique().tolist() == [0] and model.n_iter_ == 1
    if metric == "euclidean":
        assert (model.cluster_centers_[0] == x[0]).all()
    values = torch.tensor([0.1, 0.7, 1.9], dtype=dtype).repeat(33)[:, None] * torch.tensor([1.0, 3, -1], dtype=dtype)
    if metric == "cosine":
        values[::3, 1], values[1::3, 2] = 5, 7
    weights = torch.rand(99, generator=torch.Generator().manual_seed(0))
    for given in (None, weights):
        model = KMeans(6, metric=metric, empty_cluster=empty_cluster).fit(values, sample_weight=given)
        assert model.n_iter_ <= 2 and len(model.labels_.unique()) == 3
        assert model.inertia_ == pytest.approx(0, abs=0 if metric == "euclidean" else 1e-12)


def test_values_whose_squares_overflow_float32():
    x = blobs(5)
    small = KMeans(9, init=x[:9].float()).fit(x.float())
    huge = KMeans(9, init=1e25 * x[:9].float()).fit(1e25 * x.float())
    assert huge.labels_.equal(small.labels_)
    assert KMeans(9).fit(1e25 * x.float()).labels_.unique().numel() > 1  # k-means++ too comes to an end


def test_progress_bar(capsys):
    KMeans(3, verbose=True).fit(blobs(0))
    assert "k-means, K=3" in capsys.readouterr().err
    KMeans(3).fit(blobs(0))
    assert capsys.readouterr().err == ""


def test_the_flag_of_a_gpu_is_read_one_call_late_and_no_later():
    # On a CPU every flag is read at once; on a GPU (where this runs too) after the next iteration is under way.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flag = LateFlag(device)
    answers = [flag.read(torch.tensor(value, device=device)) for value in (True, False, False)]
    assert answers == ([True, True, False] if device.type == "cuda" else [True, False, False])


def test_nothing_to_predict():
    model = KMeans(3, metric="cosine").fit(blobs(0))
    assert model.predict(torch.zeros(0, 7, dtype=torch.float64)).shape == (0,)
    assert model.transform(torch.zeros(0, 7, dtype=torch.float64)).shape == (0, 3)


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
    inertias = [KMeans(9, n_init=n, random_state=2).fit(x).inertia_ for n in (1, 2, 4, 8)]
    assert inertias == sorted(inertias, reverse=True)
    assert inertias[-1] < inertias[0]


def test_seeded_and_private():
    x = blobs(7)
    state = torch.get_rng_state()
    first, again, other = (KMeans(9, random_state=seed, max_iter=1).fit(x) for seed in (5, 5, 6))
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
        ({"init": "k-means||"}, "init"),
        ({"init": None}, "init"),
        ({"random_state": -1}, "random_state"),
        ({"random_state": 2**70}, "random_state"),
        ({"random_state": "0"}, "random_state"),
        ({"empty_cluster": "nan"}, "empty_cluster"),
        ({"backend": "gpu"}, "backend"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_iter": 0}, "max_iter"),
        ({"n_init": 0}, "n_init"),
        ({"n_init": "one"}, "n_init"),
        ({"tol": -1}, "tol"),
        ({"tol": float("nan")}, "tol"),
    ],
)
def test_wrong_settings(arguments, name):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        KMeans(**{"n_clusters": 3} | arguments).fit(blobs(0))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3), r"^X: expected at least n_clusters=3 rows, got 2"),
        (torch.zeros(0, 3), r"^X: expected at least n_clusters=3 rows, got 0"),
        (torch.zeros(9), r"^X: expected .*, got torch.float32 \[9\]"),
        (torch.zeros(9, 3, dtype=torch.int64), r"^X: expected .*, got torch.int64"),
        ([[1.0, 2.0]], r"^X: expected at least n_clusters=3 rows, got 1"),
        ([1.0, 2.0, 3.0], "Expected 2D array, got 1D array instead"),
        (np.zeros((9, 3, 1, 1)), r"Found array with dim 4"),
        (np.full((9, 3), np.nan), r"^X: expected finite"),
        ([["a", "b"]] * 3, "could not convert string to float"),
        (torch.full((9, 3), float("nan")), r"^X: expected finite"),
        (torch.full((9, 3), float("inf")), r"^X: expected finite"),
    ],
)
def test_wrong_data(x, message):
    with pytest.raises(ValueError, match=message):
        KMeans(3).fit(x)


def test_wrong_centers_and_wrong_use():
    x = blobs(0)
    with pytest.raises(ValueError, match=r"^init: expected .* \[3, 7\], got torch.float64 \[4, 7\]"):
        KMeans(3, init=x[:4]).fit(x)
    with pytest.raises(ValueError, match=r"^init: expected finite"):
        KMeans(3, init=x[:3] * float("nan")).fit(x)
    for use in (KMeans(3).predict, KMeans(3).transform, KMeans(3).score):
        with pytest.raises(NotFittedError, match="This KMeans instance is not fitted yet"):
            use(x)
    with pytest.raises(ValueError, match=r"^X: expected 7 features as in fit, got 2"):
        KMeans(3).fit(x).predict(x[:, :2])
    for weights, got in (
        (torch.ones(3), r"floating-point weights \[400\], got torch.float32 \[3\]"),
        (torch.ones(400, dtype=torch.int64), "floating-point weights .*, got torch.int64"),
        (-torch.ones(400), "weights >= 0, got -1.0"),
        (torch.full((400,), torch.nan), "finite"),
        (torch.eye(1, 400)[0], "at least n_clusters=3 weights above zero, got 1"),
    ):
        with pytest.raises(ValueError, match=rf"^sample_weight: expected (a )?{got}"):
            KMeans(3).fit(x, sample_weight=weights)
    with pytest.raises(ValueError, match=r"^X: expected shape \[rows, features\] as in fit, got \[1, 400, 7\]"):
        KMeans(3).fit(x).predict(x[None])


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_works_in_inference_mode_and_with_any_number_of_threads(two_threads):
    x = blobs(0, n=3000)
    expected = KMeans(9).fit(x)
    with torch.inference_mode():
        inferred = KMeans(9).fit(x)
        assert inferred.predict(x).equal(expected.labels_)
    torch.set_num_threads(1)
    alone = KMeans(9).fit(x)
    for model in (inferred, alone):
        assert model.labels_.equal(expected.labels_)
        assert model.cluster_centers_.equal(expected.cluster_centers_)


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(default):
    x = blobs(0).float()
    expected = KMeans(9).fit(x)
    torch.set_default_dtype(default)
    try:
        model = KMeans(9).fit(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.cluster_centers_.equal(expected.cluster_centers_)
    assert model.inertia_ == expected.inertia_


def test_the_unit_of_weight_does_not_matter():
    x = blobs(0).float()
    expected = KMeans(9).fit(x)
    for unit in (2.0**-100, 2.0**120):
        model = KMeans(9).fit(x, sample_weight=torch.full((400,), unit))
        assert model.cluster_centers_.equal(expected.cluster_centers_)
        assert model.inertia_ == pytest.approx(unit * expected.inertia_)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_sums_that_overflow_are_an_error(init):
    with pytest.raises(ValueError, match=r"^X: expected values whose sums torch.float64 can hold, got up to 1.7e\+308"):
        KMeans(2, init=init).fit(torch.full((600, 2), 1.7e308, dtype=torch.float64))


def test_one_subnormal_row_spoils_nothing():
    x = torch.randn(500, 16)
    expected = KMeans(8, metric="cosine", init=x[8:16]).fit(torch.cat([x[:3], x[4:]])).inertia_
    x[3] *= 1e-42
    assert KMeans(8, metric="cosine", init=x[8:16]).fit(x).inertia_ == pytest.approx(expected, abs=5)


def test_numbers_of_numpy_are_numbers():
    model = KMeans(np.int64(3), random_state=np.int32(1), tol=np.float32(0)).fit(blobs(0))
    assert model.cluster_centers_.equal(KMeans(3, random_state=1, tol=0).fit(blobs(0)).cluster_centers_)


# ---- Few rows: the starts go on together, and a step is few operations.

STARTS = [{}, {"init": "random"}, {"metric": "cosine"}, {"init": "plain-k-means++", "tol": 0.01}, {"max_iter": 3}]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("arguments", [*STARTS, {"init": "random", "empty_cluster": "farthest"}], ids=str)
def test_starts_together_are_those_one_after_the_other(arguments, weighted, monkeypatch):
    x = torch.cat([blobs(0, 200, 3, 9), blobs(1, 3, 3, 1).repeat(20, 1)]).float()
    weights = torch.rand(260, generator=torch.Generator().manual_seed(2)) if weighted else None

    def fit(at_once):
        monkeypatch.setattr(Data, "starts_at_once", lambda self, k: at_once)
        return KMeans(12, n_init=7, **arguments).fit(x, sample_weight=weights)

    alone = fit(1)
    for at_once in (2, 3, 7, 100):
        together = fit(at_once)
        assert torch.equal(together.cluster_centers_, alone.cluster_centers_)
        assert torch.equal(together.labels_, alone.labels_)
        for name in ("inertia_", "n_iter_", "doubtful_", "rechecked_"):
            assert getattr(together, name) == getattr(alone, name), name


def test_starts_are_together_only_where_that_is_possible():
    x = blobs(3, 300, 4, 5)[None].float()
    other = {"metric": "euclidean", "batch_size": None, "device": torch.device("cpu"), "backend": "auto"}

    def at_once(x, k=5, **changes):
        return Data(x, None, **(other | changes)).starts_at_once(k)

    assert at_once(x) > 10
    assert at_once(x.expand(2, -1, -1)) == at_once(x, batch_size=100) == at_once(x, backend="reference") == 1
    assert at_once(torch.zeros(1, 1 << 20, 1)) == 1
    assert at_once(torch.zeros(1, (1 << 18) + 1, 4)) == 1


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(call) -> int:
    with Operations() as counted:
        call()
    return counted.count


def test_a_step_of_few_rows_is_few_operations(monkeypatch):
    """An iteration, what there is besides iterations, and `predict`: views, and copies to the host, included."""
    monkeypatch.setattr(assign_blocked, "OTHER_ROUNDINGS", -32)  # no row is in doubt, whatever the product's rounding
    x = torch.randn(2000, 32, generator=torch.Generator().manual_seed(4))

    def fit(max_iter):
        return KMeans(50, init=x[:50], max_iter=max_iter, tol=0.0).fit(x)

    assert fit(7).n_iter_ == 7  # none rests before
    six, seven = operations(lambda: fit(6)), operations(lambda: fit(7))
    assert seven - six <= 60
    assert six - 6 * (seven - six) <= 220  # an assignment is among them
    model = fit(1)
    assert operations(lambda: model.predict(x)) <= 100

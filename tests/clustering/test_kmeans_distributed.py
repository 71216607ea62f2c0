"""KMeans over the rows of several processes: as if all rows were with one."""

import re

import pytest
import torch
import torch.distributed as dist

from ccl_fast.clustering import KMeans, concentration, shards
from ccl_fast.distributed import Group, open_group
from ccl_fast.distributed.group import ALL_GATHER
from ccl_fast.errors import PeerError
from ccl_fast.ops.kmeans import update_blocked
from ccl_fast.ops.kmeans.update import sum_by_cluster
from tests.ops.kmeans_cases import blobs
from tests.processes import run

pytestmark = pytest.mark.xdist_group("test_kmeans_distributed")

N = 400
SPLITS = ([400], [150, 250], [399, 1], [0, 400], [130, 7, 263], [250, 0, 150])
# Weights whose sums are not exact, some of them zero.
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(0)) * (torch.arange(N) % 5 > 0)


def part_of(sizes: list[int]) -> slice:
    """The rows of this process."""
    start = sum(sizes[: dist.get_rank()])
    return slice(start, start + sizes[dist.get_rank()])


def fit_shard(x, weights, sizes, options):
    part = part_of(sizes)
    own = x[..., part, :]
    model = KMeans(process_group="world", **options).fit(
        own, sample_weight=None if weights is None else weights[..., part]
    )
    assert model.predict(own).equal(model.labels_)
    return model.labels_, model.cluster_centers_, model.inertia_, model.n_iter_, model.rechecked_


def fit(x, sizes, weights=None, **options):
    """What all processes agree on, and the labels of all rows."""
    results = run(fit_shard, len(sizes), x, weights, sizes, options)
    for _, *found in results[1:]:
        for mine, first in zip(found, results[0][1:], strict=True):
            assert mine.equal(first) if isinstance(mine, torch.Tensor) else mine == first
    labels = torch.cat([labels for labels, *_ in results], -1)
    centers, inertia, n_iter, _ = results[0][1:]
    return labels, centers, inertia, n_iter


def assert_the_same_for_all_splits(x, weights=None, alone=True, **options):
    """The same labels for all splits, and (on data without near ties) as those without a group."""
    labels, centers, inertia, n_iter = fit(x, SPLITS[0], weights, **options)
    centers_tolerance = {"rtol": 1e-12, "atol": 1e-12} if x.dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    for sizes in SPLITS[1:]:
        other = fit(x, sizes, weights, **options)
        assert other[0].equal(labels), f"{(other[0] != labels).sum()} labels differ for {sizes}"
        torch.testing.assert_close(other[1], centers, **centers_tolerance)
        torch.testing.assert_close(torch.as_tensor(other[2]), torch.as_tensor(inertia), rtol=1e-6, atol=1e-6)
        assert torch.as_tensor(other[3]).equal(torch.as_tensor(n_iter))
    if alone:
        model = KMeans(**options).fit(x, sample_weight=weights)
        assert model.labels_.equal(labels)
        assert torch.as_tensor(model.n_iter_).equal(torch.as_tensor(n_iter))
        torch.testing.assert_close(model.cluster_centers_, centers, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.as_tensor(model.inertia_), torch.as_tensor(inertia), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("init", ["k-means++", "random", "given"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "weighted"])
def test_labels_do_not_depend_on_the_shards(metric, init, weights):
    x = blobs(0).float()
    options = {"n_clusters": 9, "metric": metric, "init": x[1:10] if init == "given" else init, "tol": 0}
    assert_the_same_for_all_splits(x, weights, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"n_init": 4},
        {"batch_size": 37},
        pytest.param({"n_clusters": 150}, marks=pytest.mark.slow),  # rounds of many candidates
        pytest.param({"n_clusters": 150, "metric": "cosine", "init": "random"}, marks=pytest.mark.slow),
        pytest.param({"max_iter": 2}, marks=pytest.mark.slow),
        pytest.param({"tol": 0.1}, marks=pytest.mark.slow),
        pytest.param({"backend": "reference"}, marks=pytest.mark.slow),
        pytest.param({"random_state": 7}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_options(options):
    assert_the_same_for_all_splits(blobs(1).float(), **{"n_clusters": 9} | options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_dtypes(dtype, metric):
    assert_the_same_for_all_splits(blobs(2).to(dtype), WEIGHTS, n_clusters=9, metric=metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "weighted"])
def test_a_batch_of_problems(metric, weights):
    x = torch.stack([blobs(seed).float() for seed in range(3)])
    weights = weights if weights is None else torch.stack([weights.roll(i) for i in range(3)])
    assert_the_same_for_all_splits(x, weights, n_clusters=9, metric=metric, n_init=2)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("empty_cluster", ["split", "farthest", "keep"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "weighted"])
def test_empty_clusters(metric, empty_cluster, weights):
    x = blobs(3).float()
    init = x[:8].clone()
    if metric == "cosine":
        init[[2, 5]] = init[1].clone()  # of equal centres the first has the rows
    else:
        init[2], init[5] = 1e3, -1e3
    assert_the_same_for_all_splits(x, weights, n_clusters=8, metric=metric, init=init, empty_cluster=empty_cluster)


@pytest.mark.parametrize("empty_cluster", ["split", "farthest", "keep"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_fewer_distinct_rows_than_clusters(metric, empty_cluster):
    x = torch.tensor([[1.0, 2.0], [2.0, -3.0], [0.0, 1.0]]).repeat(N // 3 + 1, 1)[:N]
    # Near ties everywhere, so not as without a group.
    assert_the_same_for_all_splits(x, alone=False, n_clusters=6, metric=metric, empty_cluster=empty_cluster)


def test_centers_are_the_same_bits_where_float64_holds_the_sums():
    x = torch.randint(-50, 51, (N, 6)).float() / 8
    first = fit(x, SPLITS[0], n_clusters=12)
    for sizes in SPLITS[1:]:
        other = fit(x, sizes, n_clusters=12)
        assert all(torch.as_tensor(a).equal(torch.as_tensor(b)) for a, b in zip(first, other, strict=True))


def test_warm_start_from_its_own_result_stops_at_once():
    x = blobs(4).float()
    labels, centers, _, _ = fit(x, [130, 7, 263], n_clusters=9, tol=0)
    again, _, _, n_iter = fit(x, [300, 100], n_clusters=9, tol=0, init=centers)
    assert n_iter == 1 and again.equal(labels)


# ---- what is refused, everywhere


def errors(arguments_of, calls):
    """The error of every call, made with what the function finds for this process; then whether all still keep step."""
    found = []
    for call in calls:
        options, x, weights = arguments_of(call, dist.get_rank())
        try:
            KMeans(**{"n_clusters": 3, "process_group": "world"} | options).fit(x, sample_weight=weights)
        except (ValueError, RuntimeError) as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("no error")
    dist.all_reduce(in_step := torch.ones(()))
    assert in_step == dist.get_world_size()
    return found


def of_the_last(call, rank):
    """What is called for is the last process's; the others have what is right."""
    _, options, x, weights = call
    if rank < dist.get_world_size() - 1:
        return {}, torch.randn(N, 7), None if weights is None else torch.ones(N)
    return options, torch.randn(N, 7) if x is None else x, weights


DIFFERENT = [
    ("X", {}, torch.randn(N, 6), None),
    ("X", {}, torch.randn(2, N, 7), None),
    ("X", {}, torch.randn(N, 0), None),
    ("X.dtype", {}, torch.randn(N, 7).half(), None),
    ("n_clusters", {"n_clusters": 4}, None, None),
    ("metric", {"metric": "cosine"}, None, None),
    ("init", {"init": "random"}, None, None),
    ("init", {"init": torch.randn(3, 7)}, None, None),
    ("random_state", {"random_state": 1}, None, None),
    ("n_init", {"n_init": 2}, None, None),
    ("max_iter", {"max_iter": 2}, None, None),
    ("tol", {"tol": 0}, None, None),
    ("empty_cluster", {"empty_cluster": "keep"}, None, None),
    ("backend", {"backend": "blocked"}, None, None),
]


@pytest.mark.parametrize("processes", [2, 3])
def test_what_differs_between_processes_is_named_on_all(processes):
    everyone = run(errors, processes, of_the_last, DIFFERENT)
    for found in everyone:
        for (name, *_), message in zip(DIFFERENT, found, strict=True):
            expected = (
                rf"ArgumentError: {re.escape(name)}: expected the same on every process, got .* on process 0 and "
            )
            assert re.match(expected, message), f"{name}: {message}"


def one_has_weights(call, rank):
    return {}, torch.randn(N, 7), torch.ones(N) if rank else None


def other_centers(call, rank):
    return {"init": torch.arange(21.0).view(3, 7) + (rank == 1) * 1e-6}, torch.randn(N, 7), None


def test_weights_and_centers_must_be_alike():
    for found in run(errors, 2, one_has_weights, [None]):
        expected = "ArgumentError: sample_weight: expected the same on every process, got None on process 0 and given"
        assert found[0].startswith(expected)
    for found in run(errors, 2, other_centers, [None]):
        assert found[0].startswith("ArgumentError: init: expected the same on every process, got torch.float32 [3, 7]")


def spoilt(x, where, value):
    x = x.clone()
    x[where] = value
    return x


BAD = [
    ("X: expected finite", {}, spoilt(torch.randn(N, 7), 5, torch.nan), None),
    ("X: expected finite", {}, spoilt(torch.randn(N, 7), (5, 0), torch.inf), torch.ones(N)),
    ("X: expected finite", {"batch_size": 90}, spoilt(torch.randn(N, 7), (399, 6), -torch.inf), None),
    ("X: expected a floating-point tensor", {}, torch.ones(N), None),
    ("X: expected a floating-point tensor", {}, torch.ones(N, 7, dtype=torch.int64), None),
    ("sample_weight: expected floating-point weights", {}, None, torch.ones(3)),
    ("sample_weight: expected weights >= 0", {}, None, spoilt(torch.ones(N), 3, -1)),
    ("sample_weight: expected finite", {}, None, spoilt(torch.ones(N), 3, torch.nan)),
]


@pytest.mark.parametrize("processes", [2, 3])
def test_one_bad_shard_is_an_error_everywhere(processes):
    everyone = run(errors, processes, of_the_last, BAD)
    for rank, found in enumerate(everyone):
        where = "" if rank == processes - 1 else f"on process {processes - 1}: "
        for (text, *_), message in zip(BAD, found, strict=True):
            assert message.startswith(f"ArgumentError: {where}{text}"), message


def rows_on_the_last(call, rank):
    return {"backend": "cuda"}, torch.randn(N if rank else 0, 7), None


def test_a_backend_that_refuses_the_rows_of_one_is_an_error_everywhere():
    (first,), (last,) = run(errors, 2, rows_on_the_last, [None])
    assert last.startswith("ArgumentError: backend: ")
    assert first == last.replace("ArgumentError: ", "ArgumentError: on process 1: ")


def alike(call, rank):
    return call


ALIKE = [
    ("ArgumentError: X: expected at least n_clusters=3 rows, got 2", {}, torch.ones(1, 7), None),
    ("ArgumentError: X: expected at least one problem and one feature", {}, torch.ones(9, 0), None),
    (
        "ArgumentError: sample_weight: expected at least n_clusters=3 weights above zero, got 2",
        {},
        torch.ones(9, 7),
        torch.eye(1, 9)[0],
    ),
    ("ArgumentError: init: expected floating-point centres [3, 7]", {"init": torch.ones(4, 7)}, torch.ones(9, 7), None),
    ("ArgumentError: init: expected finite", {"init": torch.full((3, 7), torch.nan)}, torch.ones(9, 7), None),
    (
        "RuntimeError: 1 empty clusters, the first of them 1",
        {"empty_cluster": "error", "init": torch.tensor([[0.0], [9.0], [1.0]])},
        torch.tensor([[0.0], [1.0]]),
        None,
    ),
]


def test_what_is_wrong_of_all_rows_is_an_error_everywhere():
    for found in run(errors, 2, alike, [case[1:] for case in ALIKE]):
        for (text, *_), message in zip(ALIKE, found, strict=True):
            assert message.startswith(text), message


@pytest.mark.parametrize("group", ["worlds", 3, object()])
def test_no_group(group):
    for call in (
        lambda: KMeans(3, process_group=group).fit(torch.ones(4, 2)),
        lambda: concentration(torch.ones(4, 2), torch.zeros(4).long(), torch.ones(1, 2), process_group=group),
    ):
        with pytest.raises(ValueError, match=r"^process_group: expected .*, got "):
            call()


def test_the_world_is_looked_up_at_fit():
    model = KMeans(3, process_group="world")
    with pytest.raises(ValueError, match=r"^process_group: expected torch.distributed.init_process_group"):
        model.fit(torch.randn(9, 2))


# ---- who talks, and how much


def fit_in_pairs(x):
    """Two of three processes cluster among themselves; the third does something else."""
    pair = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match=r"^process_group: "):
            KMeans(5, process_group=pair).fit(x)
        return KMeans(5).fit(x).labels_
    part = slice(0, 100) if dist.get_rank() == 0 else slice(100, N)
    return KMeans(5, process_group=pair).fit(x[part]).labels_


def test_a_group_of_some_processes():
    x = blobs(5).float()
    first, alone, last = run(fit_in_pairs, 3, x)
    assert torch.cat([first, last]).equal(alone)


def apply_on_one(x):
    model = KMeans(5, process_group="world").fit(x[dist.get_rank() :: 2])
    if dist.get_rank() == 1:
        return None
    calls = (
        model.predict(x),
        model.transform(x),
        model.score(x),
        model.score(x, sample_weight=WEIGHTS),
        model.predict(x[:0]),
    )
    return model.cluster_centers_, *calls


def test_a_fitted_model_does_not_communicate():
    x = blobs(6).float()
    (centers, labels, distances, score, weighted, nothing), _ = run(apply_on_one, 2, x, patience=5)
    alone = KMeans(5, init=centers).fit(x)
    alone.cluster_centers_ = centers
    assert labels.equal(alone.predict(x)) and distances.equal(alone.transform(x)) and nothing.shape == (0,)
    assert score == alone.score(x) and weighted == alone.score(x, sample_weight=WEIGHTS)


def messages(x, sizes, options):
    """Bytes of every collective of a fit, as this process passes them."""
    sent = []

    def counted(function, position):
        def call(*args, **kwargs):
            sent.append(args[position].numel() * args[position].element_size())
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted(dist.all_reduce, 0))
        patch.setattr(dist, ALL_GATHER, counted(getattr(dist, ALL_GATHER), 1))
        KMeans(process_group="world", **options).fit(x[part_of(sizes)])
    return sent


def test_an_iteration_is_one_message_of_the_sums():
    x, k, d = torch.randn(3000, 8), 5, 8
    options = {"n_clusters": k, "tol": 0, "init": x[:k]}
    one, two = (run(messages, 2, x, [1000, 2000], options | {"max_iter": n})[0] for n in (1, 2))
    iteration = 8 * (k * d + k + 3)
    assert len(two) == len(one) + 1 and two.count(iteration) == one.count(iteration) + 1 == 3
    assert max(two) == iteration


@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("empty_cluster", ["split", "farthest"])
def test_rows_stay_where_they_are(init, empty_cluster):
    x = torch.randn(20_000, 8)
    x[5000:] = x[5000].clone()  # so that clusters stay empty
    options = {"empty_cluster": empty_cluster}
    sent = run(messages, 2, x, [8000, 12_000], {"n_clusters": 6, "init": init, "n_init": 1} | options)[0]
    assert max(sent) <= 8 * 256 * (8 + 1)
    assert sum(sent) < 0.2 * x.numel() * x.element_size()


# ---- the parts


@pytest.mark.parametrize("drawn", [1, 4, 7, 100])
def test_random_numbers_belong_to_rows(monkeypatch, drawn):
    monkeypatch.setattr(shards, "DRAWN", drawn)
    counts = [3, 0, 9, 5]
    own = []
    for rank in range(len(counts)):
        group = Group()
        group.rank, group.size, group.process_group = rank, len(counts), "world"
        shard = shards.Shards(group, counts)
        generator = torch.Generator().manual_seed(3)
        own.append(shard.uniform(generator))
        after = torch.rand(4, generator=generator)
    generator = torch.Generator().manual_seed(3)
    assert torch.cat(own).equal(torch.rand(17, dtype=torch.float64, generator=generator))
    assert after.equal(torch.rand(4, generator=generator))


def draw_and_take(potential, values, share, sizes):
    shard = shards.Shards(open_group("world"), sizes)
    part = part_of(sizes)
    cumulative = potential[part].cumsum(0)
    rows = shard.draw(cumulative, shard.ends(cumulative), share)
    taken = shard.group.sum(shard.place(rows, lambda own: values[part][own]))
    return rows, taken, *shard.topk(values[part], 5, largest=True), *shard.topk(values[part], 5, largest=False)


def test_rows_are_drawn_and_found_wherever_they_are():
    potential = torch.randint(0, 3, (20,)).double()
    potential[[0, 7, 19]] = 0
    values = torch.randint(0, 4, (20,)).double()  # ties
    share = torch.cat([torch.linspace(0, 1, 50, dtype=torch.float64), torch.rand(500, dtype=torch.float64)])
    share[49] = 1 - 2**-53
    cumulative = potential.cumsum(0)
    expected = torch.searchsorted(cumulative, share * cumulative[-1], right=True)
    expected[49] = int(potential.nonzero()[-1])
    for sizes in ([20], [0, 20], [20, 0], [8, 12], [7, 0, 13], [0, 19, 1], [1, 1, 18]):
        for rows, taken, high, highest, low, lowest in run(draw_and_take, len(sizes), potential, values, share, sizes):
            assert rows.equal(expected) and potential[rows].min() > 0
            assert taken.equal(values[rows])
            for found, which, largest in ((high, highest, True), (low, lowest, False)):
                order = values.sort(descending=largest, stable=True).indices[:5]
                assert which.equal(order) and found.equal(values[order])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_in_blocks_are_those_of_float64(monkeypatch, dtype, weighted):
    monkeypatch.setattr(update_blocked, "CPU_ENTRIES", 300)  # several blocks
    x, labels = torch.randn(2, 500, 7).to(dtype), torch.randint(0, 40, (2, 500))
    labels[labels == 3] = 4
    weights = torch.rand(2, 500) if weighted else None
    found = sum_by_cluster(x, labels, 41, weights, "blocked")
    expected = sum_by_cluster(x, labels, 41, weights, "reference")
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-14, atol=1e-14)
    assert found[0][:, [3, 40]].count_nonzero() == 0
    for mine in sum_by_cluster(x[:, :0], labels[:, :0], 41, None, "blocked"):
        assert mine.count_nonzero() == 0


# ---- concentration


def concentration_of_shard(x, ids, centers, sizes, options):
    part = part_of(sizes)
    return concentration(x[part], ids[part], centers, process_group="world", **options)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_concentration_is_that_of_all_rows(metric, dtype):
    x, ids, centers = torch.randn(N, 5).to(dtype), torch.randint(0, 12, (N,)), torch.randn(12, 5).to(dtype)
    ids[ids == 3] = 4
    options = {"metric": metric, "mean": 0.2}
    expected = concentration(x, ids, centers, **options)
    for sizes in SPLITS:
        everyone = run(concentration_of_shard, len(sizes), x, ids, centers, sizes, options)
        torch.testing.assert_close(everyone[0], expected, rtol=1e-6, atol=0)
        assert all(other.equal(everyone[0]) for other in everyone)


def concentration_errors(calls):
    found = []
    for call in calls:
        good = {"x": torch.randn(4, 2), "cluster_ids": torch.zeros(4).long(), "centers": torch.ones(4, 2)}
        try:
            concentration(**good | (call if dist.get_rank() else {}), process_group="world")
        except ValueError as error:
            found.append(str(error))
    return found


def test_concentration_refuses_on_every_process():
    calls = {
        "x: expected finite": {"x": torch.full((4, 2), torch.nan)},
        "x.dtype: expected the same": {"x": torch.randn(4, 2).half()},
        "cluster_ids: expected ids in": {"cluster_ids": torch.tensor([0, 0, 0, 4])},
        "centers: expected the same": {"centers": torch.zeros(4, 2)},
        "metric: expected the same": {"metric": "euclidean"},
        "smoothing: expected the same": {"smoothing": 3.0},
        "mean: expected the same": {"mean": 1.0},
    }
    for rank, found in enumerate(run(concentration_errors, 2, list(calls.values()))):
        assert len(found) == len(calls)
        for text, message in zip(calls, found, strict=True):
            assert message.removeprefix("on process 1: " if rank == 0 else "").startswith(text)


def leave(x):
    if dist.get_rank() == 1:
        return "left"
    with pytest.raises(PeerError):
        KMeans(3, process_group="world").fit(x)
    return "told"


def test_a_process_that_leaves_is_noticed():
    assert run(leave, 2, torch.randn(9, 2), patience=10) == ["told", "left"]

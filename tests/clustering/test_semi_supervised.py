"""KMeans.fit(x, labels=): rows that stay in their cluster, against the definition."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ccl_fast.clustering import KMeans
from ccl_fast.clustering.data import Data
from ccl_fast.clustering.rejection_sampling import plain_k_means_plus_plus
from ccl_fast.clustering.seeding import k_means_plus_plus, random_rows
from tests.clustering.test_kmeans_distributed import SPLITS, part_of
from tests.ops.kmeans_cases import blobs
from tests.processes import run

K = 6
INITS = ("k-means++", "plain-k-means++", "random")


def some_labels(n, clusters=K, share=0.2, seed=0):
    """Labels that have little to do with the rows, so that they matter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(clusters, (n,), generator=generator)
    return torch.where(torch.rand(n, generator=generator) < share, labels, -1)


def by_definition(x, labels, weights, metric, iterations):
    """Lloyd's iterations of centres that start at the labelled rows' means: labels, centres and inertia."""
    x, w = x.double(), torch.ones(len(x)).double() if weights is None else weights.double()
    rows = torch.nn.functional.normalize(x) if metric == "cosine" else x

    def means(of):
        sums = torch.stack([(w[of == c, None] * rows[of == c]).sum(0) for c in range(K)])
        if metric == "cosine":
            return torch.nn.functional.normalize(sums)
        return sums / torch.stack([w[of == c].sum() for c in range(K)])[:, None]

    def distances(centers):
        return 1 - rows @ centers.T if metric == "cosine" else torch.cdist(rows, centers).square()

    def assigned(centers):
        return torch.where(labels < 0, distances(centers).argmin(1), labels)

    centers = means(labels)
    found = assigned(centers)
    for _ in range(iterations):
        centers = means(found)
        found = assigned(centers)
    return found, centers, (w * distances(centers).gather(1, found[:, None])[:, 0]).sum()


@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("options", ({}, {"batch_size": 37}, {"backend": "reference"}, {"n_init": 3}), ids=str)
def test_the_definition(metric, dtype, weighted, options):
    x, labels = blobs(0).to(dtype), some_labels(400)
    weights = torch.linspace(0.5, 2, 400).double() if weighted else None
    model = KMeans(K, metric=metric, max_iter=4, tol=0, **options).fit(x, sample_weight=weights, labels=labels)
    found, centers, inertia = by_definition(x, labels, weights, metric, 4)
    assert model.labels_.equal(found)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(model.cluster_centers_.double(), centers, **tolerance)
    assert model.inertia_ == pytest.approx(inertia.item(), rel=1e-5)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("metric", ("euclidean", "cosine"))
@pytest.mark.parametrize("n_init", (1, 4))
def test_labelled_rows_stay_where_they_are(init, metric, n_init):
    x, labels = blobs(1), some_labels(400, clusters=3)
    model = KMeans(K, init=init, metric=metric, n_init=n_init).fit(x, labels=labels)
    assert model.labels_[labels >= 0].equal(labels[labels >= 0])
    free = labels < 0
    assert model.labels_[free].equal(model.predict(x[free])) and set(model.labels_.tolist()) == set(range(K))


@pytest.mark.parametrize("init", INITS)
def test_no_label_at_all_is_k_means(init):
    x = blobs(2).float()
    expected = KMeans(K, init=init, n_init=2).fit(x)
    model = KMeans(K, init=init, n_init=2).fit(x, labels=torch.full((400,), -1))
    assert model.labels_.equal(expected.labels_) and model.cluster_centers_.equal(expected.cluster_centers_)


def test_all_labels_are_the_means_of_the_classes():
    x, y = blobs(3), torch.arange(400) % K
    model = KMeans(K).fit(x, labels=y)
    assert model.labels_.equal(y) and model.n_iter_ == 1
    torch.testing.assert_close(model.cluster_centers_, torch.stack([x[y == c].mean(0) for c in range(K)]))


def test_arrays_and_lists_give_what_tensors_give():
    x, labels = blobs(4), some_labels(400, clusters=3)
    expected = KMeans(K).fit(x, labels=labels)
    for given in (labels.numpy(), labels.tolist(), labels.numpy().astype(np.int8), labels):
        model = KMeans(K).fit(x.numpy(), labels=given)
        assert isinstance(model.labels_, np.ndarray) and torch.from_numpy(model.labels_).equal(expected.labels_)
    assert KMeans(K).fit_predict(x, labels=labels).equal(expected.labels_)
    assert KMeans(K).fit_transform(x, labels=labels).equal(expected.transform(x))
    assert KMeans(K).fit(x, labels, labels=labels.int()).labels_.equal(expected.labels_)


def test_problems_are_solved_as_each_alone():
    x = torch.stack([blobs(seed) for seed in range(3)])
    labels = torch.stack([some_labels(400, clusters=1 + 2 * seed, seed=seed) for seed in range(3)])
    labels[0] = -1
    model = KMeans(K).fit(x, labels=labels)
    for i in range(3):
        assert model.labels_[i].equal(KMeans(K).fit(x[i], labels=labels[i]).labels_)


@pytest.mark.parametrize("policy", ("split", "farthest", "keep"))
def test_clusters_that_lose_their_rows_take_no_labelled_one(policy):
    x = torch.tensor([[0.0], [0.1], [0.2], [9.0], [3.0]])
    labels = torch.tensor([0, 0, 0, 0, -1])
    model = KMeans(2, init=torch.tensor([[2.0], [50.0]]), empty_cluster=policy).fit(x, labels=labels)
    assert (model.labels_[:4] == 0).all()
    assert model.labels_[4] == (0 if policy == "keep" else 1)


def test_labels_without_weight_leave_a_cluster_to_the_seeding():
    x, labels = blobs(5), torch.full((400,), -1)
    labels[:2] = torch.tensor([0, 1])
    weights = torch.ones(400).double()
    weights[1] = 0
    model = KMeans(3).fit(x, sample_weight=weights, labels=labels)
    assert model.labels_[:2].tolist() == [0, 1] and model.cluster_centers_.isfinite().all()
    assert (model.labels_ == 1).sum() > 1


def test_labelled_directions_that_cancel():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    model = KMeans(2, metric="cosine", empty_cluster="keep").fit(x, labels=[0, 0, -1, -1])
    assert model.labels_[:2].tolist() == [0, 0] and model.cluster_centers_.isfinite().all()


def start(seeding, seed, x, labels, k=2, weights=None):
    data = Data(x[None], weights, "euclidean", None, x.device, "auto", fixed=labels[None])
    return seeding(data, k, [torch.Generator().manual_seed(seed)])[0]


def test_further_clusters_start_as_k_means_plus_plus_has_it():
    x = torch.tensor([[0.0], [10.0], [20.0], [2.0]]).double()
    labels = torch.tensor([0, -1, -1, 0])  # their mean is 1
    chosen = [start(plain_k_means_plus_plus, seed, x, labels).flatten().tolist() for seed in range(400)]
    assert {a for a, _ in chosen} == {1.0} and {b for _, b in chosen} == {10.0, 20.0}
    share = np.mean([b == 10.0 for _, b in chosen])
    assert share == pytest.approx(81 / (81 + 361), abs=0.08)
    # The greedy one takes of two draws the one that leaves less: 20, which leaves 81, unless both are 10.
    chosen = [start(k_means_plus_plus, seed, x, labels)[1].item() for seed in range(400)]
    assert np.mean([b == 10.0 for b in chosen]) == pytest.approx((81 / (81 + 361)) ** 2, abs=0.04)


@pytest.mark.parametrize("seeding", (k_means_plus_plus, plain_k_means_plus_plus, random_rows))
def test_copies_are_chosen_when_nothing_else_is_left(seeding):
    x = torch.ones(5, 2)
    assert start(seeding, 0, x, torch.tensor([0, -1, -1, 0, -1]), k=4).equal(torch.ones(4, 2))


def fit_shard(x, labels, sizes, options):
    part = part_of(sizes)
    model = KMeans(K, process_group="world", **options).fit(x[part], labels=labels[part])
    return model.labels_, model.cluster_centers_


@pytest.mark.xdist_group("test_kmeans_distributed")
@pytest.mark.parametrize("options", ({}, {"metric": "cosine", "init": "plain-k-means++"}, {"init": "random"}), ids=str)
def test_shards(options):
    x, labels = blobs(0).float(), some_labels(400, clusters=3)
    expected = KMeans(K, **options).fit(x, labels=labels)
    for sizes in SPLITS[1:5]:
        found = run(fit_shard, len(sizes), x, labels, sizes, options)
        assert torch.cat([part for part, _ in found]).equal(expected.labels_)
        for _, centers in found:
            torch.testing.assert_close(centers, expected.cluster_centers_, rtol=1e-5, atol=1e-5)


def fit_with_labels_of_one(x):
    labels = torch.zeros(len(x), dtype=torch.int64) if dist.get_rank() == 0 else None
    with pytest.raises(ValueError, match="labels: "):
        KMeans(2, process_group="world").fit(x, labels=labels)


@pytest.mark.xdist_group("test_kmeans_distributed")
def test_either_all_processes_have_labels_or_none():
    run(fit_with_labels_of_one, 2, blobs(0))


X = torch.arange(10.0).view(5, 2)
ERRORS = {
    "length": ([0, 1], r"labels: expected integers \[5\], got torch.int64 \[2\]"),
    "floats": (torch.zeros(5), r"labels: expected integers \[5\], got torch.float32 \[5\]"),
    "words": (["a"] * 5, r"labels: expected integers \[5\], got \['a'"),
    "large": ([0, 1, 2, -1, 3], "labels: expected labels below n_clusters=3, got 3"),
    "no free rows": ([0, 1, 1, 0, 0], "labels: expected a free row for each of 1 unlabelled clusters, got 0"),
}


@pytest.mark.parametrize("labels, message", ERRORS.values(), ids=ERRORS)
def test_errors(labels, message):
    with pytest.raises(ValueError, match=message):
        KMeans(3).fit(X, labels=labels)

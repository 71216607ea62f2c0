"""LaplacianKMeans against its definition."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.neighbors import NearestNeighbors

from ccl_fast.clustering import KMeans, LaplacianKMeans
from tests.ops.kmeans_cases import blobs
from tests.oracles.waves import waves

K = 5


def nearest(x, m):
    found = NearestNeighbors(n_neighbors=m + 1).fit(x.double()).kneighbors(x.double(), return_distance=False)
    return torch.from_numpy(found[:, 1:])


def definition(x, centers, smoothness, near, labels, steps, max_iter):
    """With the graph as a matrix: memberships and centres."""
    x, centers = x.double(), centers.double()
    graph = torch.zeros(len(x), len(x)).double()
    graph.scatter_add_(1, near, torch.ones_like(near, dtype=graph.dtype))
    hard = torch.nn.functional.one_hot(labels.clamp(min=0), len(centers)).double()

    def memberships():
        distance = (x[:, None] - centers).square().sum(2)
        y = torch.where(labels[:, None] < 0, (-distance).softmax(1), hard)
        for _ in range(steps):
            y = torch.where(labels[:, None] < 0, (-distance + smoothness * graph @ y).softmax(1), hard)
        return y

    y = memberships()
    for _ in range(max_iter):
        of = y.argmax(1)
        centers = torch.stack([x[of == k].mean(0) if (of == k).any() else centers[k] for k in range(len(centers))])
        y = memberships()
        if (y.argmax(1) == of).all():
            break
    return y, centers


@pytest.mark.parametrize("smoothness", (0, 0.7, 3.0))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16))
@pytest.mark.parametrize("labelled, max_iter", ((False, 20), (True, 20), (True, 0)))
def test_the_definition(smoothness, dtype, labelled, max_iter):
    x = blobs(0, n=90).to(dtype)
    labels = torch.where(torch.arange(90) % 7 == 0, torch.arange(90) % K, -1) if labelled else torch.full((90,), -1)
    start = x[:K].float()
    model = LaplacianKMeans(K, smoothness, n_neighbors=3, init=start, steps=7, max_iter=max_iter)
    model.fit(x, labels)
    y, centers = definition(x, start, smoothness, nearest(x, 3), labels, 7, max_iter)
    tolerance = {"rtol": 1e-8, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(model.memberships_.double(), y, **tolerance)
    torch.testing.assert_close(model.cluster_centers_.double(), centers, **tolerance)
    assert model.labels_.equal(y.argmax(1)) and (max_iter > 0 or model.n_iter_ == 0)


def test_the_authors_figure():
    x = torch.nn.functional.normalize(waves(6, 3))
    triangles = [[1, 2], [0, 2], [0, 1], [4, 5], [3, 5], [3, 4]]
    model = LaplacianKMeans(2, 0.7, init=x[[0, 3]], steps=50, max_iter=0).fit(x, neighbors=triangles)
    assert model.memberships_[0, 0].item() == pytest.approx(0.882692, abs=1e-6)
    assert model.labels_.tolist() == [0, 1, 0, 1, 0, 0]


def test_without_smoothness_it_is_k_means():
    x = blobs(1)
    model = LaplacianKMeans(K, 0, init=x[:K], max_iter=300).fit(x)
    expected = KMeans(K, init=x[:K], tol=0).fit(x)
    assert model.labels_.equal(expected.labels_) and model.predict(x).equal(expected.labels_)
    torch.testing.assert_close(model.cluster_centers_, expected.cluster_centers_)


def test_supports_are_the_start():
    x, labels = blobs(2), torch.where(torch.arange(400) < 3 * K, torch.arange(400) % K, -1)
    model = LaplacianKMeans(K, max_iter=0).fit(x, labels)
    means = torch.stack([x[labels == k].mean(0) for k in range(K)])
    torch.testing.assert_close(model.cluster_centers_, means)
    assert model.labels_[: 3 * K].equal(labels[: 3 * K])
    assert (model.memberships_[: 3 * K].amax(1) == 1).all()


def test_neighbours_decide_where_distances_hardly_do():
    x = torch.tensor([[0.0], [1.2], [1.3], [1.6], [3.0], [3.1]])  # the fourth is nearer to 3, its neighbours to 0
    centers = torch.tensor([[0.0], [3.0]])
    assert LaplacianKMeans(2, 0, init=centers, max_iter=0).fit(x).labels_.tolist() == [0, 0, 0, 1, 1, 1]
    assert LaplacianKMeans(2, 1.0, init=centers, max_iter=0).fit(x).labels_.tolist() == [0, 0, 0, 0, 1, 1]


def test_shift_rotation_and_order_do_not_count():
    x, order = blobs(3), torch.randperm(400)
    rotation = torch.linalg.qr(waves(7, 7)).Q
    expected = LaplacianKMeans(K, init=x[:K]).fit(x)
    moved = x @ rotation + 2
    torch.testing.assert_close(LaplacianKMeans(K, init=moved[:K]).fit(moved).memberships_, expected.memberships_)
    shuffled = LaplacianKMeans(K, init=x[:K]).fit(x[order])
    torch.testing.assert_close(shuffled.memberships_, expected.memberships_[order])


def test_far_from_the_origin_float32_is_as_good():
    x = blobs(3).float() + 1000
    expected = LaplacianKMeans(K, init=x[:K].double()).fit(x.double())
    model = LaplacianKMeans(K, init=x[:K]).fit(x)
    torch.testing.assert_close(model.memberships_.double(), expected.memberships_, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.cluster_centers_.double(), expected.cluster_centers_)


def test_autocast_changes_nothing():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    expected = LaplacianKMeans(K).fit(x).memberships_
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LaplacianKMeans(K).fit(x).memberships_, expected)


def test_arrays_give_arrays():
    x = blobs(4)
    expected = LaplacianKMeans(K).fit(x)
    model = LaplacianKMeans(K).fit(x.numpy())
    assert isinstance(model.memberships_, np.ndarray)
    np.testing.assert_array_equal(model.labels_, expected.labels_.numpy())
    np.testing.assert_array_equal(model.predict(x.numpy()), expected.predict(x).numpy())
    assert repr(clone(LaplacianKMeans(3, 0.5))) == "LaplacianKMeans(n_clusters=3, smoothness=0.5)"


def test_one_row_has_no_neighbour():
    assert LaplacianKMeans(1).fit(torch.ones(1, 2)).labels_.tolist() == [0]


X = torch.arange(10.0).view(5, 2)
ERRORS = {
    "smoothness": ({"smoothness": -1}, {}, "smoothness: expected a number >= 0, got -1"),
    "neighbours": ({"n_neighbors": 0}, {}, "n_neighbors: expected a positive integer, got 0"),
    "iterations": ({"max_iter": -1}, {}, "max_iter: expected an integer >= 0, got -1"),
    "init": ({"init": "random"}, {}, "init: expected \"k-means\\+\\+\" or centres, got 'random'"),
    "centres": ({"init": X[:1]}, {}, r"init: expected centres \[2, 2\], got \[1, 2\]"),
    "nan in centres": ({"init": X[:2] * torch.nan}, {}, "init: expected finite values"),
    "no rows": ({"init": X[:2]}, {"X": X[:0]}, "X: expected at least one row, got none"),
    "rows": ({"n_clusters": 6}, {}, "X: expected at least n_clusters=6 rows, got 5"),
    "nan": ({}, {"X": X * torch.nan}, "X: expected finite values"),
    "labels": ({}, {"labels": [0, 2, -1, -1, -1]}, "labels: expected labels below n_clusters=2, got 2"),
    "graph": ({}, {"neighbors": [[1.0]] * 5}, r"neighbors: expected integers \[5, m\], got torch.float32 \[5, 1\]"),
    "edge": ({}, {"neighbors": [[5]] * 5}, "neighbors: expected rows 0 to 4, got 5 to 5"),
}


@pytest.mark.parametrize("options, given, message", ERRORS.values(), ids=ERRORS)
def test_errors(options, given, message):
    with pytest.raises(ValueError, match=message):
        LaplacianKMeans(**{"n_clusters": 2} | options).fit(**{"X": X} | given)

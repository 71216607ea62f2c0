"""KMeans as an estimator of scikit-learn's: its checks, its tools, arrays in and out, and what it would have done."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans as Oracle
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import ccl_fast
from ccl_fast.clustering import KMeans
from tests.ops.kmeans_cases import blobs

EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": "random numbers belong to rows, so others are drawn when rows are "
    "repeated or left out; scikit-learn's own KMeans is excused too",
}


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # some checks have few rows
def test_scikit_learns_own_checks():
    results = check_estimator(KMeans(), expected_failed_checks=EXPECTED, on_skip=None)
    assert len(results) > 40
    assert {result["check_name"] for result in results if result["status"] == "xfail"} == EXPECTED.keys()


def test_names_and_defaults_are_scikit_learns():
    ours, theirs = KMeans().get_params(), Oracle().get_params()
    assert {name: theirs[name] for name in ours if name in theirs} | {"random_state": 0, "verbose": False} == {
        name: value for name, value in ours.items() if name in theirs
    }
    assert theirs.keys() <= ours.keys()
    assert ccl_fast.KMeans is KMeans
    assert repr(KMeans(3, tol=0)) == "KMeans(n_clusters=3, tol=0)"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("max_iter", [1, 2, 5, 300])
@pytest.mark.parametrize("tol", [0, 1e-4, 0.3])
def test_iterations_are_counted_as_in_scikit_learn(dtype, max_iter, tol):
    for seed in range(8):
        x = blobs(seed).numpy().astype(dtype)
        given = {"n_clusters": 9, "init": x[:9], "max_iter": max_iter, "tol": tol}
        ours, theirs = KMeans(**given).fit(x), Oracle(**given).fit(x)
        assert ours.n_iter_ == theirs.n_iter_
        np.testing.assert_array_equal(ours.labels_, theirs.labels_)
        np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-4, atol=1e-5)


def test_the_default_start_is_as_good_as_scikit_learns():
    x = blobs(0, n=1500, d=6, k=30).numpy()

    def median(kind, **options):
        return np.median([kind(30, max_iter=1, random_state=seed, **options).fit(x).inertia_ for seed in range(20)])

    assert median(KMeans) < 1.05 * median(Oracle) < 0.9 * median(KMeans, init="plain-k-means++")


def test_starts_by_default():
    x = blobs(1)
    assert KMeans(9, init="random").fit(x).inertia_ == KMeans(9, init="random", n_init=10).fit(x).inertia_
    assert KMeans(9, init="random").fit(x).inertia_ < KMeans(9, init="random", n_init=1).fit(x).inertia_
    assert KMeans(9).fit(x).cluster_centers_.equal(KMeans(9, n_init=1).fit(x).cluster_centers_)


def some_rows(x, n_clusters, random_state):
    return x[random_state.permutation(len(x))[:n_clusters]]


@pytest.mark.parametrize("n_init", ["auto", 1, 3])
def test_a_function_makes_the_centres_as_in_scikit_learn(n_init):
    x = blobs(7).numpy()
    calls = []

    def init(x, n_clusters, random_state):
        calls.append(x)
        return some_rows(x, n_clusters, random_state)

    ours = KMeans(9, init=init, n_init=n_init, random_state=3).fit(x)
    theirs = Oracle(9, init=some_rows, n_init=n_init, random_state=3).fit(x)
    assert len(calls) == (10 if n_init == "auto" else n_init) and all(call is x for call in calls)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    assert ours.n_iter_ == theirs.n_iter_ and ours.inertia_ == pytest.approx(theirs.inertia_)
    assert (
        clone(KMeans(9, init=some_rows))
        .fit(torch.from_numpy(x))
        .labels_.equal(torch.from_numpy(KMeans(9, init=some_rows).fit(x).labels_))
    )


def test_a_function_of_every_problem():
    x = torch.stack([blobs(seed) for seed in range(2)])
    given = torch.stack([y[:4] for y in x])
    for first in (lambda y, k, random_state: y[:k], lambda y, k, random_state: y[:k].tolist()):
        assert KMeans(4, init=first).fit(x).labels_.equal(KMeans(4, init=given).fit(x).labels_)
    assert KMeans(2, init=lambda y, k, random_state: y[:k]).fit([[0.0], [1.0], [9.0]]).labels_.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x: x[:3], r"init: expected floating-point centres \[4, 7\], got torch.float64 \[3, 7\]"),
        (lambda x: "four", "init: expected a function that returns centres, got 'four'"),
        (lambda x: x[:4] * np.nan, "init: expected finite values"),
    ],
)
def test_what_a_function_makes_is_checked(made, message):
    with pytest.raises(ValueError, match=message):
        KMeans(4, init=lambda x, k, random_state: made(x)).fit(blobs(0).numpy())


def test_algorithm_and_copy_x_change_nothing():
    x = blobs(8).numpy()
    before, expected = x.copy(), KMeans(9).fit(x)
    for options in ({"algorithm": "elkan"}, {"copy_x": False}):
        model = KMeans(9, **options).fit(x)
        np.testing.assert_array_equal(model.labels_, expected.labels_)
        np.testing.assert_array_equal(model.cluster_centers_, expected.cluster_centers_)
    np.testing.assert_array_equal(x, before)
    with pytest.raises(ValueError, match="algorithm: expected one of 'lloyd', 'elkan', got 'auto'"):
        KMeans(9, algorithm="auto").fit(x)
    with pytest.raises(ValueError, match="copy_x: expected True or False, got 2"):
        KMeans(9, copy_x=2).fit(x)


def test_sparse_rows_are_refused_with_what_to_do():
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"Sparse data was passed for X, .* Use '.toarray\(\)'"):
        KMeans(4).fit(sparse.csr_matrix(blobs(0).numpy()))
    with pytest.raises(ValueError, match=r"X: expected dense rows, got torch.sparse_coo: X.to_dense\(\) has them"):
        KMeans(4).fit(blobs(0).to_sparse())


def test_y_is_not_taken_for_weights():
    x, y = blobs(2), torch.rand(400)
    for model in (KMeans(5).fit(x, y), clone(KMeans(5)).fit(x, y.numpy())):
        assert model.cluster_centers_.equal(KMeans(5).fit(x).cluster_centers_)
    model = KMeans(5).fit(x)
    assert KMeans(5).fit_predict(x, y).equal(model.labels_)
    assert KMeans(5).fit_transform(x, y).equal(model.transform(x))
    assert model.score(x, y) == model.score(x) != model.score(x, y, y)


FORMS = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "backwards": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes(), dtype=x.dtype).reshape(x.shape),
    "list": np.ndarray.tolist,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_arrays_give_what_tensors_give(form, dtype):
    x = blobs(3).numpy().astype(dtype)
    given = FORMS[form](x)
    tensor = torch.from_numpy(np.asarray(x, dtype=np.float64) if form == "list" else x)
    weights = np.random.default_rng(0).random(400)
    array, expected = KMeans(9).fit(given, sample_weight=weights), KMeans(9)
    expected.fit(tensor, sample_weight=torch.from_numpy(weights))
    for name in ("cluster_centers_", "labels_"):
        own, other = getattr(array, name), getattr(expected, name)
        assert type(own) is np.ndarray and type(other) is torch.Tensor
        assert torch.from_numpy(own).equal(other)
    assert (array.inertia_, array.n_iter_) == (expected.inertia_, expected.n_iter_)
    assert type(array.inertia_) is float and type(array.n_iter_) is int
    for method in ("predict", "transform"):
        own, other = getattr(array, method)(given), getattr(array, method)(tensor)  # whatever was fitted
        assert type(own) is np.ndarray and type(other) is torch.Tensor
        assert torch.from_numpy(own).equal(other) and other.equal(getattr(expected, method)(tensor))
    assert array.score(given, sample_weight=weights.tolist()) == expected.score(tensor, sample_weight=weights)
    assert (array.get_feature_names_out() == [f"kmeans{i}" for i in range(9)]).all()


def test_a_batch_of_problems_as_an_array():
    x = torch.stack([blobs(seed) for seed in range(3)])
    array, tensor = KMeans(4).fit(x.numpy()), KMeans(4).fit(x)
    for name in ("cluster_centers_", "labels_", "inertia_", "n_iter_"):
        np.testing.assert_array_equal(getattr(array, name), getattr(tensor, name).numpy())
    np.testing.assert_array_equal(array.predict(x.numpy()), tensor.labels_)
    assert array.transform(x.numpy()).shape == (3, 400, 4) and array.n_features_in_ == tensor.n_features_in_ == 7


def test_integers_and_one_weight_for_all():
    x = np.random.default_rng(0).integers(0, 50, (100, 3))
    model = KMeans(4).fit(x, sample_weight=2)
    assert model.inertia_ == pytest.approx(2 * KMeans(4).fit(x.astype(float)).inertia_)


def test_a_memory_map_is_read_in_chunks(tmp_path):
    x = blobs(4).float().numpy()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    model = KMeans(9, batch_size=64).fit(mapped)
    np.testing.assert_array_equal(model.labels_, KMeans(9, batch_size=64).fit(x).labels_)
    np.testing.assert_array_equal(model.predict(mapped), model.labels_)


def test_data_frames_have_named_features():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(blobs(5).numpy(), columns=list("abcdefg"))
    model = KMeans(4).fit(frame)
    assert list(model.feature_names_in_) == list("abcdefg")
    with pytest.raises(ValueError, match="The feature names should match"):
        model.predict(frame[list("gfedcba")])
    assert list(model.set_output(transform="pandas").transform(frame).columns) == [f"kmeans{i}" for i in range(4)]
    assert not hasattr(model.fit(blobs(5)), "feature_names_in_")


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_a_copy_has_the_settings_and_a_pickle_the_results(kind):
    x = blobs(6) if kind == "tensor" else blobs(6).numpy()
    model = KMeans(5, init=x[:5], metric="cosine", tol=0).fit(x)
    copied = clone(model)
    assert not hasattr(copied, "labels_") and copied.tol == 0
    assert (copied.fit(x).labels_ == model.labels_).all()
    again = pickle.loads(pickle.dumps(model))
    assert (again.predict(x) == model.labels_).all() and again.inertia_ == model.inertia_
    assert copied.set_params(n_clusters=4, init="random").get_params()["n_clusters"] == 4
    assert copied.fit(x).cluster_centers_.shape == (4, 7)


def test_in_a_pipeline_and_a_grid_search():
    x = blobs(7).numpy() * [1, 2, 3, 4, 5, 6, 7]
    pipeline = make_pipeline(StandardScaler(), KMeans(9))
    labels = pipeline.fit_predict(x)
    np.testing.assert_array_equal(labels, KMeans(9).fit_predict(StandardScaler().fit_transform(x)))
    search = GridSearchCV(pipeline, {"kmeans__n_clusters": [2, 9], "kmeans__metric": ["euclidean"]}, cv=3).fit(x)
    assert search.best_params_["kmeans__n_clusters"] == 9
    assert search.best_estimator_.transform(x).shape == (400, 9)
    assert search.score(x) == pytest.approx(search.best_estimator_.score(x))


def test_kinds_of_random_state():
    x = blobs(8)

    def start(state):
        return KMeans(9, random_state=state, max_iter=1).fit(x).cluster_centers_

    def differ_and_repeat(make):
        first = make()
        one, two = start(first), start(first)
        again = make()
        assert not one.equal(two)  # a generator moves on
        assert one.equal(start(again)) and two.equal(start(again))

    differ_and_repeat(lambda: np.random.RandomState(3))
    differ_and_repeat(lambda: torch.Generator().manual_seed(3))

    def of_numpy():
        np.random.seed(3)

    differ_and_repeat(of_numpy)
    assert start(0).equal(KMeans(9, max_iter=1).fit(x).cluster_centers_)
    assert not start(1).equal(start(0))

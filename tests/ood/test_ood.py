"""Detectors against their formulas in float64, metrics against scikit-learn on asymmetric data, both in pytorch-ood."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from ccl_fast.errors import ArgumentError, NotFittedError
from ccl_fast.ood import (
    Columns,
    CosineNorm,
    Ensemble,
    LinearSeparation,
    Mahalanobis,
    NearestCenter,
    NearestNeighbor,
    PrototypeScore,
    aupr,
    auroc,
    fpr95,
    neighbors,
    ood_metrics,
)
from ccl_fast.ops.normalize import normalize_rows


def scored(seed: int, n_id: int = 90, n_ood: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    """Few, skewed OOD samples: swapping the classes or the sign changes every metric."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.cat([torch.randn(n_id, generator=generator), 1 + torch.randn(n_ood, generator=generator).exp()])
    order = torch.randperm(len(scores), generator=generator)
    return scores[order], (torch.arange(len(scores)) >= n_id)[order]


def fpr_at_95(is_positive, scores):
    false_positive_rate, true_positive_rate, _ = roc_curve(is_positive, scores, drop_intermediate=False)
    return false_positive_rate[(true_positive_rate >= 0.95).argmax()]


def area_under_precision_recall(is_positive, scores):
    precision, recall, _ = precision_recall_curve(is_positive, scores)
    return auc(recall, precision)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_scikit_learn(seed):
    scores, is_ood = scored(seed)
    assert auroc(scores, is_ood) == pytest.approx(roc_auc_score(is_ood, scores))
    assert auroc(scores, is_ood) > 0.7
    as_ood, as_id = fpr95(scores, is_ood, positive="ood"), fpr95(scores, is_ood, positive="id")
    assert as_ood == pytest.approx(fpr_at_95(is_ood, scores))
    assert as_id == pytest.approx(fpr_at_95(~is_ood, -scores))
    assert as_ood != pytest.approx(as_id)
    as_ood, as_id = aupr(scores, is_ood, positive="ood"), aupr(scores, is_ood, positive="id")
    assert as_ood == pytest.approx(area_under_precision_recall(is_ood, scores))
    assert as_id == pytest.approx(area_under_precision_recall(~is_ood, -scores))
    assert as_ood != pytest.approx(as_id, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("coarse", [False, True], ids=["all scores differ", "ties"])
def test_metrics_equal_those_of_pytorch_ood(seed, coarse):
    metrics = pytest.importorskip("pytorch_ood.metrics").OODMetrics()
    scores, is_ood = scored(seed)
    scores = scores.round() if coarse else scores
    metrics.update(scores, torch.where(is_ood, -1, 3))
    theirs, ours = metrics.compute(), ood_metrics(scores, is_ood)
    names = {"auroc": "AUROC", "aupr_ood": "AUPR-OUT", "aupr_id": "AUPR-IN", "fpr95_ood": "FPR95TPR"}
    assert {name: ours[name] for name in names} == pytest.approx({name: theirs[names[name]] for name in names})


def test_all_metrics_at_once_are_the_single_ones_under_the_name_of_the_positive_class():
    scores, is_ood = scored(0)
    assert ood_metrics(scores, is_ood) == {
        "auroc": auroc(scores, is_ood),
        "aupr_ood": aupr(scores, is_ood, positive="ood"),
        "aupr_id": aupr(scores, is_ood, positive="id"),
        "fpr95_ood": fpr95(scores, is_ood, positive="ood"),
        "fpr95_id": fpr95(scores, is_ood, positive="id"),
    }
    assert len(set(ood_metrics(scores, is_ood).values())) == 5


def test_metrics_count_ties_and_ignore_the_scale():
    scores, is_ood = scored(0)
    coarse = scores.round()
    assert auroc(coarse, is_ood) == pytest.approx(roc_auc_score(is_ood, coarse))
    assert fpr95(coarse, is_ood, positive="id") == pytest.approx(fpr_at_95(~is_ood, -coarse))
    assert aupr(coarse, is_ood, positive="id") == pytest.approx(area_under_precision_recall(~is_ood, -coarse))
    for transformed in (scores + 100, 1e-6 * scores, scores.double() * 1e6):  # saturates a sigmoid
        assert auroc(transformed.double(), is_ood) == pytest.approx(roc_auc_score(is_ood, transformed))
    assert auroc(torch.zeros(10), torch.arange(10) < 3) == 0.5
    assert auroc(is_ood.float(), is_ood) == 1
    assert fpr95(is_ood.float(), is_ood, positive="ood") == 0


def test_auroc_is_rounded_once():
    for seed in range(20):
        scores, is_ood = scored(seed, n_id=7 + 40 * seed, n_ood=3 + 11 * seed)
        scores = scores.round(decimals=1)
        ood, inside = scores[is_ood, None], scores[~is_ood]
        halves = 2 * int((ood > inside).sum()) + int((ood == inside).sum())
        assert auroc(scores, is_ood) == halves / (2 * len(ood) * len(inside))
        assert auroc(scores.bfloat16(), is_ood) == auroc(scores.bfloat16().float(), is_ood)
        separated = scores + 100 * is_ood
        assert set(ood_metrics(separated, is_ood).values()) == {1.0, 0.0}  # areas; false positives
        assert auroc(-separated, is_ood) == 0
    assert auroc(torch.tensor([-torch.inf, 0, torch.inf, torch.inf]), torch.tensor([0, 0, 1, 0]).bool()) == 2.5 / 3


def test_wrong_arguments_of_metrics():
    scores, is_ood = scored(0)
    for metric in (fpr95, aupr):
        with pytest.raises(ValueError, match=r"^positive: expected .* got 'in'"):
            metric(scores, is_ood, positive="in")
    with pytest.raises(ValueError, match=r"^is_ood: expected both"):
        auroc(scores, torch.ones_like(is_ood))
    with pytest.raises(ValueError, match=r"^is_ood: expected bool"):
        auroc(scores, is_ood.float())
    with pytest.raises(ValueError, match=r"^scores: expected numbers, got NaN"):
        auroc(scores * float("nan"), is_ood)
    with pytest.raises(ValueError, match=r"^scores: expected a floating-point"):
        auroc(scores.long(), is_ood)


NO_NUMBERS = {
    "a dict": ({"scores": 1}, "a tensor or an array, got dict"),
    "a list": ([0.5] * 127, "a tensor or an array, got list"),
    "None": (None, "a tensor or an array, got NoneType"),
    "a masked array": (np.ma.masked_array(np.zeros(127), np.arange(127) > 3), "a tensor or an array, got MaskedArray"),
    "objects": (np.array([None] * 127), "numbers, got an array of object"),
    "names": (np.array(["a"] * 127), "numbers, got an array of <U1"),
    "complex numbers": (np.zeros(127, complex), "numbers, got an array of complex128"),
}


@pytest.mark.parametrize("wrong, message", NO_NUMBERS.values(), ids=NO_NUMBERS)
def test_metrics_of_what_is_no_tensor(wrong, message):
    scores, is_ood = scored(0)
    for metric in (ood_metrics, auroc, lambda *given: aupr(*given, "id"), lambda *given: fpr95(*given, "ood")):
        with pytest.raises(ValueError, match=f"^scores: expected {message}"):
            metric(wrong, is_ood)
        with pytest.raises(ValueError, match=f"^is_ood: expected {message}"):
            metric(scores, wrong)


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64, np.longdouble, ">f8"))
def test_metrics_of_arrays(dtype):
    scores, is_ood = scored(0)
    array = scores.numpy().astype(dtype)
    expected = ood_metrics(torch.from_numpy(array.astype(float)), is_ood)
    array.flags.writeable = False
    reverse = slice(None, None, -1)  # strides below 0
    assert ood_metrics(array, is_ood.numpy()) == ood_metrics(array, is_ood) == expected
    assert ood_metrics(array[reverse], is_ood.numpy()[reverse]) == expected
    assert auroc(array, is_ood.numpy()) == expected["auroc"]
    for positive in ("ood", "id"):
        assert aupr(array, is_ood.numpy(), positive) == expected[f"aupr_{positive}"]
        assert fpr95(array, is_ood.numpy(), positive) == expected[f"fpr95_{positive}"]
    with pytest.raises(ValueError, match=r"^is_ood: expected bool \[127\], got torch.int64 \[127\]"):
        ood_metrics(array, is_ood.numpy().astype(np.uint8))
    with pytest.raises(ValueError, match=r"^scores: expected a floating-point tensor \[N\], got torch.int64"):
        ood_metrics(array.astype(np.int16), is_ood)


def test_metrics_of_scores_with_a_gradient():
    scores, is_ood = scored(0)
    assert ood_metrics(scores.clone().requires_grad_(), is_ood) == ood_metrics(scores, is_ood)


@pytest.fixture
def features():
    """Training features of three clusters of different size and shape, and others."""
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 60 + [1] * 40 + [2] * 20)
    stretch = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    center = 3 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    x = center[y] + stretch[y] * torch.randn(len(y), 6, generator=generator, dtype=torch.float64)
    new = 3 * torch.randn(50, 6, generator=generator, dtype=torch.float64)
    return x, y, new


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)


@pytest.mark.parametrize("tile", [(512, 8192), (7, 13), (50, 1)])
@pytest.mark.parametrize("k", [1, 4, 120])
def test_nearest_neighbor_in_tiles_of_any_size(features, k, tile, monkeypatch):
    x, _, new = features
    monkeypatch.setattr(neighbors, "CPU_TILE", tile)
    expected = 1 - cosine(new, x).sort(1, descending=True).values[:, k - 1]
    torch.testing.assert_close(NearestNeighbor(k=k).fit_features(x).predict_features(new), expected)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize(
    "detector", [NearestNeighbor(), NearestNeighbor(k=5), CosineNorm(), NearestCenter(n_clusters=400), PrototypeScore()]
)
def test_the_matrix_of_cosines_never_exists(detector, monkeypatch):
    monkeypatch.setattr(neighbors, "CPU_TILE", (64, 64))
    monkeypatch.setattr("ccl_fast.ops.logsumexp.blocked.BLOCK", 64)
    x = torch.randn(600, 8)
    detector.fit_features(x, torch.arange(600))
    with LargestTensor() as largest:
        detector.predict_features(torch.randn(500, 8))
    assert 500 <= largest.elements <= 600 * 8


def test_cosine_norm(features):
    x, _, new = features
    expected = -cosine(new, x).amax(1) * new.norm(dim=1)
    torch.testing.assert_close(CosineNorm().fit_features(x).predict_features(new), expected)
    assert (expected - NearestNeighbor().fit_features(x).predict_features(new)).std() > 0.1


@pytest.mark.parametrize("make", [NearestNeighbor, CosineNorm])
def test_a_neighbour_detector_keeps_so_many_rows_at_random(features, make):
    x, _, new = features
    everything = make().fit_features(x).predict_features(new)
    assert make(max_rows=len(x)).fit_features(x).predict_features(new).equal(everything)
    kept = make(max_rows=20, seed=3).fit_features(x)
    assert len(kept.features) == 20
    assert kept.features.equal(make(max_rows=20, seed=3).fit_features(x).features)
    assert not kept.features.equal(make(max_rows=20, seed=4).fit_features(x).features)
    rows = [(normalize_rows(x) == row).all(1).nonzero().item() for row in kept.features]
    assert rows == sorted(set(rows))
    assert kept.predict_features(new).equal(make().fit_features(x[rows]).predict_features(new))


def test_nearest_center(features):
    x, y, new = features
    unit = x / x.norm(dim=1, keepdim=True)
    centers = torch.stack([unit[y == c].mean(0) for c in range(3)])
    expected = 1 - cosine(new, centers).amax(1)
    torch.testing.assert_close(NearestCenter().fit_features(x, y).predict_features(new), expected)


@pytest.mark.parametrize("temperature", (0.1, 1.0))
def test_scores_of_prototypes(features, temperature):
    x, y, new = features
    learned = 3 * torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centers = torch.stack([(x / x.norm(dim=1, keepdim=True))[y == c].mean(0) for c in range(3)])
    for given, prototypes in ((None, centers), (learned, learned)):
        logits = cosine(new, prototypes)
        expected = {
            "energy": -temperature * (logits / temperature).logsumexp(1),
            "max_softmax": -(logits / temperature).softmax(1).amax(1),
            "max_logit": -logits.amax(1),
        }
        for score, scores in expected.items():
            detector = PrototypeScore(score, prototypes=given, temperature=temperature).fit_features(x, y)
            torch.testing.assert_close(detector.predict_features(new), scores)


def test_wrong_arguments_of_prototype_scores(features):
    x, y, _ = features
    for given, message in (
        ({"score": "msp"}, r"^score: expected one of .*'energy'.*got 'msp'"),
        ({"temperature": 0}, r"^temperature: expected a positive number, got 0"),
        ({"prototypes": torch.ones(3)}, r"^prototypes: expected shape \[rows, d\], got \[3\]"),
        ({"prototypes": torch.ones(0, 6)}, r"^prototypes: expected at least one row, got none"),
        ({"prototypes": torch.full((2, 6), torch.nan)}, r"^prototypes: expected finite values"),
        ({"prototypes": torch.ones(2, 5)}, r"^prototypes: expected shape \[rows, 6\], got \[2, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            PrototypeScore(**given).fit_features(x, y)


def test_mahalanobis(features):
    x, y, new = features
    unit, new_unit = (v / v.norm(dim=1, keepdim=True) for v in (x, new))
    standard, new_standard = ((v - unit.mean(0)) / unit.std(0, correction=0) for v in (unit, new_unit))
    distances = []
    for c in range(3):
        cluster = standard[y == c]
        centered = cluster - cluster.mean(0)
        covariance = centered.T @ centered / len(cluster)
        shrunk = 0.8 * covariance + 0.2 * covariance.trace() / 6 * torch.eye(6, dtype=torch.float64)
        difference = new_standard - cluster.mean(0)
        distances.append(((difference @ shrunk.inverse()) * difference).sum(1))
    expected = torch.stack(distances).amin(0)
    torch.testing.assert_close(Mahalanobis(shrinkage=0.2).fit_features(x, y).predict_features(new), expected)


def test_mahalanobis_with_a_shared_covariance(features):
    x, y, new = features
    unit, new_unit = (v / v.norm(dim=1, keepdim=True) for v in (x, new))
    standard, new_standard = ((v - unit.mean(0)) / unit.std(0, correction=0) for v in (unit, new_unit))
    means = torch.stack([standard[y == c].mean(0) for c in range(3)])
    centered = standard - means[y]
    covariance = centered.T @ centered / len(x)
    shrunk = 0.8 * covariance + 0.2 * covariance.trace() / 6 * torch.eye(6, dtype=torch.float64)
    differences = new_standard[:, None] - means
    expected = ((differences @ shrunk.inverse()) * differences).sum(2).amin(1)
    detector = Mahalanobis(shrinkage=0.2, covariance="shared").fit_features(x, y)
    assert detector.is_shared and detector.factors.shape == (1, 6, 6)
    torch.testing.assert_close(detector.predict_features(new), expected)


def test_covariances_that_would_be_too_large_are_shared(features, monkeypatch):
    x, y, new = features
    of_each, shared = (
        Mahalanobis(covariance=which).fit_features(x, y).predict_features(new) for which in ("each", "shared")
    )
    assert not torch.allclose(of_each, shared)
    for most, expected in ((3 * 6 * 6, of_each), (3 * 6 * 6 - 1, shared)):
        monkeypatch.setattr("ccl_fast.ood.clusters.MOST_COVARIANCES", most)
        detector = Mahalanobis().fit_features(x, y)
        assert detector.is_shared == (expected is shared)
        assert detector.predict_features(new).equal(expected)
    # A width of ResNet-50's: one covariance of 2,048 features instead of 25,000.
    assert Mahalanobis()._shares(25_000, 2048)


DETECTORS = {
    "nearest neighbour": NearestNeighbor,
    "third neighbour": lambda **options: NearestNeighbor(k=3, **options),
    "cosine x norm": CosineNorm,
    "centre": lambda **options: NearestCenter(n_clusters=3, **options),
    "mahalanobis": lambda **options: Mahalanobis(n_clusters=3, **options),
    "mahalanobis, shared": lambda **options: Mahalanobis(n_clusters=3, covariance="shared", **options),
    "ensemble": lambda **options: Ensemble(
        [NearestNeighbor(k=3), NearestCenter(n_clusters=3), Mahalanobis(n_clusters=3)], **options
    ),
    "linear separation": LinearSeparation,
    "energy": lambda **options: PrototypeScore("energy", n_clusters=3, **options),
    "largest softmax": lambda **options: PrototypeScore("max_softmax", n_clusters=3, **options),
    "largest logit": lambda **options: PrototypeScore("max_logit", n_clusters=3, **options),
}
every_detector = pytest.mark.parametrize("make", DETECTORS.values(), ids=DETECTORS)


# (The linear separation looks for outliers among the rows that it is fitted to.)
@pytest.mark.parametrize("make", [make for make in DETECTORS.values() if make is not LinearSeparation])
def test_higher_is_more_outlying(features, make):
    x, _, new = features
    detector = make()
    assert detector.fit_features(x[::2]) is detector
    inside, outside = detector.predict_features(x[1::2]), detector.predict_features(new)
    is_ood = torch.arange(len(inside) + len(outside)) >= len(inside)
    assert auroc(torch.cat([inside, outside]), is_ood) > (0.7 if make is CosineNorm else 0.9)
    longer = detector.predict_features(5 * new)
    torch.testing.assert_close(longer, 5 * outside if make is CosineNorm else outside)


@every_detector
def test_rows_with_a_negative_label_are_ignored(features, make):
    x, y, new = features
    scores = make().fit_features(x, y).predict_features(new)
    mixed, labels = torch.cat([new[:9], x]), torch.cat([torch.full((9,), -1), y])
    torch.testing.assert_close(make().fit_features(mixed, labels).predict_features(new), scores)


@every_detector
@pytest.mark.parametrize("dtype", (torch.int8, torch.int16, torch.int32, torch.float16, torch.float32, torch.float64))
def test_dtypes_of_labels(features, make, dtype):
    x, y, new = features
    y = torch.where(torch.arange(len(y)) % 5 == 0, -1, y)
    scores = make().fit_features(x, y).predict_features(new)
    torch.testing.assert_close(make().fit_features(x, y.to(dtype)).predict_features(new), scores)
    loader = DataLoader(TensorDataset(x, y.to(dtype)), batch_size=50)
    torch.testing.assert_close(make(model=nn.Identity()).fit(loader).predict(new), scores)


@every_detector
def test_the_names_of_clusters_do_not_count(features, make):
    x, y, new = features
    scores = make().fit_features(x, y).predict_features(new)
    names = torch.tensor([7, 0, 1000], dtype=torch.int32)
    torch.testing.assert_close(make().fit_features(x, names[y]).predict_features(new), scores)


@every_detector
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_features_are_computed_with_in_float32_also_under_autocast(features, make, dtype):
    x, y, new = features
    x, new = x.to(dtype), new.to(dtype)
    expected = make().fit_features(x.float(), y).predict_features(new.float())
    with torch.autocast("cpu", torch.bfloat16):
        scores = make().fit_features(x, y).predict_features(new)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)


@every_detector
def test_float32_scores_are_those_of_float64(features, make):
    x, y, new = features
    exact = make().fit_features(x, y).predict_features(new)
    assert exact.dtype == torch.float64
    scores = make().fit_features(x.float(), y).predict_features(new)
    torch.testing.assert_close(scores, exact.float(), rtol=1e-3, atol=1e-5)


@every_detector
def test_zero_features_have_a_score(features, make):
    x, y, new = features
    x[3] = 0
    assert make().fit_features(x, y).predict_features(torch.zeros_like(new)).isfinite().all()


@every_detector
def test_no_features_have_no_scores(features, make):
    x, y, new = features
    assert make().fit_features(x, y).predict_features(new[:0]).shape == (0,)


@every_detector
def test_scores_are_made_where_the_detector_is(features, make, kernel_device):
    x, y, new = features
    there = make().fit_features(x.to(kernel_device), y).predict_features(new)
    moved = make().fit_features(x, y).to(kernel_device).predict_features(new)
    assert there.device.type == moved.device.type == kernel_device.type
    expected = make().fit_features(x, y).predict_features(new)
    torch.testing.assert_close(there.cpu(), expected)
    torch.testing.assert_close(moved.cpu(), expected)


@every_detector
def test_a_detector_can_be_pickled_and_copied(features, make):
    x, y, new = features
    detector = make().fit_features(x, y)
    scores = detector.predict_features(new)
    for again in (pickle.loads(pickle.dumps(detector)), copy.deepcopy(detector)):
        assert torch.equal(again.predict_features(new), scores)


def test_mahalanobis_survives_a_cluster_of_one(features):
    x, y, new = features
    y = y.clone()
    y[0] = 7
    assert Mahalanobis().fit_features(x, y).predict_features(new).isfinite().all()


def test_an_ensemble_is_the_mean_of_scores_standardised_by_those_of_unseen_samples(features):
    x, y, new = features
    total = 0
    for make in (NearestNeighbor, Mahalanobis):
        # As many folds as samples: leave-one-out.
        training = torch.cat(
            [
                make()
                .fit_features(torch.cat([x[:i], x[i + 1 :]]), torch.cat([y[:i], y[i + 1 :]]))
                .predict_features(row)
                for i, row in enumerate(x.split(1))
            ]
        )
        total = total + (make().fit_features(x, y).predict_features(new) - training.mean()) / training.std(correction=0)
    ensemble = Ensemble([NearestNeighbor(), Mahalanobis()], folds=len(x)).fit_features(x, y)
    torch.testing.assert_close(ensemble.predict_features(new), total / 2)


def test_an_ensemble_gives_new_samples_of_the_training_distribution_standardised_scores():
    generator = torch.Generator().manual_seed(0)
    x, new = (torch.randn(n, 24, generator=generator) + 2 for n in (200, 2000))
    for member in (NearestNeighbor(), Mahalanobis()):
        scores = Ensemble([member]).fit_features(x).predict_features(new)
        assert scores.mean().abs() < 0.2
        assert 0.8 < scores.std() < 1.25
        seen, unseen = member.predict_features(x), member.predict_features(new)
        assert (unseen.mean() - seen.mean()) / seen.std() > 0.5  # standardised by its own samples, it would not


def test_an_ensemble_repeats_and_survives_a_detector_that_scores_all_alike():
    x, new = torch.ones(20, 3), torch.randn(5, 3)
    first, again = (
        Ensemble([NearestNeighbor(), CosineNorm()], seed=3).fit_features(x).predict_features(new) for _ in range(2)
    )
    assert first.isfinite().all()
    assert torch.equal(first, again)


def test_detectors_of_some_columns_share_a_score_by_their_weights(features):
    x, y, new = features
    parts = [
        Columns(NearestNeighbor(k=2), slice(3)),
        Columns(Mahalanobis(n_clusters=2), slice(3, None), clusters=False),
    ]
    found = Ensemble(parts, weights=[3, 1]).fit_features(x, y).predict_features(new)
    alone = [
        Ensemble([NearestNeighbor(k=2)]).fit_features(x[:, :3], y),
        Ensemble([Mahalanobis(n_clusters=2)]).fit_features(x[:, 3:]),
    ]
    first, second = alone[0].predict_features(new[:, :3]), alone[1].predict_features(new[:, 3:])
    torch.testing.assert_close(found, (3 * first + second) / 4)
    assert Columns(Mahalanobis(), slice(3, None)).fit_features(x, y).detector.means.shape[0] == len(y.unique())


def test_mahalanobis_of_lengths_too(features):
    x, _, new = features
    detector = Mahalanobis(shrinkage=1e-6, normalize=False).fit_features(x.double())
    mean, covariance = x.double().mean(0), torch.cov(x.double().T, correction=0)
    away = new.double() - mean
    expected = (away @ torch.linalg.inv(covariance) * away).sum(1)
    torch.testing.assert_close(detector.predict_features(new.double()), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("active", [0, 1, 2], ids="{} active".format)
def test_a_channel_that_hardly_any_training_sample_uses_drowns_no_other(active):
    x, new = torch.randn(1000, 32), 1.5 * torch.randn(200, 32)
    plain = Ensemble([Mahalanobis(normalize=False)]).fit_features(x).predict_features(new)
    x, new = (torch.cat([part, torch.zeros(len(part), 1)], 1) for part in (x, new))
    x[:active, -1] = 1.0
    with_dead = Ensemble([Mahalanobis(normalize=False)]).fit_features(x)
    found = with_dead.predict_features(new)
    assert found.mean() > 0.5 * plain.mean() > 1
    new[:, -1] = 1.0  # and it still counts
    assert with_dead.predict_features(new).mean() > found.mean() + 0.1


def images_and_labels(seed: int = 0, n: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes of images, and a third with the label -1."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(n) % 3
    bright = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [-1.0, -1.0, 2.0]])[kind].repeat_interleave(4, 1)
    images = bright.view(n, 3, 2, 2) + torch.randn(n, 3, 2, 2, generator=generator)
    return images, torch.where(kind == 2, -1, kind)


class Network(nn.Module):
    """Its features depend on the mode: dropout, and batch normalisation, part of which is always in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 2), nn.Flatten(), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm1d(6)
        self.train()
        self.frozen.eval()

    def forward(self, images):
        assert not torch.is_grad_enabled() and not any(part.training for part in self.modules())
        return self.frozen(self.body(images))

    features = forward


@every_detector
@pytest.mark.parametrize("callable_of", [lambda model: model, lambda model: model.features], ids=["module", "method"])
def test_a_loader_and_a_model_do_as_features_do(make, callable_of):
    model = Network()
    images, labels = images_and_labels()
    new, _ = images_and_labels(1)
    before = copy.deepcopy(model.state_dict())
    detector = make(model=callable_of(model))
    assert detector.fit(DataLoader(TensorDataset(images, labels), batch_size=7), device="cpu") is detector
    scores = detector.predict(new)

    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = make().fit_features(twin(images), labels).predict_features(twin(new))
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(detector(new), expected)
    assert not scores.requires_grad
    assert model.training and model.body.training and not model.frozen.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loader_of_images_alone_means_clusters_of_the_detector_itself():
    images, _ = images_and_labels()
    detector = NearestCenter(n_clusters=2, model=nn.Flatten())
    expected = NearestCenter(n_clusters=2).fit_features(images.flatten(1)).predict_features(images.flatten(1))
    for loader in (images.split(7), DataLoader(TensorDataset(images), batch_size=7)):
        torch.testing.assert_close(detector.fit(loader).predict(images), expected)


def test_a_model_that_fails_gets_its_mode_back():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 2))
    with pytest.raises(RuntimeError):
        NearestNeighbor(model=model).predict(torch.randn(2, 3, 2, 2))
    assert model.training and model[1].training


@every_detector
def test_what_is_missing_is_said(features, make):
    x, y, _ = features
    with pytest.raises(RuntimeError, match=f"^this {type(make()).__name__} is not fitted yet: call fit"):
        make().predict_features(x)
    with pytest.raises(ValueError, match=r"^model: expected one for fit, got None; or use fit_features"):
        make().fit([(x, y)])
    with pytest.raises(ValueError, match=r"^model: expected one for predict, got None; or use predict_features"):
        make().fit_features(x, y).predict(x)
    with pytest.raises(ValueError, match=r"^model: expected a callable images -> features or None, got str"):
        make(model="resnet")
    with pytest.raises(ValueError, match=r"^model\(images\): expected shape \[rows, d\], got \[120, 6, 1\]"):
        make(model=lambda images: images[:, :, None]).fit([(x, y)])
    with pytest.raises(ValueError, match=r"^data_loader: expected at least one image with a label >= 0, got none"):
        make(model=nn.Identity()).fit([(x, y - 9)])
    with pytest.raises(ValueError, match=r"^x: expected at least one row with a label >= 0, got none"):
        make().fit_features(x, y - 9)
    with pytest.raises(ValueError, match=r"^x: expected at least one row, got none"):
        make().fit_features(x[:0])


@every_detector
def test_wrong_features(features, make):
    x, y, _ = features
    with pytest.raises(ValueError, match=r"^y: expected shape \[120\], got \[119\]"):
        make().fit_features(x, y[1:])
    with pytest.raises(ValueError, match=r"^y: expected whole numbers, got torch.float32"):
        make().fit_features(x, y + 0.5)
    with pytest.raises(ValueError, match=r"^y: expected whole numbers, got torch.bool"):
        make().fit_features(x, y >= 0)
    with pytest.raises(ValueError, match=r"^y: expected a torch.Tensor, got ndarray"):
        make().fit_features(x, y.numpy())
    for wrong, name in ((x.numpy(), "ndarray"), ({"x": x}, "dict"), (None, "NoneType")):
        with pytest.raises(ValueError, match=rf"^x: expected a torch.Tensor, got {name}"):
            make().fit_features(wrong, y)
        with pytest.raises(ValueError, match=rf"^x: expected a torch.Tensor, got {name}"):
            make().fit_features(x, y).predict_features(wrong)
        with pytest.raises(ValueError, match=rf"^x: expected a torch.Tensor, got {name}"):
            make(model=nn.Identity()).fit_features(x, y).predict(wrong)
    with pytest.raises(ValueError, match=r"^x: expected shape \[rows, d\], got \[6\]"):
        make().fit_features(x[0])
    with pytest.raises(ValueError, match=r"^x: expected .* got torch.int64"):
        make().fit_features(x.long())
    with pytest.raises(ValueError, match=r"^x: expected shape \[rows, 6\], got \[120, 5\]"):
        make().fit_features(x, y).predict_features(x[:, :5])
    for wrong in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[7, 2] = wrong
        with pytest.raises(ValueError, match=r"^x: expected finite values, got NaN or Inf"):
            make().fit_features(spoilt, y)
        with pytest.raises(ValueError, match=r"^x: expected finite values, got NaN or Inf"):
            make().fit_features(x, y).predict_features(spoilt)


WRONG_BATCHES = {
    "a dict": ({"images": torch.zeros(4, 3), "labels": torch.zeros(4)}, "batches .* as tensors, got dict"),
    "an array": (np.zeros((4, 3)), "batches .* as tensors, got ndarray"),
    "arrays": ((np.zeros((4, 3)), np.zeros(4)), "batches .* as tensors, got images of type ndarray"),
    "nothing": ((), "batches .* as tensors, got tuple"),
}
WRONG_LABELS = {
    "an array": (np.zeros(4), "a torch.Tensor, got ndarray"),
    "a list": ([0, 1, 2, 3], "a torch.Tensor, got list"),
    "masks": (torch.zeros(4, 3), r"shape \[4\], got \[4, 3\]"),
    "too few": (torch.zeros(3), r"shape \[4\], got \[3\]"),
    "a mask": (torch.zeros(4).bool(), "whole numbers, got torch.bool"),
    "fractions": (torch.full((4,), 0.5), "whole numbers, got torch.float32"),
}


@pytest.mark.parametrize("batch, message", WRONG_BATCHES.values(), ids=WRONG_BATCHES)
def test_wrong_batches(batch, message):
    with pytest.raises(ValueError, match=f"^data_loader: expected {message}"):
        NearestNeighbor(nn.Identity()).fit([batch])


@pytest.mark.parametrize("labels, message", WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_wrong_labels_of_batches(labels, message):
    with pytest.raises(ValueError, match=f"^data_loader's labels: expected {message}"):
        NearestNeighbor(nn.Identity()).fit([(torch.zeros(4, 3), labels)])


def test_the_model_comes_first():
    x = torch.randn(20, 4)
    for made, named in (
        (NearestNeighbor(flatten, 3), NearestNeighbor(model=flatten, k=3)),
        (NearestCenter(flatten, 2), NearestCenter(model=flatten, n_clusters=2)),
        (Mahalanobis(flatten, 2), Mahalanobis(model=flatten, n_clusters=2)),
        (CosineNorm(flatten), CosineNorm(model=flatten)),
    ):
        assert made.encoder is flatten
        assert torch.equal(made.fit([x]).predict(x), named.fit([x]).predict(x))
    with pytest.raises(ValueError, match=r"^model: expected a callable images -> features or None, got int"):
        NearestNeighbor(5)


def test_options_of_numpy():
    x = torch.randn(20, 4)
    expected = Ensemble([NearestNeighbor(k=2), Mahalanobis(n_clusters=2, shrinkage=0.25)], weights=[1, 0.5], folds=3)
    detector = Ensemble(
        [
            NearestNeighbor(k=np.int64(2)),
            Mahalanobis(n_clusters=np.int64(2), shrinkage=np.float32(0.25), normalize=np.True_),
        ],
        weights=np.array([1, 0.5], np.float32),
        folds=np.int64(3),
        seed=np.int64(0),
    )
    for part in (expected, detector):
        part.fit_features(x)
    torch.testing.assert_close(detector.predict_features(x), expected.predict_features(x))


def test_errors_of_pytorch_ood():
    """They are both ours and theirs."""
    api = pytest.importorskip("pytorch_ood.api")
    for kind in (RuntimeError, NotFittedError, api.RequiresFittingException):
        with pytest.raises(kind, match=r"^this NearestNeighbor is not fitted yet: call fit or fit_features first"):
            NearestNeighbor(flatten).predict(torch.zeros(4, 3))
    for kind in (ArgumentError, api.ModelNotSetException):
        with pytest.raises(kind, match=r"^model: expected one for predict, got None; or use predict_features"):
            NearestNeighbor().fit_features(torch.randn(4, 3)).predict(torch.zeros(4, 3))


@every_detector
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_state_that_is_taken_over_gives_the_same_scores(features, make, dtype):
    x, y, new = (part if part.dtype == torch.int64 else part.to(dtype) for part in features)
    fitted = Ensemble([Columns(make(), slice(1, None)), make()]).fit_features(x, y)
    state = fitted.state_dict()
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    again = Ensemble([Columns(make(), slice(1, None)), make()])
    assert again.load_state_dict(state) is again
    assert again.predict_features(new).equal(fitted.predict_features(new))
    assert again.to("cpu").predict_features(new.double()).dtype == dtype
    assert again.state_dict().keys() == state.keys()
    with pytest.raises(ValueError, match=r"^x: expected shape \[rows, 6\]"):
        again.predict_features(new[:, 1:])


def test_states_that_are_not_of_such_a_detector(features):
    x, y, _ = features
    state = NearestNeighbor().fit_features(x).state_dict()
    with pytest.raises(NotFittedError, match=r"^this NearestCenter is not fitted yet"):
        NearestCenter().state_dict()
    for wrong in (state | {"more": x}, {"input": x[:0]}, {}, {f"detector.{name}": of for name, of in state.items()}):
        with pytest.raises(ArgumentError, match=r"^state: expected features, input, got"):
            NearestNeighbor().load_state_dict(wrong)
    with pytest.raises(ArgumentError, match=r"^state\['features'\]: expected a torch.Tensor, got str"):
        NearestNeighbor().load_state_dict(state | {"features": "x"})
    theirs = pytest.importorskip("pytorch_ood.detector").KNN(None)
    with pytest.raises(ArgumentError, match=r"^detector: expected one of ccl_fast's, whose state is known, got KNN"):
        Ensemble([theirs]).fit_features(x, y).state_dict()


def test_wrong_arguments_of_detectors(features):
    x, y, _ = features
    with pytest.raises(ValueError, match=r"^k: expected a positive integer, got 0"):
        NearestNeighbor(k=0)
    with pytest.raises(ValueError, match=r"^x: expected at least k=200 rows, got 120"):
        NearestNeighbor(k=200).fit_features(x)
    with pytest.raises(ValueError, match=r"^max_rows: expected at least k=3, got 2"):
        NearestNeighbor(k=3, max_rows=2)
    with pytest.raises(ValueError, match=r"^max_rows: "):
        CosineNorm(max_rows=0)
    with pytest.raises(ValueError, match=r"^x: expected at least k=90 rows, got 80"):
        NearestNeighbor(k=90).fit_features(x, torch.where(y == 1, -1, y))
    with pytest.raises(ValueError, match=r"^X: expected at least n_clusters=121 rows, got 120"):
        NearestCenter(n_clusters=121).fit_features(x)
    with pytest.raises(ValueError, match=r"^n_clusters: expected a positive integer, got 0"):
        Mahalanobis(n_clusters=0)
    with pytest.raises(ValueError, match=r"^seed: expected an integer.*, got 0.5"):
        NearestCenter(seed=0.5)
    with pytest.raises(ValueError, match=r"^shrinkage: expected"):
        Mahalanobis(shrinkage=0)
    with pytest.raises(ValueError, match=r"^detectors: expected a sequence of detectors of features, got none"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"^detectors: expected a sequence of detectors of features, got \['str'\]"):
        Ensemble([NearestNeighbor(), "knn"])
    with pytest.raises(ValueError, match=r"^weights: expected a positive number for each of 1 detectors, got \[1, 2\]"):
        Ensemble([NearestNeighbor()], weights=[1, 2])
    with pytest.raises(ValueError, match=r"^weights\[0\]: expected a positive number, got 0"):
        Ensemble([NearestNeighbor()], weights=[0])
    with pytest.raises(ValueError, match=r"^detector: expected a detector of features, got str"):
        Columns("knn", slice(2))
    with pytest.raises(ValueError, match=r"^columns: expected a slice, got 3"):
        Columns(NearestNeighbor(), 3)
    with pytest.raises(ValueError, match=r"^normalize: expected True or False, got 'no'"):
        Mahalanobis(normalize="no")
    with pytest.raises(ValueError, match=r"^covariance: expected one of 'auto', 'each', 'shared', got 'tied'"):
        Mahalanobis(covariance="tied")
    with pytest.raises(ValueError, match=r"^folds: expected an integer >= 2, got 1"):
        Ensemble([NearestNeighbor()], folds=1)
    with pytest.raises(ValueError, match=r"^x: expected at least folds=5 rows, got 4"):
        Ensemble([NearestNeighbor()]).fit_features(x[:4])
    with pytest.raises(ValueError, match=r"^seed: expected an integer >= 0 and below 2\^63, got '1'"):
        Ensemble([NearestNeighbor()], seed="1")
    with pytest.raises(ValueError, match=r"^speed: expected one of \['k'\], got 'speed'"):
        NearestNeighbor().set_hyperparameters(speed=2)
    with pytest.raises(ValueError, match=r"^k: expected a positive integer, got -1"):
        NearestNeighbor().set_hyperparameters(k=-1)


def test_detectors_do_without_pytorch_ood(features, monkeypatch):
    x, _, new = features
    for name in [name for name in sys.modules if name.split(".")[0] == "pytorch_ood"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytorch_ood", None)  # now importing it fails
    assert NearestNeighbor().fit_features(x).predict_features(new).shape == (50,)
    with pytest.raises(NotFittedError) as caught:
        NearestNeighbor().predict_features(new)
    assert caught.type is NotFittedError


def flatten(images):
    return images.flatten(1)


@pytest.fixture
def benchmark_of_images():
    """A benchmark of pytorch-ood's: two sets of outliers, and test images with class labels."""
    base = pytest.importorskip("pytorch_ood.benchmark").Benchmark
    images, labels = images_and_labels(n=300)
    test_images, test_labels = images_and_labels(1, n=150)
    inside, outside = test_labels >= 0, test_labels < 0

    class TwoSets(base):
        ood_names = ("third class", "noise")

        def train_set(self):
            return TensorDataset(images, labels)

        def test_sets(self, known=True, unknown=True):
            noise = 3 * torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(5))
            ood = (test_images[outside], noise)
            return [
                TensorDataset(
                    torch.cat([test_images[inside], x]), torch.cat([test_labels[inside], torch.full((len(x),), -1)])
                )
                for x in ood
            ]

    return TwoSets()


def test_pytorch_ood_benchmarks_take_these_detectors_and_compute_features_once(benchmark_of_images):
    knn = pytest.importorskip("pytorch_ood.detector").KNN
    batches = []

    def model(images):
        batches.append(len(images))
        return images.flatten(1)

    by_place = [NearestNeighbor(model, 3), NearestCenter(model, 3), Mahalanobis(model, 3), CosineNorm(model)]
    ours = [*(make(model=model) for make in DETECTORS.values()), *by_place]
    training = DataLoader(benchmark_of_images.train_set(), batch_size=32)
    detectors = [detector.fit(training) for detector in [*ours, knn(model, k=3)]]
    batches.clear()
    rows = benchmark_of_images.evaluate(detectors, loader_kwargs={"batch_size": 50}, device="cpu")
    assert sum(batches) == sum(len(part) for part in benchmark_of_images.test_sets())

    results = {(row["Dataset"], i % len(detectors)): row for i, row in enumerate(rows)}
    for name, part in zip(benchmark_of_images.ood_names, benchmark_of_images.test_sets(), strict=True):
        images, labels = part.tensors
        for i, detector in enumerate(ours):
            row, expected = results[name, i], ood_metrics(detector.predict(images), labels < 0)
            assert row["Detector"] == type(detector).__name__
            assert row["AUROC"] == pytest.approx(expected["auroc"])
            assert row["AUPR-IN"] == pytest.approx(expected["aupr_id"])
            assert row["FPR95TPR"] == pytest.approx(expected["fpr95_ood"])
            # (To the first the noise is merely long, to the second unseen.)
            assert row["AUROC"] > 0.8 or isinstance(detector, CosineNorm | LinearSeparation)
        third = list(DETECTORS).index("third neighbour")
        assert results[name, third]["AUROC"] == pytest.approx(results[name, len(ours)]["AUROC"])


def test_a_benchmark_without_caching_and_the_loop_of_pytorch_ood_agree(benchmark_of_images):
    metrics = pytest.importorskip("pytorch_ood.metrics").OODMetrics()
    detector = Mahalanobis(model=flatten).fit(DataLoader(benchmark_of_images.train_set(), batch_size=32))
    for images, labels in DataLoader(benchmark_of_images.test_sets()[0], batch_size=50):
        metrics.update(detector(images), labels)
    row = benchmark_of_images.evaluate(detector, loader_kwargs={"batch_size": 50})[0]
    assert metrics.compute() == pytest.approx({name: row[name] for name in metrics.compute()})


@pytest.mark.parametrize(
    ("detector", "space"),
    [
        (NearestNeighbor(model=flatten), {"k": [1, 3, 150]}),
        (Mahalanobis(model=flatten), {"shrinkage": [0.9, 0.1]}),
        (NearestNeighbor(model=flatten), None),
    ],
    ids=["k", "shrinkage", "its own space"],
)
def test_pytorch_ood_searches_hyperparameters(benchmark_of_images, detector, space):
    search_class = pytest.importorskip("pytorch_ood.utils").GridSearch
    training, validation = (
        DataLoader(part, batch_size=64)
        for part in (benchmark_of_images.train_set(), benchmark_of_images.test_sets()[0])
    )
    search = search_class(detector, training, validation, hyperparameter_space=space)
    best = search.run()
    images, labels = validation.dataset.tensors
    (name,) = search.space
    assert {result["params"][name] for result in search.results_} == set(search.space[name])
    for result in search.results_:
        other = type(detector)(**result["params"], model=flatten).fit(training)
        assert result["score"] == pytest.approx(auroc(other.predict(images), labels < 0))
    assert detector.get_hyperparameters() == best
    assert auroc(detector.predict(images), labels < 0) == pytest.approx(search.best_score_)


def test_scores_of_the_nearest_neighbor_are_half_the_squared_ones_of_pytorch_ood(features):
    knn = pytest.importorskip("pytorch_ood.detector").KNN
    x, y, new = features
    theirs = knn(None, k=4).fit_features(x, y).predict_features(new)
    torch.testing.assert_close(NearestNeighbor(k=4).fit_features(x, y).predict_features(new), theirs.square() / 2)


def test_an_ensemble_takes_detectors_of_pytorch_ood(features):
    knn = pytest.importorskip("pytorch_ood.detector").KNN
    x, y, new = features
    mixed = Ensemble([Mahalanobis(), knn(None, k=2)]).fit_features(x, y)
    scores = mixed.predict_features(torch.cat([x, new]))
    assert auroc(scores, torch.arange(len(scores)) >= len(x)) > 0.9

"""Sums by cluster and distances to centres: as accurate as float32 allows, and the same bits every time."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from ccl_fast.ops.backends import BACKENDS
from ccl_fast.ops.kmeans import distance_blocked
from ccl_fast.ops.kmeans.assign import METRICS
from ccl_fast.ops.kmeans.distance import center_distance
from ccl_fast.ops.kmeans.update import kmeans_update
from tests.ops.kmeans_cases import DTYPES, HALF
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("kmeans_device")


def backends(x: Tensor, operator: str = "kmeans_update") -> list[str]:
    return [name for name, backend in BACKENDS[operator].items() if not backend.obstacles(x.device, x.dtype)]


def reproducible(x: Tensor) -> list[str]:
    """The backends that promise the same bits."""
    return [name for name in backends(x) if name != "reference"]


def exact_sums(x: Tensor, labels: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """By a loop over clusters, in float64, of one problem."""
    x, labels = x.double().cpu(), labels.cpu()
    weights = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.double().cpu()
    members = [labels == cluster for cluster in range(k)]
    sums = torch.stack([(weights[m, None] * x[m]).sum(0) for m in members])
    return sums, torch.stack([weights[m].sum() for m in members])


def assert_sums(x: Tensor, labels: Tensor, k: int, weights: Tensor | None = None, rtol: float = 1e-13) -> None:
    """Every backend's sums err relatively to the sum of magnitudes; [n, d] or [b, n, d]."""
    batch = x if x.ndim == 3 else x[None]
    by_problem = [
        (rows, labels.reshape(batch.shape[:2])[i], k, None if weights is None else weights.reshape(batch.shape[:2])[i])
        for i, rows in enumerate(batch)
    ]
    sums, totals = map(torch.stack, zip(*(exact_sums(*problem) for problem in by_problem), strict=True))
    magnitudes = torch.stack(
        [exact_sums(rows.abs(), y, k, None if w is None else w.abs())[0] for rows, y, k, w in by_problem]
    )
    for backend in backends(x):
        actual = kmeans_update(x, labels, k, weights, backend=backend)
        assert actual[0].dtype == actual[1].dtype == torch.float64
        assert actual[0].shape == (*x.shape[:-2], k, x.shape[-1]) and actual[1].shape == (*x.shape[:-2], k)
        error = (actual[0].cpu().view(sums.shape) - sums).abs()
        assert (error <= rtol * magnitudes).all(), (
            f"{backend}: relative error {(error / magnitudes).nan_to_num().max()}"
        )
        # Weights are rounded to x's precision, and then summed in float64.
        rounded = 1e-13 if weights is None or weights.dtype != torch.float64 or x.dtype == torch.float64 else 6e-8
        torch.testing.assert_close(actual[1].cpu().view(totals.shape), totals, rtol=rounded, atol=0)


# ---- Sums.


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 3, 64, 127, 128, 129, 257])
def test_sums_are_those_of_float64(d, dtype, weighted, kmeans_device):
    for n, k in [(1, 1), (2, 5), (255, 2), (256, 1), (257, 1), (1000, 7), (300, 300)]:
        x = torch.randn(n, d).to(kmeans_device, dtype)
        labels = torch.randint(k, (n,), device=kmeans_device)
        weights = torch.rand(n, device=kmeans_device) if weighted else None
        assert_sums(x, labels, k, weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problems", [1, 2, 3])
def test_a_batch_is_its_problems(problems, dtype, kmeans_device):
    x = torch.randn(problems, 700, 9).to(kmeans_device, dtype)
    labels = torch.randint(4, (problems, 700), device=kmeans_device)
    weights = torch.rand(problems, 700, device=kmeans_device)
    for w in (None, weights):
        assert_sums(x, labels, 4, w)
        for backend in reproducible(x):
            together = kmeans_update(x, labels, 4, w, backend=backend)
            for i in range(problems):
                alone = kmeans_update(x[i], labels[i], 4, None if w is None else w[i], backend=backend)
                assert torch.equal(together[0][i], alone[0]) and torch.equal(together[1][i], alone[1])


def test_empty_clusters_and_weights_of_zero_are_zero(kmeans_device):
    x = torch.randn(600, 5, device=kmeans_device)
    labels = torch.randint(3, (600,), device=kmeans_device) * 2 + 1  # 1, 3, 5 of 0 ... 6
    weights = torch.rand(600, device=kmeans_device)
    weights[labels == 3] = 0
    weights[::2] = 0
    for backend in backends(x):
        sums, totals = kmeans_update(x, labels, 7, weights, backend=backend)
        assert not sums[[0, 2, 3, 4, 6]].any() and not totals[[0, 2, 3, 4, 6]].any()
    assert_sums(x, labels, 7, weights)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weight_dtype", [None, *DTYPES])
def test_any_dtype_of_labels_and_weights(dtype, weight_dtype, kmeans_device):
    labels = torch.randint(6, (500,), device=kmeans_device).to(dtype)
    weights = None if weight_dtype is None else torch.rand(500, device=kmeans_device).to(weight_dtype)
    for x_dtype in DTYPES:
        assert_sums(torch.randn(500, 4).to(kmeans_device, x_dtype), labels, 6, weights)


def test_any_strides(kmeans_device):
    wide = torch.randn(3, 90, 160, device=kmeans_device)
    labels = torch.randint(5, (160, 3), device=kmeans_device)
    weights = torch.rand(160, 3, device=kmeans_device)
    for problems in (1, 3):
        x, y, w = wide[:problems].transpose(1, 2)[..., ::7], labels.T[:problems], weights.T[:problems]
        assert not x.is_contiguous()
        assert_sums(x, y, 5, w)
    assert_sums(wide[0].T, labels[:, 1], 5, weights[0, 0].expand(160))
    assert_sums(wide[0, :1].expand(160, -1), labels[:, 1], 5, weights[:, 2])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 5, 3)])
def test_no_rows_sum_to_zero(shape, kmeans_device):
    x = torch.randn(shape, device=kmeans_device)
    labels = torch.zeros(shape[:-1], dtype=torch.int64, device=kmeans_device)
    for backend, weights in itertools.product(backends(x), (None, torch.ones(shape[:-1], device=kmeans_device))):
        sums, totals = kmeans_update(x, labels, 4, weights, backend=backend)
        assert sums.shape == (*shape[:-2], 4, 3) and totals.shape == (*shape[:-2], 4)
        assert not sums.any() and not totals.any()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_input_gives_the_same_bits(weighted, kmeans_device):
    x = 1e3 * torch.randn(3000, 70, device=kmeans_device)
    labels = torch.randint(9, (3000,), device=kmeans_device)
    weights = torch.rand(3000, device=kmeans_device) if weighted else None
    for backend in reproducible(x):
        first = kmeans_update(x, labels, 9, weights, backend=backend)
        for _ in range(5):
            again = kmeans_update(x, labels, 9, weights, backend=backend)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_other_clusters_do_not_change_a_cluster(weighted, kmeans_device):
    """Not a bit: neither the order of their rows, nor what these are, nor how many."""
    x = torch.randn(2000, 11, device=kmeans_device)
    labels = torch.randint(5, (2000,), device=kmeans_device)
    weights = 1e-6 + torch.rand(2000, device=kmeans_device)
    weights[labels == 0] *= 1e12
    weights[labels == 2] *= 1e-12
    others = (labels != 2).nonzero()[:, 0]
    order = torch.arange(2000, device=kmeans_device)
    order[others] = others[torch.randperm(len(others), device=kmeans_device)]
    fewer = torch.cat([(labels == 2).nonzero()[:, 0], others[:100]]).sort().values
    for backend in reproducible(x):
        before = kmeans_update(x, labels, 5, weights if weighted else None, backend=backend)
        for rows in (order, fewer):
            after = kmeans_update(x[rows], labels[rows], 5, weights[rows] if weighted else None, backend=backend)
            assert torch.equal(before[0][2], after[0][2]) and torch.equal(before[1][2], after[1][2])


def test_a_cluster_of_small_weights_keeps_them(kmeans_device):
    x = torch.randn(900, 3, device=kmeans_device)
    labels = torch.arange(900, device=kmeans_device) // 300
    weights = torch.tensor([1.0, 1e-25, 1e20], device=kmeans_device).repeat_interleave(300)
    assert_sums(x, labels, 3, weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_clusters_far_from_the_origin_are_summed_accurately(dtype, kmeans_device):
    n = 20_000 if kmeans_device.type == "cpu" and dtype in HALF else 200_000
    x = (1e3 + torch.randn(n, 3)).to(kmeans_device, dtype)
    labels = torch.zeros(n, dtype=torch.int64, device=kmeans_device)
    assert_sums(x, labels, 1, rtol=1e-12)
    assert_sums(x, labels, 1, torch.rand(n, device=kmeans_device), rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_exact_where_float64_holds_them(dtype, kmeans_device):
    """Integers whose sum float32 does not hold."""
    n = 100_000
    x = torch.randint(-20, 200, (n, 2)).to(kmeans_device, dtype)
    weights = torch.randint(100, (n,), device=kmeans_device).to(dtype)
    labels = torch.zeros(n, dtype=torch.int64, device=kmeans_device)
    for w in (None, weights):
        expected = exact_sums(x, labels, 1, w)
        for backend in backends(x):
            sums, totals = kmeans_update(x, labels, 1, w, backend=backend)
            assert torch.equal(sums.cpu(), expected[0]) and torch.equal(totals.cpu(), expected[1]), backend


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_mean_of_equal_rows_is_that_row(dtype, kmeans_device):
    labels = torch.zeros(100_000, dtype=torch.int64, device=kmeans_device)
    weights = torch.rand(100_000, device=kmeans_device)
    for value in (1000.1, 1 / 3, 16_777_217 / 3e3):
        x = torch.full((100_000, 1), value, device=kmeans_device).to(dtype)
        for backend in backends(x):
            for w in (None, weights):
                sums, totals = kmeans_update(x, labels, 1, w, backend=backend)
                assert (sums / totals).to(dtype).item() == x[0].item(), backend


def test_a_number_that_is_not_finite_stays_in_its_cluster(kmeans_device):
    for value in (torch.nan, torch.inf):
        x = torch.ones(600, 2, device=kmeans_device)
        x[300, 1] = value
        labels = torch.arange(600, device=kmeans_device) // 200
        for backend in backends(x):
            sums, _ = kmeans_update(x, labels, 3, backend=backend)
            assert sums.isfinite().tolist() == [[True, True], [True, False], [True, True]], backend


def test_inputs_and_generators_stay_as_they_were(kmeans_device):
    x, weights = torch.randn(500, 3, device=kmeans_device), torch.rand(500, device=kmeans_device)
    labels = torch.randint(4, (500,), device=kmeans_device)
    before = [a.clone() for a in (x, labels, weights)]
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    x.requires_grad_(), weights.requires_grad_()
    for backend in backends(x):
        assert not any(out.requires_grad for out in kmeans_update(x, labels, 4, weights, backend=backend))
    assert all(torch.equal(a, b) for a, b in zip((x, labels, weights), before, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()


def test_neither_uninitialised_memory_nor_the_default_dtype_matters(kmeans_device, monkeypatch):
    x, centers = (torch.randn(rows, 70, device=kmeans_device) for rows in (700, 8))
    labels, weights = torch.randint(8, (700,), device=kmeans_device), torch.rand(700, device=kmeans_device)

    def results():
        for backend in reproducible(x):
            yield from kmeans_update(x, labels, 8, weights, backend=backend)
        for metric, backend in itertools.product(METRICS, backends(x, "center_distance")):
            yield center_distance(x[None], centers[None], labels[None], metric=metric, backend=backend)

    expected = list(results())
    empty = torch.empty

    def fill(x):
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    for default in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            actual = list(results())
        finally:
            torch.set_default_dtype(torch.float32)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype and torch.equal(a, e)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"x": [[1.0]]}, r"x: expected a torch.Tensor, got list"),
        ({"x": torch.ones(5, 3, dtype=torch.int64)}, r"x: expected float64.*got torch.int64"),
        ({"x": torch.ones(5)}, r"x: expected shape \[rows, d\] or \[problems, rows, d\], got \[5\]"),
        ({"labels": [0] * 5}, r"labels: expected a torch.Tensor, got list"),
        ({"labels": torch.zeros(4).long()}, r"labels: expected shape \[5\], got \[4\]"),
        ({"labels": torch.zeros(1, 5).long()}, r"labels: expected shape \[5\], got \[1, 5\]"),
        ({"labels": torch.zeros(5)}, r"labels: expected int32 or int64, got torch.float32"),
        ({"labels": torch.zeros(5).bool()}, r"labels: expected int32 or int64, got torch.bool"),
        ({"labels": torch.tensor([0, 1, 2, 1, 0])}, r"labels: expected .*\[0, 2\), got 0 to 2"),
        ({"labels": torch.tensor([0, 1, -1, 1, 0])}, r"labels: expected .*\[0, 2\), got -1 to 1"),
        ({"n_clusters": 0}, r"n_clusters: expected a positive integer, got 0"),
        ({"n_clusters": 2.0}, r"n_clusters: expected a positive integer, got 2.0"),
        ({"weights": [1.0] * 5}, r"weights: expected a torch.Tensor, got list"),
        ({"weights": torch.ones(5, 1)}, r"weights: expected shape \[5\], got \[5, 1\]"),
        ({"weights": torch.ones(5).int()}, r"weights: expected float64.*got torch.int32"),
        (
            {"backend": "triton"},
            r"backend: expected one of 'auto', 'cuda', 'cpu', .*, got 'triton'",
        ),
    ],
    ids=str,
)
def test_errors_name_the_argument(changes, message, kmeans_device):
    arguments = {"x": torch.ones(5, 3), "labels": torch.zeros(5).long(), "n_clusters": 2, **changes}
    arguments = {k: v.to(kmeans_device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        kmeans_update(**arguments)


@pytest.mark.parametrize("name", ["labels", "weights"])
def test_devices_must_be_the_same(name, kmeans_device):
    x, labels = torch.ones(5, 3, device=kmeans_device), torch.zeros(5, dtype=torch.int64, device=kmeans_device)
    arguments = {"labels": labels, "weights": labels.float()}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: expected device {kmeans_device.type}.*of x.*, got meta"):
        kmeans_update(x, n_clusters=2, **arguments)


# ---- Distances.


def exact_distance(x: Tensor, centers: Tensor, labels: Tensor, metric: str, dtype=torch.float64) -> Tensor:
    x, nearest = x.to(dtype), centers.to(dtype).gather(1, labels[..., None].expand_as(x))
    if metric == "euclidean":
        return (x - nearest).square().sum(-1)
    lengths = x.norm(dim=-1) * nearest.norm(dim=-1)
    return torch.where(lengths > 0, 1 - (x * nearest).sum(-1) / lengths, 1.0)


@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 3, 32, 33, 129, 4096])
def test_distances_are_those_of_float64(d, dtype, offset, kmeans_device):
    for problems, n, k in [(1, 1, 1), (2, 37, 5), (1, 300 if d < 1000 else 20, 20)]:
        centers = (offset + torch.randn(problems, k, d)).to(kmeans_device, torch.promote_types(dtype, torch.float32))
        labels = torch.randint(k, (problems, n), device=kmeans_device)
        x = (offset + torch.randn(problems, n, d)).to(kmeans_device, dtype)
        x[:, 0] = centers.gather(1, labels[:, :1, None].expand(-1, -1, d))[:, 0]  # as near as can be
        for metric, backend in itertools.product(METRICS, backends(x, "center_distance")):
            actual = center_distance(x, centers, labels, metric=metric, backend=backend)
            assert actual.dtype == centers.dtype and actual.shape == labels.shape and (actual >= 0).all()
            exact = exact_distance(x, centers, labels, metric)
            plain = exact_distance(x, centers, labels, metric, centers.dtype)
            magnitude = None if metric == "euclidean" else n**0.5  # the cosine is subtracted from 1
            assert_as_accurate(actual, exact, plain, centers.dtype, f"{backend}, {metric}", magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_distance_from_a_zero_vector(dtype, kmeans_device):
    x, centers = torch.randn(1, 8, 5).to(kmeans_device, dtype), torch.randn(1, 4, 5, device=kmeans_device)
    centers = centers.to(torch.promote_types(dtype, torch.float32))
    x[0, :2], centers[0, 1] = 0, 0
    labels = torch.tensor([[0, 1, 1, 2, 3, 1, 0, 1]], device=kmeans_device)
    for backend in backends(x, "center_distance"):
        cosine = center_distance(x, centers, labels, metric="cosine", backend=backend)[0]
        assert (cosine[[0, 1, 2, 5, 7]] == 1).all()
        euclidean = center_distance(x, centers, labels, metric="euclidean", backend=backend)[0]
        torch.testing.assert_close(euclidean[0].double(), centers[0, 0].double().square().sum())
        assert euclidean[1] == 0


@pytest.mark.parametrize("scale", [1e-42, 1e-25, 1e-22, 1e19, 1e25, 1e37])
def test_cosine_distances_do_not_over_or_underflow(scale, kmeans_device):
    x, centers = (torch.randn(1, rows, 7, device=kmeans_device) for rows in (30, 4))
    labels = torch.randint(4, (1, 30), device=kmeans_device)
    for a, b in ((scale * x, centers), (x, scale * centers), (scale * x, scale * centers)):
        exact = exact_distance(a, b, labels, "cosine")
        for backend in backends(x, "center_distance"):
            actual = center_distance(a, b, labels, metric="cosine", backend=backend)
            torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-6)


def test_euclidean_distances_overflow_to_infinity_only(kmeans_device):
    x, centers = torch.full((1, 3, 2), 1e25, device=kmeans_device), torch.zeros(1, 1, 2, device=kmeans_device)
    x[0, 1] = 1e-25
    labels = torch.zeros(1, 3, dtype=torch.int64, device=kmeans_device)
    for backend in backends(x, "center_distance"):
        assert center_distance(x, centers, labels, metric="euclidean", backend=backend).tolist() == [
            [torch.inf, 0, torch.inf]
        ]


def test_distances_take_any_strides(kmeans_device):
    wide = torch.randn(3, 50, 60, device=kmeans_device)
    x, centers = wide.transpose(1, 2)[..., ::3], wide[:, 10:14, 1:52:3]
    labels = torch.randint(4, (60, 3), device=kmeans_device).T
    for metric, backend in itertools.product(METRICS, backends(x, "center_distance")):
        actual = center_distance(x, centers, labels, metric=metric, backend=backend)
        torch.testing.assert_close(actual.double(), exact_distance(x, centers, labels, metric), rtol=1e-5, atol=1e-6)


def test_blocked_distances_across_blocks(kmeans_device, monkeypatch):
    monkeypatch.setattr(distance_blocked, "CPU_ENTRIES", 20)
    monkeypatch.setattr(distance_blocked, "DEVICE_ENTRIES", 20)
    x, centers = (torch.randn(2, rows, 7, device=kmeans_device) for rows in (9, 4))
    labels = torch.randint(4, (2, 9), device=kmeans_device)
    for metric in METRICS:
        actual = center_distance(x, centers, labels, metric=metric, backend="blocked")
        torch.testing.assert_close(actual.double(), exact_distance(x, centers, labels, metric), rtol=1e-5, atol=1e-6)

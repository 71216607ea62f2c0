"""The CUDA kernels of k-means one by one: what the error bound promises, and that the result needs it."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from kmeans_cases import (
    HALF,
    assert_exact,
    crowded,
    gaussian,
    hostile_cases,
    make_hostile,
    nearest,
)
from torch import Tensor

from ccl_fast.kernels import extension
from ccl_fast.kernels.extension import address
from ccl_fast.ops import center_distance, kmeans_assign_cuda
from ccl_fast.ops.kmeans_assign import METRICS, kmeans_assign
from ccl_fast.ops.kmeans_update import kmeans_update

DTYPES = (torch.float32, *HALF)
UNIT = 2.0**-24  # unit roundoff of float32
RHO = 2 * UNIT


def gamma(padded_d: int) -> float:
    return 2 * UNIT * (17 / 16 * padded_d + 2)


@pytest.fixture(scope="module")
def module(kmeans_device):
    if extension.module is None:
        pytest.skip("no C++ compiler to emulate with")
    return extension.module


@pytest.fixture(params=[-1, 1, 2, 3])
def schedule(request, module):
    if not module.emulated:
        pytest.skip("a GPU has a schedule of its own")
    module.set_schedule(request.param)
    yield request.param
    module.set_schedule(0)


def test_the_kernels_run_here(module, kmeans_device):
    for dtype in DTYPES:
        assert extension.obstacles(kmeans_device, dtype) == []


# ---- Packing.


class Packed:
    """Rows and centres as the kernel gets them, beside their exact scaled values in float64."""

    def __init__(self, x: Tensor, centers: Tensor, metric: str):
        rows = kmeans_assign_cuda.Rows(x[None], metric)
        self.x, self.norm, self.residue = rows.packed[0], rows.norm[0], rows.residue[0]
        padded = -(-len(centers) // 128) * 128
        centers = centers.float().contiguous()
        self.centers = torch.full((padded, rows.padded_d), torch.nan, dtype=torch.float16, device=x.device)
        self.center_norm, self.center_residue, self.half_square = torch.full(
            (3, padded), torch.nan, dtype=torch.float32, device=x.device
        )
        extension.module.kmeans_pack(
            address(centers), extension.dtype_code(centers.dtype), 1, *centers.shape, extension.metric_code(metric),
            address(rows.origin), address(rows.scale), *self.centers.shape, address(self.centers),
            address(self.center_norm), address(self.center_residue), address(self.half_square),
            *extension.where(centers),
        )  # fmt: skip

        def exact(values: Tensor) -> Tensor:
            values = values.double()
            if metric == "euclidean":
                values = values - rows.origin[0].double()
            else:
                length = values.norm(dim=1, keepdim=True)
                values = values / torch.where(length > 0, length, 1.0)
            return torch.nn.functional.pad(values * rows.scale[0].double(), (0, rows.padded_d - values.shape[1]))

        self.exact_x, self.exact_centers = exact(x), exact(centers)


PACKED_CASES = [
    *((name, dtype, metric) for name, dtype, metric in hostile_cases() if dtype in DTYPES),
    *itertools.product((1, 64, 65, 300), DTYPES, METRICS),
]


def make(name: str | int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    if isinstance(name, str):
        return make_hostile(name, dtype, device)
    x, centers = gaussian(30, 130, name)
    return (3 + x).to(device, dtype), (3 + centers).to(device, dtype)


@pytest.mark.parametrize("name,dtype,metric", PACKED_CASES, ids=str)
def test_the_bound_of_the_scores_error_holds(name, dtype, metric, module, kmeans_device):
    case = Packed(*make(name, dtype, kmeans_device), metric)
    k = len(case.exact_centers)
    for exact, packed, norm, residue in (
        (case.exact_x, case.x, case.norm, case.residue),
        (case.exact_centers, case.centers[:k], case.center_norm[:k], case.center_residue[:k]),
    ):
        assert packed.isfinite().all()
        true_norm, true_residue = packed.double().norm(dim=1), (exact - packed.double()).norm(dim=1)
        assert (norm >= true_norm).all() and (residue >= true_residue.clamp(max=1e30)).all()
        # And no more than a little above.
        assert (norm <= true_norm * (1 + 4e-6) + 1e-44).all()
        assert (residue <= true_residue * (1 + 4e-6) + 2e-12 * exact.norm(dim=1) + 1e-44).all()
    assert not case.centers[k:].any() and not case.center_norm[k:].any() and not case.center_residue[k:].any()
    assert (case.half_square[k:] == torch.inf).all()  # so that no row is nearest to padding

    norm, residue = (case.center_norm + case.center_residue)[:k].double(), case.center_residue[:k].double()
    square = case.exact_centers.square().sum(1) if metric == "euclidean" else torch.zeros_like(norm)
    finite = square / 2 < 3e38
    assert torch.equal(case.half_square[:k].isfinite(), finite)
    exact = (square / 2 - case.exact_x @ case.exact_centers.T)[:, finite]
    norm, residue = norm[finite], residue[finite]
    half_square, packed_centers = case.half_square[:k][finite], case.centers[:k][finite]

    # Rounding to float16 alone, and with float32 sums: products of halves are exact in float32.
    rounding = case.residue[:, None].double() * norm + case.norm[:, None].double() * residue
    in_float16 = half_square.double() - case.x.double() @ packed_centers.double().T
    float64 = 1e-13 * (square[finite] + case.exact_x.norm(dim=1, keepdim=True) * square[finite].sqrt()) + 1e-45
    assert ((in_float16 - exact).abs() <= rounding + UNIT * square[finite] + float64).all()
    products = case.x.float()[:, None] * packed_centers.float()
    in_float32 = half_square - products.cumsum(-1, dtype=torch.float32)[..., -1]
    summing = gamma(case.x.shape[1]) * case.norm[:, None].double() * norm + RHO * norm**2 * (metric == "euclidean")
    assert ((in_float32.double() - exact).abs() <= rounding + summing + float64).all()


@pytest.mark.parametrize("metric", METRICS)
def test_packing_keeps_the_digits_of_float16(metric, module, kmeans_device):
    for scale in (1e-30, 1.0, 1e30):
        x, centers = (rows.to(kmeans_device, torch.float32) for rows in gaussian(50, 20, 100))
        case = Packed(1e-3 * scale * x, 1e-3 * scale * centers, metric)
        assert (case.residue < 2.0**-11 * case.norm).all() and (case.norm > 2.0**13).all()


# ---- Assignment by tensor cores.


def assign(x: Tensor, norm: Tensor, residue: Tensor, centers: Tensor, half_square, tile_norm: Tensor, tile_residue):
    """Labels [problems, rows], and for every row how often it is listed as unsure."""
    problems, rows, padded_d = x.shape
    labels = torch.full((problems, rows), -1, dtype=torch.int64, device=x.device)
    unsure = torch.full((problems * rows + 1,), -1, dtype=torch.int32, device=x.device)
    count = torch.zeros(1, dtype=torch.int32, device=x.device)
    extension.module.kmeans_assign(
        address(x), address(norm), address(residue), address(centers), address(half_square), address(tile_norm),
        address(tile_residue), problems, rows, centers.shape[1], padded_d, address(labels), address(unsure),
        address(count), *extension.where(x),
    )  # fmt: skip
    listed, rest = unsure.split([int(count), len(unsure) - int(count)])
    assert (rest == -1).all()
    return labels, torch.bincount(listed.long(), minlength=problems * rows).view(problems, rows)


@pytest.mark.parametrize("summing", [False, True])
@pytest.mark.parametrize("padded_d", [64, 192, 256])
@pytest.mark.parametrize("rows", [1, 100, 130])
def test_the_unsure_rows_are_those_the_bound_leaves_open(rows, padded_d, summing, module, kmeans_device):
    """Wherever the best and its rivals are; every tile has a bound of its own, of rounding to float16 or of summing."""
    problems, tiles = 2, 3
    x = torch.randn(problems, rows, padded_d, dtype=torch.float16, device=kmeans_device)
    centers = torch.randn(problems, 128 * tiles, padded_d, dtype=torch.float16, device=kmeans_device)
    half_square = centers.float().square().sum(2) / 2
    half_square[:, -20:] = torch.inf
    norm, residue = torch.rand(2, problems, rows, device=kmeans_device)
    tile_norm, tile_residue = torch.rand(2, problems, tiles, device=kmeans_device)
    if summing:
        norm, residue, tile_norm, tile_residue = 300 * norm, 0 * residue, 2000 * tile_norm, 0 * tile_residue

    score = half_square[:, None].double() - x.double() @ centers.double().mT
    factor = tile_residue.double() + gamma(padded_d) * tile_norm.double()
    error = residue[..., None] * tile_norm.double()[:, None] + norm[..., None] * factor[:, None]
    error = error + RHO * tile_norm.double()[:, None] ** 2
    error = error.repeat_interleave(128, 2)
    best, expected = score.min(2)
    others = (score - error).scatter(2, expected[..., None], torch.inf).amin(2)
    margin = others - best - error.gather(2, expected[..., None])[..., 0]

    labels, listed = assign(x, norm, residue, centers, half_square, tile_norm, tile_residue)
    assert torch.equal(labels, expected)
    clear = margin.abs() > 1e-3  # what float32 rounds
    assert torch.equal(listed[clear], (margin <= 0)[clear].long())
    assert listed.max() <= 1
    if rows > 1:
        assert 0 < listed.sum() < problems * rows


def test_a_bound_that_overflows_leaves_rows_open(module, kmeans_device):
    x, centers = (torch.randn(1, rows, 64, dtype=torch.float16, device=kmeans_device) for rows in (50, 256))
    zeros, ones = (make(1, 50, device=kmeans_device) for make in (torch.zeros, torch.ones))
    half_square = torch.zeros(1, 256, device=kmeans_device)
    for tile_norm in ([1e30, 0.0], [0.0, 1e30], [1e30, 1e30]):
        tile_norm = torch.tensor([tile_norm], device=kmeans_device)
        for norm, residue in ((zeros, zeros), (zeros, ones), (ones, zeros)):
            _, listed = assign(x, norm, residue, centers, half_square, tile_norm, tile_norm)
            assert (listed == 1).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("make,n,least_wrong", [(gaussian, 8000, 1), (crowded, 1000, 100)])
def test_without_the_recheck_labels_are_wrong(make, n, least_wrong, metric, module, kmeans_device, monkeypatch):
    """So it is the bound that makes the labels of the other tests right."""
    x, centers = (rows.to(kmeans_device, torch.float32) for rows in make(n, 120, 4))
    careless = SimpleNamespace(**{name: getattr(module, name) for name in dir(module) if not name.startswith("_")})
    careless.kmeans_recheck = lambda *arguments: None
    monkeypatch.setattr(extension, "module", careless)
    labels, _, listed = kmeans_assign(x, centers, metric=metric, backend="cuda", return_rechecked=True)
    assert least_wrong <= (labels.cpu() != nearest(x, centers, metric)).sum() <= listed
    if make is gaussian:
        assert listed < 0.05 * n


# ---- The re-check.


@pytest.mark.parametrize("blocks", [1, 3, 100])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_recheck_decides_whatever_the_guess(dtype, metric, blocks, module, kmeans_device):
    problems, rows, k, d = 2, 23, 21, 37
    x = torch.randn(problems, rows, d).to(kmeans_device, dtype)
    centers = torch.randn(problems, k, d, device=kmeans_device)
    centers[:, 15] = centers[:, 4]
    expected = torch.stack([nearest(*pair, metric) for pair in zip(x, centers, strict=True)]).to(kmeans_device)
    for count in (0, 1, 4, 5, 31, problems * rows):
        guesses = torch.randint(k, (problems, rows), device=kmeans_device)
        unsure = torch.randperm(problems * rows, device=kmeans_device).int()
        labels, number = guesses.clone(), torch.tensor([count], dtype=torch.int32, device=kmeans_device)
        module.kmeans_recheck(
            address(x), extension.dtype_code(dtype), address(centers), rows, k, d, extension.metric_code(metric),
            address(unsure), address(number), address(labels), blocks, *extension.where(x),
        )  # fmt: skip
        listed = torch.zeros(problems * rows, dtype=torch.bool, device=kmeans_device)
        listed[unsure[:count].long()] = True
        assert torch.equal(labels, torch.where(listed.view(problems, rows), expected, guesses))


# ---- Races.


@pytest.mark.parametrize("d", [5, 70, 257])
def test_labels_do_not_depend_on_the_schedule(d, schedule, kmeans_device):
    assert_exact(*(rows.to(kmeans_device, torch.float32) for rows in gaussian(140, 300, d)), only=["cuda"])
    assert_exact(*(rows.to(kmeans_device, torch.bfloat16) for rows in crowded(21, 140, d)), only=["cuda"])


def test_sums_and_distances_do_not_depend_on_the_schedule(module, schedule, kmeans_device):
    x, centers = (rows.to(kmeans_device, torch.float32) for rows in gaussian(1000, 5, 130))
    labels, weights = torch.randint(5, (1000,), device=kmeans_device), torch.rand(1000, device=kmeans_device)

    def results():
        sums = kmeans_update(x, labels, 5, weights, backend="cuda")
        return *sums, *(
            center_distance.center_distance(x[None], centers[None], labels[None], metric=metric, backend="cuda")
            for metric in METRICS
        )

    actual = results()
    module.set_schedule(0)
    assert all(torch.equal(a, b) for a, b in zip(actual, results(), strict=True))

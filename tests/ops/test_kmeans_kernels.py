"""The CUDA kernels of k-means one by one: what the error bound promises, and that the result needs it."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ccl_fast.kernels import extension
from ccl_fast.kernels.extension import address
from ccl_fast.ops.kmeans import assign_cuda, distance
from ccl_fast.ops.kmeans.assign import METRICS, kmeans_assign
from ccl_fast.ops.kmeans.update import kmeans_update
from tests.ops.kmeans_cases import (
    HALF,
    assert_exact,
    crowded,
    gaussian,
    hostile_cases,
    make_hostile,
    nearest,
)
from tests.oracles.tensor_cores import truncated_sum

DTYPES = (torch.float32, *HALF)
UNIT = 2.0**-24  # unit roundoff of float32
INDEX = 16 * 2 * UNIT  # what a score's index in its last bits may change
RHO = 4 * UNIT + INDEX
LEAST = 1e-37  # what float32 may lose below its normal numbers


def gamma(padded_d: int) -> float:
    first_order = 2 * UNIT * (9 / 8 * padded_d + 2) + INDEX
    return first_order / (1 - first_order)


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
        rows = assign_cuda.Rows(x[None], metric)
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
    summing = gamma(case.x.shape[1]) * case.norm[:, None].double() * norm + LEAST
    summing += RHO / 2 * norm**2 * (metric == "euclidean")
    zero = torch.zeros_like(products[..., 0])
    truncated = [truncated_sum(zero, products, addends) for addends in (8, 16)]
    for total in (products.cumsum(-1, dtype=torch.float32)[..., -1], *truncated):
        score = half_square - total.float()
        for index in (0, 15):
            tagged = (score.view(torch.int32) & ~15 | index).view(torch.float32)
            assert ((tagged.double() - exact).abs() <= rounding + summing + float64).all()


@pytest.mark.parametrize("metric", METRICS)
def test_packing_keeps_the_digits_of_float16(metric, module, kmeans_device):
    for scale in (1e-30, 1.0, 1e30):
        x, centers = (rows.to(kmeans_device, torch.float32) for rows in gaussian(50, 20, 100))
        case = Packed(1e-3 * scale * x, 1e-3 * scale * centers, metric)
        assert (case.residue < 2.0**-11 * case.norm).all() and (case.norm > 2.0**13).all()


# ---- Assignment by tensor cores.


def assign(x: Tensor, norm: Tensor, residue: Tensor, centers: Tensor, half_square, tile_norm: Tensor, tile_residue):
    """Labels [problems, rows]; and how often each row is listed as unsure, with what rival and bound of the others."""
    problems, rows, padded_d = x.shape
    labels = torch.full((problems, rows), -1, dtype=torch.int64, device=x.device)
    unsure = torch.full((problems * rows + 1,), -1, dtype=torch.int32, device=x.device)
    rivals, others = torch.full_like(unsure, -1), torch.full_like(unsure, torch.nan, dtype=torch.float32)
    count = torch.zeros(1, dtype=torch.int32, device=x.device)
    extension.module.kmeans_assign(
        address(x), address(norm), address(residue), address(centers), address(half_square), address(tile_norm),
        address(tile_residue), problems, rows, centers.shape[1], padded_d, address(labels), address(unsure),
        address(rivals), address(others), address(count), *extension.where(x),
    )  # fmt: skip
    count = int(count)
    assert (unsure[count:] == -1).all() and (rivals[count:] == -1).all() and others[count:].isnan().all()
    listed = unsure[:count].long()

    def by_row(values: Tensor) -> Tensor:
        zeros = torch.zeros_like(labels, dtype=values.dtype)
        return zeros.view(-1).scatter(0, listed, values[:count]).view(labels.shape)

    times = torch.bincount(listed, minlength=problems * rows).view(labels.shape)
    return labels, times, by_row(rivals), by_row(others)


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
    error = error + RHO / 2 * tile_norm.double()[:, None] ** 2
    error = error.repeat_interleave(128, 2)
    bounds, order = (score - error).topk(4, dim=2, largest=False)
    margin = bounds[..., 1] - (score + error).amin(2)

    labels, listed, rivals, others = assign(x, norm, residue, centers, half_square, tile_norm, tile_residue)
    rounding = 1e-5 * score[score.isfinite()].abs().max()  # of float32, and of the index in its last bits
    clear = margin.abs() > rounding
    assert torch.equal(listed[clear], (margin <= 0)[clear].long())
    assert listed.max() <= 1
    apart = bounds.diff(dim=2) > rounding
    assert torch.equal(labels[apart[..., 0]], order[..., 0][apart[..., 0]])
    known = (listed == 1) & apart[..., 1]
    pair = torch.stack([labels, rivals.long()], 2).sort(2).values
    assert torch.equal(pair[known], order[..., :2].sort(2).values[known])
    torch.testing.assert_close(others.double()[listed == 1], bounds[..., 2][listed == 1], rtol=0, atol=rounding.item())
    if rows > 1:
        assert 0 < listed.sum() < problems * rows and known.any()


def test_a_bound_that_overflows_leaves_rows_open(module, kmeans_device):
    x, centers = (torch.randn(1, rows, 64, dtype=torch.float16, device=kmeans_device) for rows in (50, 256))
    zeros, ones = (make(1, 50, device=kmeans_device) for make in (torch.zeros, torch.ones))
    half_square = torch.zeros(1, 256, device=kmeans_device)
    for tile_norm in ([1e30, 0.0], [0.0, 1e30], [1e30, 1e30]):
        tile_norm = torch.tensor([tile_norm], device=kmeans_device)
        for norm, residue in ((zeros, zeros), (zeros, ones), (ones, zeros)):
            _, listed, _, others = assign(x, norm, residue, centers, half_square, tile_norm, tile_norm)
            assert (listed == 1).all() and (others == -torch.inf).all()


def test_a_score_beyond_float32_leaves_rows_open(module, kmeans_device):
    """It is in no bound, and could be the lowest where the others are as high as float32 reaches."""
    x, centers = (torch.randn(1, rows, 64, dtype=torch.float16, device=kmeans_device) for rows in (50, 128))
    zeros, tile = torch.zeros(1, 50, device=kmeans_device), torch.zeros(1, 1, device=kmeans_device)
    half_square = torch.full((1, 128), torch.inf, device=kmeans_device)
    for reached, expected in ((torch.inf, 1), (3.3e38, 1), (2e38, 0)):
        half_square[:, 77] = reached
        labels, listed, rivals, _ = assign(x, zeros, zeros, centers, half_square, tile, tile)
        assert (listed == expected).all()
        assert (labels == (77 if reached < torch.inf else 0)).all() and (rivals == 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("make,n,least_wrong", [(gaussian, 8000, 1), (crowded, 1000, 100)])
def test_without_more_digits_labels_are_wrong(make, n, least_wrong, metric, module, kmeans_device, monkeypatch):
    """So it is the bound that makes the labels of the other tests right."""
    x, centers = (rows.to(kmeans_device, torch.float32) for rows in make(n, 120, 4))
    monkeypatch.setattr(extension, "module", without(module, "kmeans_runoff", "kmeans_recheck"))
    labels, _, (doubtful, _) = kmeans_assign(x, centers, metric=metric, backend="cuda", return_rechecked=True)
    assert least_wrong <= (labels.cpu() != nearest(x, centers, metric)).sum() <= doubtful
    if make is gaussian:
        assert doubtful < 0.05 * n


def without(module, *kernels: str) -> SimpleNamespace:
    """The module, whose kernels of these names do nothing."""
    careless = SimpleNamespace(**{name: getattr(module, name) for name in dir(module) if not name.startswith("_")})
    for name in kernels:
        setattr(careless, name, lambda *arguments: None)
    return careless


# ---- The comparison of two centres.


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_centers_are_compared_and_the_others_by_their_bound(dtype, metric, blocks, module, kmeans_device):
    problems, rows, k, d = 2, 23, 21, 37
    x = (3 + torch.randn(problems, rows, d)).to(kmeans_device, dtype)
    centers = 3 + torch.randn(problems, k, d, device=kmeans_device)
    centers[:, 15] = centers[:, 4]
    prepared = assign_cuda.Rows(x, metric)
    guesses, rivals = torch.randint(k, (2, problems, rows), device=kmeans_device)
    guesses[:, :3], rivals[:, :3] = 15, 4  # a tie
    pairs = torch.stack([guesses, rivals], 2).sort(2).values
    which = [nearest(x[p, [i]], centers[p, pairs[p, i]], metric) for p in range(problems) for i in range(rows)]
    expected = pairs.gather(2, torch.stack(which).view(problems, rows, 1).to(kmeans_device))[..., 0]

    scale = prepared.scale[:, None, None].double()
    exact = x.double(), centers.double()
    if metric == "euclidean":
        exact_x, exact_centers = (scale * (values - prepared.origin[:, None].double()) for values in exact)
        start = exact_centers.square().sum(2)[:, None] / 2
    else:
        exact_x, exact_centers = (scale * values / values.norm(dim=2, keepdim=True) for values in exact)
        start = 0.0
    score = (start - exact_x @ exact_centers.mT).gather(2, expected[..., None])[..., 0]
    # A bound of the others just below the better score, just above it, none at all, and one that says nothing.
    little, infinite = 1e-5 * score.abs(), torch.full_like(score, torch.inf)
    others = torch.stack([score - little, score + little, infinite, -infinite]).float()
    for bound, settled in zip(others, (False, True, True, False), strict=True):
        for count in (0, 1, problems * rows):
            unsure = torch.randperm(problems * rows, device=kmeans_device).int()
            listed_rivals, listed_bounds = (v.view(-1)[unsure.long()].contiguous() for v in (rivals.int(), bound))
            labels, open_rows = guesses.clone(), torch.full_like(unsure, -1)
            unsure_count, open_count = torch.tensor([[count], [0]], dtype=torch.int32, device=kmeans_device)
            module.kmeans_runoff(
                address(x), extension.dtype_code(dtype), address(centers), rows, k, d, extension.metric_code(metric),
                address(prepared.origin), address(prepared.scale), address(unsure), address(listed_rivals),
                address(listed_bounds), address(unsure_count), address(labels), address(open_rows),
                address(open_count), blocks, *extension.where(x),
            )  # fmt: skip
            listed = torch.zeros(problems * rows, dtype=torch.bool, device=kmeans_device)
            listed[unsure[:count].long()] = True
            assert torch.equal(labels, torch.where(listed.view(problems, rows), expected, guesses))
            assert open_count == (0 if settled else count)
            assert torch.equal(open_rows[:open_count].sort().values, unsure[: 0 if settled else count].sort().values)


@pytest.mark.parametrize("metric", METRICS)
def test_more_than_two_centers_need_the_recheck(metric, module, kmeans_device, monkeypatch):
    x, centers = gaussian(200, 20, 4)
    close = centers[:, None] * (1 + 1e-6 * torch.randn(20, 5, 4, dtype=torch.float64))
    x, centers = x.to(kmeans_device, torch.float32), close.flatten(0, 1).to(kmeans_device, torch.float32)
    monkeypatch.setattr(extension, "module", without(module, "kmeans_recheck"))
    labels, _, (doubtful, rechecked) = kmeans_assign(x, centers, metric=metric, backend="cuda", return_rechecked=True)
    assert 50 <= (labels.cpu() != nearest(x, centers, metric)).sum() <= rechecked <= doubtful


@pytest.mark.parametrize("metric", METRICS)
def test_of_ordinary_rows_in_doubt_few_are_rechecked(metric, module, kmeans_device):
    x, centers = (rows.to(kmeans_device, torch.float32) for rows in gaussian(4000, 120, 16))
    labels, _, (doubtful, rechecked) = kmeans_assign(x, centers, metric=metric, backend="cuda", return_rechecked=True)
    assert torch.equal(labels.cpu(), nearest(x, centers, metric))
    assert doubtful > 20 and rechecked <= doubtful / 10


# ---- Tensor cores that truncate.


@pytest.fixture(params=[8, 16])
def addends(request, module):
    if not module.emulated:
        pytest.skip("a GPU adds in its own way")
    module.set_addition(request.param)
    yield request.param
    module.set_addition(0)


@pytest.mark.parametrize("name,dtype,metric", [case for case in hostile_cases() if case[1] in DTYPES], ids=str)
def test_labels_are_exact_for_hostile_numbers_where_products_truncate(name, dtype, metric, addends, kmeans_device):
    assert_exact(*make_hostile(name, dtype, kmeans_device), metrics=[metric], only=["cuda"])


@pytest.mark.parametrize("make", [gaussian, crowded])
@pytest.mark.parametrize("k", [1, 2, 3, 130])
@pytest.mark.parametrize("d", [1, 63, 129, 257])
def test_labels_are_exact_at_any_size_where_products_truncate(d, k, make, addends, kmeans_device):
    x, centers = (rows.to(kmeans_device, torch.float32) for rows in make(40, max(k, 2), d))
    for scale in (1.0, 1e-20, 1e20):
        assert_exact(scale * x, scale * centers[:k], only=["cuda"])


def all_that_truncation_can_lose(d: int) -> tuple[Tensor, Tensor]:
    """Rows [1, 2, d] and centres [1, 4, d]; d is a square.

    In the product with the nearer centre (2, of row 0) all terms but one are positive and just below the last digit of
    the sum, in that with its rival (0) they are negative; so all are lost, and the scores move by 2 d times that digit,
    of which the bound allows 2 (9/8 d + 18). It is nearer by a little less.
    """
    little = 2896 * 2.0**-23  # whose square is next to 2^-23
    first = 1 + math.floor(2 * math.sqrt(d) * little * 2**10) * 2.0**-10
    x = torch.full((d,), little)
    near, far = x.clone(), -x
    x[0], near[0], far[0] = 1, first, 1
    return torch.stack([x, -x])[None], torch.stack([far, -far, near, -near])[None]


@pytest.mark.parametrize("d", [1024, 4096])
def test_the_bound_covers_all_that_truncation_can_lose(d, addends, module, kmeans_device, monkeypatch):
    x, centers = (rows.to(kmeans_device) for rows in all_that_truncation_can_lose(d))
    assert_exact(x, centers, metrics=["euclidean"], only=["cuda"])
    monkeypatch.setattr(extension, "module", without(module, "kmeans_runoff", "kmeans_recheck"))
    labels, _, (doubtful, _) = kmeans_assign(x, centers, backend="cuda", return_rechecked=True)
    assert labels.tolist() == [[0, 1]] and doubtful == 2  # nearest are centres 2 and 3
    module.set_addition(0)
    labels, _ = kmeans_assign(x, centers, backend="cuda")
    assert labels.tolist() == [[2, 3]]


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
            distance.center_distance(x[None], centers[None], labels[None], metric=metric, backend="cuda")
            for metric in METRICS
        )

    actual = results()
    module.set_schedule(0)
    assert all(torch.equal(a, b) for a, b in zip(actual, results(), strict=True))

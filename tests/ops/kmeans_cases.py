"""Inputs of k-means, easy ones and such that are hard to assign, and the oracle that tells their labels."""

import numpy as np
import torch
from torch import Tensor

from ccl_fast.ops.backends import BACKENDS
from ccl_fast.ops.kmeans.assign import METRICS, kmeans_assign

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALF)

# Largest number of differences that the oracle holds at once: they should stay in the cache.
ORACLE_ENTRIES = 1 << 17
# Scores closer than this, relatively, without being equal are beyond float64.
UNDECIDED = 1e-13


class Undecided(Exception):
    """A test's fault: its inputs have no label that float64 determines."""


def backends(x: Tensor) -> list[str]:
    """All that run on these rows here."""
    return [name for name, backend in BACKENDS["kmeans_assign"].items() if not backend.obstacles(x.device, x.dtype)]


def assert_exact(x: Tensor, centers: Tensor, metrics=METRICS, only: list[str] | None = None) -> None:
    """Every backend gives the oracle's labels for every metric; x [n, d] or [b, n, d]."""
    for metric in metrics:
        pairs = zip(x, centers, strict=True) if x.ndim == 3 else [(x, centers)]
        expected = torch.stack([nearest(*pair, metric) for pair in pairs]).view(x.shape[:-1])
        for backend in only or backends(x):
            labels, distance, rechecked = kmeans_assign(
                x, centers, metric=metric, backend=backend, return_rechecked=True
            )
            assert labels.dtype == torch.int64 and labels.device == x.device and labels.shape == expected.shape
            assert distance.dtype == torch.promote_types(x.dtype, torch.float32) and distance.shape == expected.shape
            assert rechecked.dtype == torch.int64 and rechecked.shape == (2,)
            assert expected.numel() >= rechecked[0] >= rechecked[1] >= 0
            wrong = labels.cpu() != expected
            assert not wrong.any(), (
                f"{backend}, {metric}: {wrong.sum()} of {wrong.numel()} labels are wrong, "
                f"{labels.cpu()[wrong][:5].tolist()} for {expected[wrong][:5].tolist()}"
            )


def nearest(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    """Labels int64 [n] by float64, the lowest index on ties. Raises Undecided where the order of the sums matters."""
    x, centers = (rows.detach().cpu().double().numpy() for rows in (x, centers))
    labels = np.empty(len(x), dtype=np.int64)
    size = max(1, ORACLE_ENTRIES // centers.size)
    for start in range(0, len(x), size):
        part = x[start : start + size]
        scores = _scores(part, centers, metric)
        lowest = scores.min(1, keepdims=True)
        magnitude = lowest if metric == "euclidean" else np.sqrt((part * part).sum(1, keepdims=True))
        backwards = _scores(part[:, ::-1], centers[:, ::-1], metric)
        tied = scores == lowest
        if (tied != (scores <= lowest + UNDECIDED * magnitude)).any():
            raise Undecided("two distances differ by less than float64 resolves")
        if (tied != (backwards == backwards.min(1, keepdims=True))).any():
            raise Undecided("two distances are equal or not by the order of their sums")
        labels[start : start + size] = scores.argmin(1)  # numpy's is the first
    return torch.from_numpy(labels)


def _scores(x: np.ndarray, centers: np.ndarray, metric: str) -> np.ndarray:
    if metric == "euclidean":
        return ((x[:, None] - centers) ** 2).sum(-1)
    length = np.sqrt((centers * centers).sum(-1))
    return -(x[:, None] * centers).sum(-1) / np.where(length > 0, length, np.inf)


def blobs(seed: int, n: int = 400, d: int = 7, k: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centers = 3 * torch.randn(k, d, generator=generator, dtype=torch.float64)
    which = torch.randint(k, (n,), generator=generator)
    return centers[which] + torch.randn(n, d, generator=generator, dtype=torch.float64)


# ---- Hostile inputs: functions of a dtype that give rows and centres, to be rounded to that dtype.

HOSTILE = {}
WIDE = (torch.float64, torch.float32, torch.bfloat16)  # their exponents reach 1e30
ROWS, CENTERS = 40, 140  # the re-check of every row is slow when emulated; two tiles of centres


def hostile(*dtypes: torch.dtype, metrics: tuple[str, ...] = METRICS):
    """Registers a function, with the dtypes that hold its values and the metrics whose ties float64 decides."""

    def register(make):
        HOSTILE[make.__name__] = make, dtypes or DTYPES, metrics
        return make

    return register


def hostile_cases() -> list[tuple[str, torch.dtype, str]]:
    return [
        (name, dtype, metric)
        for name, (_, dtypes, metrics) in HOSTILE.items()
        for dtype in dtypes
        for metric in metrics
    ]


def make_hostile(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    x, centers = HOSTILE[name][0](dtype)
    return x.to(device, dtype), centers.to(device, dtype)


def gaussian(n: int = ROWS, k: int = CENTERS, d: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, dtype=torch.float64), torch.randn(k, d, dtype=torch.float64)


def crowded(n: int = ROWS, k: int = CENTERS, d: int = 5) -> tuple[Tensor, Tensor]:
    """Pairs of centres that are nearer to each other than half precision sees."""
    x, centers = gaussian(n, k // 2, d)
    centers = centers.repeat(2, 1)
    centers = centers * (1 + 1e-6 * torch.randn_like(centers))
    return x, centers[torch.randperm(len(centers))]


def neighbour(x: Tensor, steps: int | Tensor) -> Tensor:
    """The number so many steps farther from zero in the dtype of x."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return (x.view(integer) + torch.as_tensor(steps).to(integer)).view(x.dtype)


@hostile()
def ties_on_a_grid(dtype):
    return torch.randint(-2, 3, (ROWS, 3)), torch.randint(-2, 3, (CENTERS, 3))


@hostile()
def duplicate_rows_and_centers(dtype):
    x, centers = gaussian(10, 50, 7)
    return x.repeat(4, 1), centers.repeat(6, 1)


@hostile()
def one_center_many_times(dtype):
    x, centers = gaussian(k=1, d=70)
    return x, centers.expand(300, -1)


@hostile()
def the_nearest_center_again_in_other_tiles(dtype):
    x, centers = gaussian(k=300, d=9)
    centers[[299, 256, 128, 127, 65]] = centers[64].clone()
    x[:30] = centers[64] + 0.01 * x[:30]
    return x, centers


@hostile()
def every_row_is_a_center(dtype):
    x, _ = gaussian(200, 1, 6)
    return x, x[torch.randperm(200)]


@hostile()
def all_rows_are_equal(dtype):
    x, centers = gaussian(1, 30, 6)
    return x.expand(140, -1), centers


@hostile()
def constant_features(dtype):
    x, centers = gaussian(d=20)
    x[:, 5:], centers[:, 5:] = 7.3, 7.3
    return x, centers


@hostile()
def far_from_the_origin(dtype):
    x, centers = gaussian(d=17)
    return 1e4 + x, 1e4 + centers


@hostile(*WIDE, metrics=("euclidean",))
def farther_from_the_origin(dtype):
    x, centers = gaussian(d=17)
    return 1e6 + x, 1e6 + centers


@hostile()
def centers_far_from_the_rows(dtype):
    x, centers = gaussian()
    return x, 3e4 + centers


@hostile()
def only_opposite_centers(dtype):
    """Every cosine is negative, and so lower than that of a zero vector."""
    x = torch.rand(ROWS, 5, dtype=torch.float64) + 0.5
    return x, -torch.rand(CENTERS, 5, dtype=torch.float64) - 0.5


@hostile(*WIDE)
def rows_amid_a_sphere_of_centers(dtype):
    """Their lengths differ by rounding only, and the rows are next to nothing."""
    x, centers = gaussian(d=20)
    return 1e-9 * x, torch.nn.functional.normalize(centers)


@hostile(torch.float16)
def the_end_of_float16(dtype):
    return torch.empty(ROWS, 9).uniform_(-6e4, 6e4), torch.empty(CENTERS, 9).uniform_(-6e4, 6e4)


@hostile(torch.float16)
def subnormals_of_float16(dtype):
    return tuple(2.0**-24 * torch.randint(-200, 201, (rows, 5)) for rows in (ROWS, CENTERS))


@hostile(metrics=("euclidean",))
def last_bits(dtype):
    """Centres of one cluster differ in the last bits of one column, rows lie among them."""
    column = (1 + torch.rand(10, dtype=torch.float64)).to(dtype)
    x, centers = (torch.randn(10, 4, dtype=torch.float64).to(dtype) for _ in range(2))
    centers = centers.repeat_interleave(5, 0)
    centers[:, 1] = neighbour(column.repeat_interleave(5), torch.tensor([0, 1, 2, 4, 9]).repeat(10))
    x = centers[::5].repeat_interleave(12, 0)
    x[:, 1] = neighbour(column.repeat_interleave(12), torch.arange(12).repeat(10))
    return x, centers[torch.randperm(50)]


@hostile(torch.float32, *HALF)
def last_bits_from_afar(dtype):
    x, centers = (rows.to(dtype) for rows in gaussian(k=CENTERS // 2, d=3))
    return x, torch.cat([centers, neighbour(centers, torch.tensor([0, 0, 1]).expand(CENTERS // 2, -1))])


@hostile(torch.float32, *HALF)
def midpoints(dtype):
    _, centers = (rows.to(dtype) for rows in gaussian(d=11))
    first, second = torch.randint(CENTERS, (2, ROWS))
    return (centers[first].double() + centers[second].double()) / 2, centers


@hostile()
def a_row_between_mirrored_centers(dtype):
    x, centers = gaussian(20, CENTERS // 2, 4)
    x[::2] = 0
    return x, torch.cat([centers, -centers])


@hostile()
def zero_rows_and_centers(dtype):
    x, centers = gaussian(d=3)
    x[::7], centers[::9] = 0, 0
    return x, centers


@hostile()
def only_zeros(dtype):
    return torch.zeros(20, 3), torch.zeros(5, 3)


@hostile()
def centers_of_one_direction(dtype):
    x, centers = gaussian(k=20)
    return x, torch.cat([centers.to(dtype) * 2.0**power for power in (0, 3, -3, 1)])


@hostile(*WIDE)
def one_huge_row(dtype):
    x, centers = gaussian()
    x[17] *= 1e30
    return x, centers


@hostile(*WIDE)
def two_huge_opposite_rows(dtype):
    """Their mean is that of the others, next to which these all but vanish."""
    x, centers = gaussian()
    x[3] *= 1e26
    x[4] = -x[3]
    return x, centers


@hostile(*WIDE)
def one_huge_center(dtype):
    x, centers = gaussian()
    centers[130] *= 1e30
    return x, centers


@hostile(*WIDE)
def a_row_and_a_center_are_huge(dtype):
    x, centers = gaussian()
    x[1] *= 1e30
    centers[130] *= 1e30
    return x, centers


@hostile(*WIDE)
def only_huge_centers(dtype):
    x, centers = gaussian()
    return x, 1e30 * centers


@hostile(*WIDE, metrics=("euclidean",))
def a_row_at_the_mean_and_a_center_at_the_end(dtype):
    """The bound of a row that rounds without error, in a tile whose own bound overflows."""
    x = torch.tensor([[0.0, 0, 0], [1, 2, -1], [-1, -2, 1]])
    centers = torch.full((130, 3), 50.0)
    centers[5], centers[128], centers[129] = (torch.tensor([3, y, 0]) for y in (1e-4, 0, 0))
    centers[129, 0] = 1e38
    return x, centers


@hostile(*WIDE)
def centers_of_all_lengths(dtype):
    x, centers = crowded()
    return x, centers * 10.0 ** torch.randint(-36, 36, (CENTERS, 1))


@hostile(*WIDE)
def rows_and_centers_of_all_lengths(dtype):
    return (rows * 10.0 ** torch.randint(-36, 36, (len(rows), 1)) for rows in crowded())


@hostile(*WIDE)
def subnormal_rows(dtype):
    x, centers = crowded()
    return 1e-42 * x, 1e3 * centers

"""The labels of every backend are exactly those of float64, whatever the shape, the dtype and the numbers."""

import itertools
import math
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ccl_fast.kernels import cpu_extension, extension
from ccl_fast.ops import matmul
from ccl_fast.ops.backends import BACKENDS
from ccl_fast.ops.kmeans import assign_blocked as blocked
from ccl_fast.ops.kmeans import assign_cpu
from ccl_fast.ops.kmeans.assign import METRICS, kmeans_assign
from tests.ops.kmeans_cases import (
    DTYPES,
    HALF,
    Undecided,
    assert_exact,
    backends,
    crowded,
    gaussian,
    hostile_cases,
    make_hostile,
    nearest,
)

pytestmark = pytest.mark.usefixtures("kmeans_device")

WIDTHS = [1, 2, 3, 7, 16, 33, 63, 64, 65, 127, 128, 129, 192, 193, 256, 257]


def random_case(n, k, d, dtype, device):
    """Half precision rows with float32 centres, as k-means has them."""
    x, centers = torch.randn(n, d).to(device, dtype), torch.randn(k, d)
    return x, centers.to(device, torch.promote_types(dtype, torch.float32))


# ---- Shapes.


def test_reference_is_the_definition(kmeans_device):
    x, centers = torch.randn(7, 3, device=kmeans_device), torch.randn(4, 3, device=kmeans_device)

    def square(a):
        return math.fsum(v * v for v in a)

    def distance(a, b, metric):
        if metric == "euclidean":
            return square([v - w for v, w in zip(a, b, strict=True)])
        return 1 - math.fsum(v * w for v, w in zip(a, b, strict=True)) / math.sqrt(square(a) * square(b))

    for metric in METRICS:
        labels, distances = kmeans_assign(x, centers, metric=metric, backend="reference")
        for row, label, actual in zip(x.tolist(), labels.tolist(), distances.tolist(), strict=True):
            expected = [distance(row, center, metric) for center in centers.tolist()]
            assert label == expected.index(min(expected))
            assert actual == pytest.approx(min(expected), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
def test_labels_are_exact_at_every_width(d, dtype, kmeans_device):
    assert_exact(*random_case(130, 129, d, dtype, kmeans_device))


@pytest.mark.parametrize("k", [1, 2, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 300])
def test_labels_are_exact_for_every_number_of_rows_and_centers(n, k, kmeans_device):
    assert_exact(*random_case(n, k, 6, torch.float32, kmeans_device))
    assert_exact(*random_case(n, k, 70, torch.float16, kmeans_device), metrics=["euclidean"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1000, 4096])
def test_labels_are_exact_for_wide_rows(d, dtype, kmeans_device):
    assert_exact(*random_case(21, 7, d, dtype, kmeans_device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problems", [1, 2, 3])
def test_a_batch_is_its_problems(problems, dtype, kmeans_device):
    x = torch.randn(problems, 40, 65)
    centers = torch.randn(problems, 130, 65)
    for i in range(problems):  # origins and magnitudes of their own
        x[i], centers[i] = (50.0**i * (rows[i] + 3 * i) for rows in (x, centers))
    x, centers = x.to(kmeans_device, dtype), centers.to(kmeans_device, dtype)
    assert_exact(x, centers)
    for metric, backend in itertools.product(METRICS, backends(x)):
        labels, distance = kmeans_assign(x, centers, metric=metric, backend=backend)
        for i in range(problems):
            alone = kmeans_assign(x[i], centers[i], metric=metric, backend=backend)
            assert torch.equal(labels[i], alone[0]) and torch.equal(distance[i], alone[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype, kmeans_device):
    wide = torch.randn(4, 90, 160).to(kmeans_device, dtype)
    x, centers = wide[1, :, 3:150:3], wide[2].T[100:151, ::7].T
    assert x.shape[1] == 49 and centers.shape == (13, 51) and not x.is_contiguous() and not centers.is_contiguous()
    assert_exact(x, centers[:, :49])
    assert_exact(wide[1].T[:, 1:80:2], wide[2].T[5:25, :40])
    assert_exact(wide[0, :1].expand(50, -1), wide[1])
    assert_exact(wide.transpose(0, 2)[:3, :, :3], wide.transpose(1, 2)[:3, 50:60, :3])
    assert_exact(wide[:1].expand(3, -1, -1), wide[1:, :9])


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 5, 3)])
def test_no_rows_have_no_labels(shape, kmeans_device):
    x, centers = torch.randn(shape, device=kmeans_device), torch.randn(*shape[:-2], 4, 3, device=kmeans_device)
    for metric, backend in itertools.product(METRICS, backends(x)):
        labels, distance, rechecked = kmeans_assign(x, centers, metric=metric, backend=backend, return_rechecked=True)
        assert labels.shape == distance.shape == shape[:-1] and labels.dtype == torch.int64
        assert rechecked.tolist() == [0, 0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 30),
    k=st.integers(1, 150),
    d=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(["gaussian", "grid", "crowded"]),
    offset=st.sampled_from([0, 0, 1, 100]),
    exponent=st.integers(-35, 35),
    metric=st.sampled_from(METRICS),
    seed=st.integers(0, 1000),
)
def test_labels_are_exact_for_anything(kmeans_device, n, k, d, dtype, how, offset, exponent, metric, seed):
    torch.manual_seed(seed)
    if how == "grid":
        x, centers = torch.randint(-1, 2, (n, d)), torch.randint(-1, 2, (k, d))
    elif how == "crowded":
        x, centers = crowded(n, 2 * k, d)
    else:
        x, centers = gaussian(n, k, d)
    if metric == "euclidean" and how != "grid":
        x, centers = x + offset, centers + offset
    scale = 2.0 ** (exponent / 35 * (5 if dtype == torch.float16 else 110))
    try:
        assert_exact(*((scale * rows).to(kmeans_device, dtype) for rows in (x, centers)), metrics=[metric])
    except Undecided:
        assume(False)


# ---- Numbers.


@pytest.mark.parametrize("name,dtype,metric", hostile_cases(), ids=str)
def test_labels_are_exact_for_hostile_numbers(name, dtype, metric, kmeans_device):
    assert_exact(*make_hostile(name, dtype, kmeans_device), metrics=[metric])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-42, -38, -30, -25, -23, -22, -21, -20, -15, 15, 18, 19, 20, 25, 30, 37])
def test_labels_are_exact_where_squares_over_or_underflow(exponent, dtype, kmeans_device):
    for make in (gaussian, crowded):
        x, centers = (rows.to(kmeans_device) for rows in make(17, 40))
        small = 10.0**exponent
        assert_exact((small * x).to(dtype), (small * centers).to(dtype))
        assert_exact(x.to(dtype), (small * centers).to(dtype), metrics=["cosine"])
        assert_exact((small * x).to(dtype), centers.to(dtype), metrics=["cosine"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [18, 19, 20, 21, 22, 23, 24, 26, 30, 37])
def test_labels_are_exact_beside_huge_rows(exponent, dtype, kmeans_device):
    """Whose mean is 0, and which set the scale at which the others may underflow."""
    for make in (gaussian, crowded):
        x, centers = (rows.to(kmeans_device) for rows in make(17, 40))
        x[3] *= 10.0**exponent
        x[4] = -x[3]
        assert_exact(x.to(dtype), centers.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_distances_the_lowest_index_wins(dtype, kmeans_device):
    """Wherever in the tiles, and so in whichever threads, the equal ones are."""
    for first, second in [(0, 1), (3, 299), (127, 128), (64, 65), (128, 256), (7, 15), (200, 264), (8, 72)]:
        centers = 5 + torch.rand(300, 4, device=kmeans_device)
        centers[[first, second]] = torch.tensor([1.0, 0, 0, 0], device=kmeans_device)
        x = torch.tensor([[1.0, 0, 0, 0], [1.5, 0.25, 0, 0]], device=kmeans_device)
        for metric, backend in itertools.product(METRICS, backends(x.to(dtype))):
            labels, _ = kmeans_assign(x.to(dtype), centers.to(dtype), metric=metric, backend=backend)
            assert labels.tolist() == [first, first], f"{backend}, {metric}"


# ---- What it costs, and what it leaves alone.


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_of_ordinary_data_are_rechecked(dtype, metric, kmeans_device):
    """In any problem of a batch, and wherever that lies and however large it is."""
    x, centers = torch.randn(3, 400, 64), torch.randn(3, 60, 64)
    if metric == "euclidean":
        x, centers = (rows + torch.tensor([0.0, 100, -300])[:, None, None] for rows in (x, centers))
    x, centers = (rows * torch.tensor([1, 100, 0.01])[:, None, None] for rows in (x, centers))
    x, centers = x.to(kmeans_device, dtype), centers.to(kmeans_device, torch.promote_types(dtype, torch.float32))
    for backend in backends(x):
        doubtful, rechecked = kmeans_assign(x, centers, metric=metric, backend=backend, return_rechecked=True)[2]
        assert doubtful < 0.05 * 1200, backend
        assert rechecked <= (0.1 * doubtful if backend == "cuda" else doubtful), backend


def test_nothing_is_rechecked_where_clusters_are_far_apart(kmeans_device):
    centers = 100 * torch.eye(20, device=kmeans_device)
    x = centers.repeat(20, 1) + torch.randn(400, 20, device=kmeans_device)
    for metric, backend in itertools.product(METRICS, backends(x)):
        assert kmeans_assign(x, centers, metric=metric, backend=backend, return_rechecked=True)[2].sum() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_generators_stay_as_they_were(dtype, kmeans_device):
    x, centers = make_hostile("zero_rows_and_centers", dtype, kmeans_device)
    x_before, centers_before = x.clone(), centers.clone()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    on_gpu = torch.cuda.get_rng_state() if kmeans_device.type == "cuda" else None
    for metric, backend in itertools.product(METRICS, backends(x)):
        kmeans_assign(x, centers, metric=metric, backend=backend)
    assert torch.equal(x, x_before) and torch.equal(centers, centers_before)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert on_gpu is None or torch.equal(torch.cuda.get_rng_state(), on_gpu)


def test_no_gradient_flows(kmeans_device):
    x, centers = (torch.randn(9, 3, device=kmeans_device, requires_grad=True) for _ in range(2))
    for backend in backends(x):
        assert not any(out.requires_grad for out in kmeans_assign(x, centers, backend=backend, return_rechecked=True))


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def test_the_default_dtype_does_not_decide_whether_onednn_is_used(default_dtype):
    usual = matmul._onednn_linear()
    matmul._onednn_linear.cache_clear()
    default_dtype(torch.float64)
    assert matmul._onednn_linear() is usual  # the answer is kept


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default, default_dtype, kmeans_device):
    x, centers = (rows.to(kmeans_device, torch.float32) for rows in crowded())
    for metric, backend in itertools.product(METRICS, backends(x)):
        expected = kmeans_assign(x, centers, metric=metric, backend=backend)
        default_dtype(default)
        actual = kmeans_assign(x, centers, metric=metric, backend=backend)
        default_dtype(torch.float32)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype and torch.equal(a, e), f"{backend}, {metric}"


def test_uninitialised_memory_is_never_read(kmeans_device, monkeypatch):
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x):
        return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    assert_exact(*(rows.to(kmeans_device, torch.float32) for rows in crowded(130, 130, 65)))
    assert_exact(*random_case(3, 2, 1, torch.float16, kmeans_device))


# ---- The blocked backend, whichever way it goes.


@pytest.fixture(params=["high", "medium"])
def precision(request):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("make", [gaussian, crowded])
def test_blocked_is_exact_whatever_the_precision_of_products(make, truncated, precision, kmeans_device, monkeypatch):
    """As this device multiplies, and as the worst that the setting allows would."""
    setting = torch.backends.mkldnn if kmeans_device.type == "cpu" else torch.backends.cuda
    bits = {"tf32": 13, "bf16": 16}[setting.matmul.fp32_precision]
    product = blocked.matmul_nt

    def truncate(x):
        return (x.view(torch.int32) >> bits << bits).view(torch.float32)

    def truncating_product(x, weight):
        return product(truncate(x), truncate(weight))

    if truncated:
        monkeypatch.setattr(blocked, "matmul_nt", truncating_product)
    x, centers = (rows.to(kmeans_device, torch.float32) for rows in make(300, 130, 20))
    assert_exact(x, centers, only=["blocked"])
    assert_exact(10 + x, 10 + centers, only=["blocked"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [False, True])
def test_blocked_is_exact_without_onednn(autocast, dtype, kmeans_device, monkeypatch):
    monkeypatch.setattr(matmul, "_onednn_linear", lambda: None)
    x, centers = (rows.to(kmeans_device, dtype) for rows in crowded(130, 70, 33))
    with torch.autocast(kmeans_device.type, torch.bfloat16, enabled=autocast):
        assert_exact(x, centers, only=["blocked"])
        assert_exact(*make_hostile("rows_and_centers_of_all_lengths", torch.float32, kmeans_device), only=["blocked"])


def test_every_backend_is_exact_under_autocast(kmeans_device):
    with torch.autocast(kmeans_device.type, torch.bfloat16):
        assert_exact(*(rows.to(kmeans_device, torch.float32) for rows in crowded(130, 70, 33)))


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_blocked_is_exact_with_many_threads(kmeans_device, monkeypatch, three_threads):
    monkeypatch.setattr(blocked, "CPU_ROWS", 16)
    monkeypatch.setattr(blocked, "MAX_CPU_ROWS", 16)
    for name in ("ties_on_a_grid", "one_huge_row", "one_huge_center", "only_huge_centers"):
        assert_exact(*make_hostile(name, torch.float32, kmeans_device), only=["blocked"])
    assert_exact(*random_case(300, 130, 20, torch.float32, kmeans_device), only=["blocked"])


def test_blocked_is_exact_across_its_blocks(kmeans_device, monkeypatch):
    for name, value in {
        "CPU_ROWS": 16,
        "MAX_CPU_ROWS": 16,
        "NORM_ENTRIES": 50,
        "EXACT_ENTRIES": 100,
        "DEVICE_ENTRIES": 1000,
    }.items():
        monkeypatch.setattr(blocked, name, value)
    for name in ("ties_on_a_grid", "the_nearest_center_again_in_other_tiles", "midpoints"):
        assert_exact(*make_hostile(name, torch.float32, kmeans_device), only=["blocked"])
    assert_exact(*random_case(300, 130, 20, torch.float32, kmeans_device), only=["blocked"])


# ---- The blocked backend, where a label has digits, rows are kept or not, and one problem has several sets of centres.


@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize("base", [2, 3, 256])
def test_blocked_finds_labels_of_any_number_of_digits(base, kept, kmeans_device, monkeypatch):
    monkeypatch.setattr(blocked, "BASE", base)
    monkeypatch.setattr(blocked, "KEPT_ENTRIES", kept)
    for k in (1, 2, 3, 4, 8, 9, 10, 81, 82, 255, 256, 257):
        assert_exact(*random_case(61, k, 5, torch.float32, kmeans_device), only=["blocked"])
    for name in ("ties_on_a_grid", "one_huge_center", "farther_from_the_origin", "duplicate_rows_and_centers"):
        assert_exact(*make_hostile(name, torch.float32, kmeans_device), metrics=["euclidean"], only=["blocked"])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocked_takes_several_sets_of_centers_at_once(dtype, metric, kmeans_device):
    for make in (gaussian, crowded):
        x, centers = make(157, 60, 11)
        sets = torch.stack([centers, centers.flip(0), centers + 0.5, x[:60]])
        x, sets = x.to(kmeans_device, dtype), sets.to(kmeans_device, torch.promote_types(dtype, torch.float32))
        labels, doubtful = blocked.Rows(x[None], metric).nearest(sets)
        for own, one in zip(labels, sets, strict=True):
            assert torch.equal(own.cpu(), nearest(x, one, metric))
        if make is crowded and dtype != torch.float64:
            assert doubtful[0] > 0


# ---- The CPU extension: every width of vectors that this CPU has, rows that are kept or not, blocks, threads, sets.


@pytest.fixture(params=[64, 32, 16])
def cpu(request, monkeypatch, kmeans_device):
    """The functions for vectors of this many bytes, in the place of the widest ones."""
    if reasons := cpu_extension.obstacles(kmeans_device, torch.float32):
        pytest.skip(reasons[0])
    found = next((cpu for cpu in cpu_extension.module.cpus if cpu.bytes == request.param), None)
    if found is None:
        pytest.skip(f"this CPU has no vectors of {request.param} bytes")
    monkeypatch.setattr(cpu_extension, "best", lambda: found)
    return found


@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize(("name", "metric"), [(n, m) for n, dtype, m in hostile_cases() if dtype == torch.float32])
def test_the_cpu_extension_is_exact_for_every_width(name, metric, kept, cpu, monkeypatch):
    monkeypatch.setattr(assign_cpu, "KEPT_ENTRIES", kept)
    assert_exact(*make_hostile(name, torch.float32), metrics=[metric], only=["cpu"])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_the_cpu_extension_is_exact_at_odd_sizes(dtype, cpu, monkeypatch):
    monkeypatch.setattr(assign_cpu, "KEPT_ENTRIES", 0)
    for n, k, d in itertools.product([1, cpu.rows - 1, cpu.rows, cpu.rows + 1], [1, 2, 7, 8, 9, 130], [1, 3, 17, 33]):
        assert_exact(*random_case(n, k, d, dtype, "cpu"), only=["cpu"])
    x, centers = random_case(100, 40, 30, dtype, "cpu")
    assert_exact(x[::3, 1::2], centers[:, :15], only=["cpu"])
    assert_exact(x[:15, :40].T, centers[:, :15], only=["cpu"])
    assert_exact(x[:1].expand(60, -1), centers, only=["cpu"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_cpu_extension_is_exact_across_parts_blocks_and_caches_of_centers(dtype, cpu, monkeypatch, three_threads):
    monkeypatch.setattr(assign_cpu, "ENTRIES", 1 << 16)
    x, centers = random_case(3000, 1500, 70, dtype, "cpu")
    for kept in (0, x.numel()):
        monkeypatch.setattr(assign_cpu, "KEPT_ENTRIES", kept)
        assert_exact(x, centers, metrics=["euclidean"], only=["cpu"])


@pytest.mark.parametrize("metric", METRICS)
def test_the_cpu_extension_takes_several_sets_of_centers_at_once(metric, cpu):
    for make in (gaussian, crowded):
        x, centers = (rows.float() for rows in make(157, 60, 11))
        sets = torch.stack([centers, centers.flip(0), centers + 0.5, x[:60]])
        labels, doubtful = assign_cpu.Rows(x[None], metric).nearest(sets)
        for own, one in zip(labels, sets, strict=True):
            assert torch.equal(own, nearest(x, one, metric))
        assert make is gaussian or doubtful[0] > 0


def _send_labels(rows, centers, queue):
    queue.put(rows.nearest(centers)[0].tolist())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own_for_the_cpu_extension(cpu, three_threads):
    # So few entries that torch needs no threads, which would not outlive a fork, but several parts.
    x, centers = random_case(1000, 2000, 16, torch.float32, "cpu")
    rows = assign_cpu.Rows(x[None], "euclidean")
    labels = rows.nearest(centers[None])[0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_send_labels, args=(rows, centers[None], queue))
    child.start()
    assert queue.get(timeout=30) == labels.tolist()
    child.join()


def test_an_assignment_does_not_remember_the_last_one(kmeans_device):
    """What is kept from one to the next depends on the shape of the centres alone."""
    x = torch.randn(70, 9, device=kmeans_device)
    names = [name for name in backends(x) if name in ("cpu", "blocked")]
    prepared = [BACKENDS["kmeans_assign"][name].module.Rows(x[None], "euclidean") for name in names]
    for k in (5, 300, 5, 1, 5):
        centers = torch.randn(1, k, 9, device=kmeans_device)
        for rows in prepared:
            assert torch.equal(rows.nearest(centers)[0][0].cpu(), nearest(x, centers[0], "euclidean"))


# ---- Errors.


def arguments(device, **changes):
    return {"x": torch.randn(5, 3, device=device), "centers": torch.randn(4, 3, device=device), **changes}


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"x": [[1.0]]}, r"x: expected a torch.Tensor, got list"),
        ({"x": torch.ones(5, 3, dtype=torch.int64)}, r"x: expected float64.*got torch.int64"),
        ({"x": torch.ones(5, 3, dtype=torch.complex64)}, r"x: expected float64.*got torch.complex64"),
        ({"x": torch.ones(5, 3).to(torch.float8_e4m3fn)}, r"x: expected float64.*got torch.float8_e4m3fn"),
        ({"x": torch.ones(5)}, r"x: expected shape \[rows, d\] or \[problems, rows, d\], got \[5\]"),
        ({"x": torch.ones(1, 2, 5, 3)}, r"x: expected shape .*, got \[1, 2, 5, 3\]"),
        ({"x": torch.ones(5, 2)}, r"centers: expected shape \[at least 1, 2\], got \[4, 3\]"),
        ({"x": torch.ones(2, 5, 3)}, r"centers: expected shape \[2, at least 1, 3\], got \[4, 3\]"),
        ({"centers": None}, r"centers: expected a torch.Tensor, got NoneType"),
        ({"centers": torch.ones(3)}, r"centers: expected shape \[at least 1, 3\], got \[3\]"),
        ({"centers": torch.tensor(1.0)}, r"centers: expected shape \[at least 1, 3\], got \[\]"),
        ({"centers": torch.ones(0, 3)}, r"centers: expected shape \[at least 1, 3\], got \[0, 3\]"),
        ({"centers": torch.ones(1, 4, 3)}, r"centers: expected shape \[at least 1, 3\], got \[1, 4, 3\]"),
        ({"x": torch.ones(5, 0), "centers": torch.ones(4, 0)}, r"centers: expected shape .*, got \[4, 0\]"),
        ({"centers": torch.ones(4, 3).double()}, r"centers: expected dtype torch.float32.*got torch.float64"),
        ({"centers": torch.ones(4, 3).half()}, r"centers: expected dtype torch.float32.*got torch.float16"),
        ({"centers": torch.ones(4, 3).int()}, r"centers: expected dtype torch.float32.*got torch.int32"),
        ({"metric": "manhattan"}, r"metric: expected one of 'euclidean', 'cosine', got 'manhattan'"),
        (
            {"backend": "triton"},
            r"backend: expected one of 'auto', 'cuda', 'cpu', .*, got 'triton'",
        ),
    ],
    ids=str,
)
def test_errors_name_the_argument(changes, message, kmeans_device):
    changes = {k: v.to(kmeans_device) if isinstance(v, torch.Tensor) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        kmeans_assign(**arguments(kmeans_device, **changes))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_rows_take_their_own_or_float32_centers(dtype, kmeans_device):
    other = next(half for half in HALF if half != dtype)
    x, centers = torch.randn(5, 3, device=kmeans_device).to(dtype), torch.randn(4, 3, device=kmeans_device)
    for wrong in (other, torch.float64):
        with pytest.raises(ValueError, match=f"centers: expected dtype {dtype}.* or torch.float32, got {wrong}"):
            kmeans_assign(x, centers.to(wrong))
    for right in (dtype, torch.float32):
        assert_exact(x, centers.to(right))


def test_devices_must_be_the_same(kmeans_device):
    with pytest.raises(ValueError, match=f"centers: expected device {kmeans_device.type}.*of x.*, got meta"):
        kmeans_assign(**arguments(kmeans_device, centers=torch.ones(4, 3, device="meta")))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["x", "centers"])
@pytest.mark.parametrize("backend", ["auto", "cuda", "cpu", "blocked", "reference"])
def test_numbers_must_be_finite(backend, name, value, kmeans_device):
    wrong = arguments(kmeans_device)
    wrong[name][-1, 1] = value
    with pytest.raises(ValueError, match=f"{name}: expected finite values, got NaN or Inf"):
        kmeans_assign(**wrong, backend=backend)


def test_the_cuda_backend_says_why_it_cannot_run(kmeans_device, monkeypatch):
    with pytest.raises(ValueError, match=r"backend: 'cuda' cannot run kmeans_assign .*it takes float32"):
        kmeans_assign(*(v.double() for v in arguments(kmeans_device).values()), backend="cuda")
    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "missing", "it was not compiled", raising=False)
    with pytest.raises(ValueError, match=r"backend: 'cuda' cannot run kmeans_assign .*it was not compiled"):
        kmeans_assign(**arguments(kmeans_device), backend="cuda")
    assert_exact(*arguments(kmeans_device).values(), only=["auto"])


def test_the_cpu_backend_says_why_it_cannot_run(kmeans_device, monkeypatch):
    monkeypatch.setattr(cpu_extension, "module", None)
    monkeypatch.setattr(cpu_extension, "missing", "it was not compiled")
    with pytest.raises(ValueError, match=r"backend: 'cpu' cannot run kmeans_assign .*it was not compiled"):
        kmeans_assign(**arguments(kmeans_device), backend="cpu")
    assert_exact(*arguments(kmeans_device).values(), only=["auto"])


def test_more_problems_than_a_grid_has_are_refused(kmeans_device):
    x = torch.zeros(65536, 1, 1, device=kmeans_device)
    if "cuda" in backends(x):
        with pytest.raises(ValueError, match=r"x: expected at most 65535 problems.*, got 65536 and"):
            kmeans_assign(x, x, backend="cuda")

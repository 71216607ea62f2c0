"""csrc/device.cuh does what the PTX ISA says, and the emulation notices what a GPU would leave undefined.

On a machine with a GPU and nvcc the first half also runs on the GPU.
"""

import shutil

import numpy as np
import pytest
import torch

from tests.kernels import emulated
from tests.oracles.tensor_cores import truncated_sum

SCHEDULES = [0, -1, 1, 2, 3]
NONE, SHUFFLE, RETURN, BARRIER, OTHER_BARRIER, WHOLE_WARP = range(6)  # as in emulation_selftest.cu


@pytest.fixture(scope="module")
def emulation():
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    return emulated.build_selftest()


@pytest.fixture(params=["emulation", "gpu"], scope="module")
def device(request):
    """The self-test's module, emulated or on the GPU."""
    if request.param == "emulation":
        return request.getfixturevalue("emulation")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    compiler, reason = emulated.nvcc()
    if not compiler:
        pytest.skip(reason)
    architecture = "".join(map(str, torch.cuda.get_device_capability(0)))
    return emulated.load(emulated.compiled_by_nvcc("_selftest", architecture))


@pytest.fixture(params=SCHEDULES)
def schedule(request, emulation):
    emulation.set_schedule(request.param)
    yield request.param
    emulation.set_schedule(0)


def test_mma_multiplies_by_the_documented_layout(device):
    random = np.random.default_rng(0)
    a = random.standard_normal((16, 16)).astype(np.float16)
    b = random.standard_normal((16, 8)).astype(np.float16)
    before = random.standard_normal((16, 8)).astype(np.float32)
    d = before.copy()
    device.multiply(a, b, d)
    exact = before + a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(d, exact, rtol=0, atol=1e-5)


@pytest.fixture(params=[8, 16])
def addends(request, emulation):
    emulation.set_addition(request.param)
    yield request.param
    emulation.set_addition(0)


def operands(magnitudes: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of products and sums whose exponents differ by up to twice and three times so many powers of two."""
    random = np.random.default_rng(1)

    def draw(*shape):
        return random.standard_normal(shape) * 2.0 ** random.uniform(-magnitudes, 0, shape)

    return draw(16, 16).astype(np.float16), draw(16, 8).astype(np.float16), (8 * draw(16, 8)).astype(np.float32)


@pytest.mark.parametrize("magnitudes", [0, 5, 12])
def test_mma_truncates_where_it_is_told_to(emulation, addends, magnitudes):
    a, b, before = operands(magnitudes)
    products = a[:, None, :].astype(np.float64) * b.T[None].astype(np.float64)
    expected = truncated_sum(torch.from_numpy(before), torch.from_numpy(products), addends).numpy()
    d = before.copy()
    emulation.multiply(a, b, d)
    np.testing.assert_array_equal(d, expected)
    assert (d != (before + products.sum(2)).astype(np.float32)).any()


def test_truncation_loses_as_much_as_the_bound_says(emulation, addends):
    """A sum of 1, and beside it nothing but what is a little less than its last digit: all of that is lost."""
    a, b = np.full((16, 16), 2896 * 2.0**-23, np.float16), np.full((16, 8), 2896 * 2.0**-23, np.float16)
    product = float(a[0, 0]) * float(b[0, 0])
    assert 0.999 * 2.0**-23 < product < 2.0**-23
    d = np.ones((16, 8), np.float32)
    emulation.multiply(a, b, d)
    assert (d == 1).all()
    d = -d  # towards zero, whatever the sign
    emulation.multiply(-a, b, d)
    assert (d == -1).all()


def test_mma_multiplies_subnormals_exactly(device):
    a, b, d = np.zeros((16, 16), np.float16), np.zeros((16, 8), np.float16), np.zeros((16, 8), np.float32)
    a[3, 5], b[5, 6] = 2.0**-24, 3 * 2.0**-24
    device.multiply(a, b, d)
    assert d[3, 6] == 3 * 2.0**-48
    assert np.count_nonzero(d) == 1


def test_ldmatrix_gives_the_documented_layout(device):
    matrices = np.arange(4 * 8 * 8, dtype=np.uint16).reshape(4, 8, 8)
    fragments = np.zeros((32, 4, 2), np.uint16)
    device.ldmatrix(matrices, fragments, 0)
    for lane in range(32):
        columns = slice(2 * (lane % 4), 2 * (lane % 4) + 2)
        np.testing.assert_array_equal(fragments[lane], matrices[:, lane // 4, columns])


def test_copies_arrive_when_waited_for(device):
    source = np.arange(64 * 4, dtype=np.int32)
    for wait in (0, 1):  # two groups, of which the first is read
        target = np.zeros_like(source)
        device.copy(source, target, True, wait)
        np.testing.assert_array_equal(target, source)


def test_an_invalid_copy_is_zero(device):
    source, target = np.arange(64 * 4, dtype=np.int32), np.ones(64 * 4, np.int32)
    device.copy(source, target, False, 0)
    assert not target.any()


def test_warps_shuffle_and_vote(device):
    x = np.arange(-32, 32, dtype=np.float32)
    floats, doubles = np.zeros(64, np.float32), np.zeros(64, np.float64)
    integers, some = np.zeros(64, np.int32), np.zeros(64, np.int32)
    device.reduce(x, floats, doubles, integers, some)
    sums = np.repeat(x.reshape(2, 32).sum(1), 32)
    np.testing.assert_array_equal(floats, sums)
    np.testing.assert_array_equal(doubles, sums)
    np.testing.assert_array_equal(integers, np.repeat(np.arange(64).reshape(2, 32).sum(1), 32))
    np.testing.assert_array_equal(some, np.repeat([0, 1], 32))


def test_every_thread_of_the_grid_runs_once(device):
    where, count = np.full((4, 3, 2, 64), -1, np.int32), np.zeros(1, np.int32)
    device.positions(2, 3, 4, 64, where, count)
    z, y, x, thread = np.indices(where.shape)
    np.testing.assert_array_equal(where, 10000 * z + 1000 * y + 100 * x + thread)
    assert count[0] == where.size


def test_an_empty_grid_is_no_error(device):
    device.positions(2, 0, 4, 64, np.zeros(1, np.int32), np.zeros(1, np.int32))


def test_the_lower_and_the_higher_pass_over_every_nan(device):
    nan = np.array([0x7F800001, 0xFF80000F, 0x7FC00000, 0xFFFFFFFF], np.uint32).view(np.float32)  # signalling ones too
    numbers = np.array([1, -2, np.inf, -np.inf], np.float32)
    for a, b in ((nan, numbers), (numbers, nan)):
        low, high = np.zeros((2, 4), np.float32)
        device.lower_and_higher(a, b, low, high)
        np.testing.assert_array_equal(low, numbers)
        np.testing.assert_array_equal(high, numbers)
    low, high = np.zeros((2, 4), np.float32)
    device.lower_and_higher(numbers, numbers[::-1].copy(), low, high)
    np.testing.assert_array_equal(low, [-np.inf, -2, -2, -np.inf])
    np.testing.assert_array_equal(high, [1, np.inf, np.inf, 1])


def test_float_of_every_half_and_bfloat16(device):
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    values = np.zeros(1 << 16, np.float32)
    device.float_of_half(bits, values)
    np.testing.assert_array_equal(values, bits.view(np.float16).astype(np.float32))
    device.float_of_bfloat16(bits, values)
    np.testing.assert_array_equal(values, (bits.astype(np.uint32) << 16).view(np.float32))


def test_float_of_double_rounds(device):
    doubles = np.random.default_rng(0).standard_normal(1000)
    floats = np.zeros(1000, np.float32)
    device.float_of_double(doubles, floats)
    np.testing.assert_array_equal(floats, doubles.astype(np.float32))


def test_half_of_float_rounds_to_nearest_even(device):
    halfs = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    exact = np.sort(halfs[np.isfinite(halfs)].astype(np.float32))
    ties = (exact[:-1] + exact[1:]) / 2
    above, below = (np.nextafter(ties, np.float32(end)) for end in (np.inf, -np.inf))
    edges = np.array([65519.996, 65520, 1e38, np.inf, 2.0**-25, 2.0**-149, 0], np.float32)
    anything = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, dtype=np.uint32).view(np.float32)
    floats = np.concatenate([exact, ties, above, below, edges, -edges, anything])
    rounded = np.zeros(len(floats), np.float16)
    device.round_to_half(floats, rounded)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = floats.astype(np.float16)
    np.testing.assert_array_equal(rounded, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(rounded[numbers]), np.signbit(expected[numbers]))


# ---- What only the emulation can tell.


def test_a_missing_wait_leaves_nan(emulation, schedule):
    source, target = np.arange(64 * 4, dtype=np.int32), np.zeros(64 * 4, np.int32)
    emulation.copy(source, target, True, 2)
    assert np.isnan(target.view(np.float32)).all()


def test_a_missing_barrier_changes_the_result(emulation, schedule):
    source = np.arange(4 * 128, dtype=np.int32)
    expected = source.reshape(4, 128)[:, ::-1].ravel()
    target = np.zeros_like(source)
    emulation.reverse(source, target, 128, True, 512)
    np.testing.assert_array_equal(target, expected)
    emulation.reverse(source, target, 128, False, 512)
    assert (target != expected).any()


def test_a_buffer_filled_too_early_changes_the_result(emulation, schedule):
    source = np.arange(8 * 128 * 4, dtype=np.int32)
    expected = np.roll(source.reshape(8, 128, 4), -64, axis=1).ravel()
    target = np.zeros_like(source)
    emulation.refill(source, target, 128, True)
    np.testing.assert_array_equal(target, expected)
    emulation.refill(source, target, 128, False)
    assert (target != expected).any()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (SHUFFLE, r"thread \d+ is at shuffle_xor of line \d+, thread \d+ is at warp_any of line \d+"),
        (RETURN, r"thread \d+ is at warp_any of line \d+, thread \d+ has returned"),
        (BARRIER, r"thread \d+ is at warp_barrier of line \d+, thread \d+ is at barrier of line \d+"),
        (OTHER_BARRIER, r"thread \d+ is at barrier of line \d+, thread \d+ is at barrier of line \d+"),
    ],
)
def test_divergence_is_an_error(emulation, schedule, how, message):
    with pytest.raises(RuntimeError, match=message):
        emulation.diverge(how, np.zeros(1, np.int32))
    count = np.zeros(1, np.int32)
    emulation.diverge(NONE, count)  # and the next launch is as if nothing had been
    assert count[0] == 64


def test_a_whole_warp_may_return(emulation, schedule):
    count = np.zeros(1, np.int32)
    emulation.diverge(WHOLE_WARP, count)
    assert count[0] == 32


def test_addresses_are_checked(emulation):
    matrices, fragments = np.zeros((4, 8, 8), np.uint16), np.zeros((32, 4, 2), np.uint16)
    with pytest.raises(RuntimeError, match="not aligned"):
        emulation.ldmatrix(matrices, fragments, 4)
    with pytest.raises(RuntimeError, match="outside shared memory"):
        emulation.ldmatrix(matrices, fragments, 16)
    source = np.zeros(64 * 4 + 4, np.int32)
    skewed = source[1:-3] if source.ctypes.data % 16 == 0 else source[:-4]
    with pytest.raises(RuntimeError, match="not aligned"):
        emulation.copy(skewed, np.zeros_like(skewed), True, 0)


def test_writes_beyond_shared_memory_are_errors(emulation):
    emulation.poke(31, 32)
    for byte in (-1, 32):
        with pytest.raises(RuntimeError, match=f"write at byte {byte} of 32"):
            emulation.poke(byte, 32)


def test_impossible_launches_are_errors(emulation):
    source = np.zeros(40, np.int32)
    with pytest.raises(RuntimeError, match="32, 64"):
        emulation.reverse(source, source, 40, True, 160)
    with pytest.raises(RuntimeError, match="227 KiB"):
        emulation.poke(0, 228 << 10)

"""Products of halves with float32 results, as a GPU has them, and what the operators over whole rows make of them.

Without a GPU a double stands for torch's product on one: halves are multiplied exactly and added in float32.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ccl_fast import ops
from ccl_fast.ops.rowwise import blocks, half_product, histogram, softmax, topk
from ccl_fast.ops.rowwise.half_product import Weights, columns_of, factor, multiplies_halves, product
from ccl_fast.ops.transport import distilled_prediction, swapped_prediction
from tests.oracles.pairs import every_choice, pairs
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")
halves = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))


@pytest.fixture
def tensor_cores(monkeypatch):
    """torch's product of halves with a float32 result, which it has on GPUs alone, on a CPU: what was multiplied."""
    shapes = []

    def mm(x, y, out_dtype):
        assert x.dtype == y.dtype and x.dtype in (torch.float16, torch.bfloat16) and out_dtype == torch.float32
        shapes.append((len(x), x.shape[1], y.shape[1]))
        return x.float() @ y.float()

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", mm, "CPU")
    monkeypatch.setattr(half_product, "multiplies_halves", lambda device: True)
    yield shapes
    library._destroy()


# ---- the products ----


@halves
@pytest.mark.parametrize("l", (0, 1, 13, 64))
def test_a_product_is_that_of_float32_copies(dtype, l, tensor_cores):
    x, y = torch.randn(5, l).to(dtype), torch.randn(7, l).to(dtype)
    assert factor(x).dtype == dtype
    result = product(factor(x), factor(y))
    assert result.dtype == torch.float32
    assert torch.equal(result, x.float() @ y.float().T)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_elsewhere_factors_are_of_accumulation_precision(dtype):
    x = torch.randn(5, 6, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert factor(x).dtype == wide and torch.equal(factor(x), x.to(wide))
    assert torch.equal(product(factor(x), factor(x)), x.to(wide) @ x.to(wide).T)


@pytest.mark.parametrize(
    "device, cuda, capability, expected",
    (
        ("cuda", "13.0", (8, 0), True),
        ("cuda", "12.6", (9, 0), True),
        ("cuda", "12.6", (7, 5), False),  # no bfloat16 there
        ("cuda", None, (9, 4), False),  # AMD's
        ("cpu", "13.0", None, False),
        ("mps", None, None, False),
    ),
)
def test_which_devices_multiply_halves(device, cuda, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplies_halves.__wrapped__(torch.device(device)) is expected


@halves
@pytest.mark.parametrize("n, m", ((5, 7), (5, 8), (1, 1), (3, 0), (16, 33)))
@pytest.mark.parametrize("size", (1.0, 1e-9, 1e-28, 3e30, 0.0))
def test_weighted_sums(dtype, n, m, size, tensor_cores):
    q, k = torch.randn(n, 6).to(dtype), torch.randn(m, 6).to(dtype)
    w = torch.randn(n, m) * size
    weights = Weights(w.clone(), dtype)
    for actual, exact, plain in (
        (weights.sums_of_keys(columns_of(k)), w.double() @ k.double(), (w / (size or 1)).to(dtype) @ k),
        (weights.sums_of_queries(columns_of(q)).T, w.double().T @ q.double(), (w / (size or 1)).to(dtype).T @ q),
    ):
        assert actual.dtype == torch.float32
        assert_as_accurate(actual, exact, plain.double() * size, dtype)


@halves
def test_rows_of_weights_are_aligned(dtype):
    for m in (1, 7, 8, 9, 65):
        w = Weights(torch.ones(3, m), dtype).w
        assert w.shape == (3, m) and w.stride(0) % 8 == 0 and w.stride(1) == 1


# ---- blocks of rows ----

GIB = 1 << 30


@pytest.mark.parametrize("memory", (0, 8 * GIB, 24 * GIB, 80 * GIB, 141 * GIB))
@pytest.mark.parametrize("keys", (0, 1, 1000, 65_536, 1_000_000))
def test_blocks_on_a_gpu_are_a_share_of_its_memory(memory, keys, monkeypatch):
    monkeypatch.setattr(blocks, "device_memory", lambda device: memory)
    rows = blocks.block_rows(keys, torch.device("cuda:0"))
    taken, share = rows * keys * blocks.BYTES_PER_SIMILARITY, max(384 << 20, memory // 32)
    assert rows >= 1 and (taken <= share or rows == 32)
    # All of the share is used, and no block is smaller than those of 2^24 pairs were, which fitted everywhere.
    assert taken > share - max(keys, 1) * blocks.BYTES_PER_SIMILARITY or rows == 32 or keys == 0
    assert rows >= min(512, (1 << 24) // max(keys, 1))


@pytest.mark.parametrize("keys, rows", ((0, 512), (100, 512), (2048, 512), (4096, 256), (65_536, 32), (10_000_000, 32)))
def test_blocks_on_a_cpu_stay_in_its_cache(keys, rows):
    assert blocks.block_rows(keys, torch.device("cpu")) == rows


def test_the_memory_of_a_gpu_is_asked_once(monkeypatch):
    asked = []

    class Properties:
        total_memory = 80 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or Properties)
    blocks.device_memory.cache_clear()
    device = torch.device("cuda:0")
    assert [blocks.device_memory(device) for _ in range(3)] == [80 * GIB] * 3 and asked == [device]
    blocks.device_memory.cache_clear()
    assert blocks.device_memory(torch.device("mps")) == 0


# ---- the operators ----


def by_rows(given, values):
    """Candidates' values [n, m], -inf elsewhere."""
    return values.masked_fill(~given.mask(), -torch.inf)


def dense_mean(given, q, k, scale):
    x = q @ k.T
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (by_rows(given, scale * wide).softmax(1) * wide).sum(1)


def dense_hardest(given, q, k, scale):
    x = q @ k.T
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    candidates = by_rows(given, x.detach())
    chosen = given.mask() & (candidates >= candidates.topk(3).values[:, -1:])
    return (scale * x).masked_fill(~chosen, -torch.inf).logsumexp(1)


def excluded(given):
    return torch.arange(2 * len(given.q)).view(-1, 2) % len(given.keys)


def dense_excluding(given, q, k, scale):
    x = (q @ k.T).to(torch.promote_types(q.dtype, torch.float32))
    return (scale * x).scatter(1, excluded(given), -torch.inf).logsumexp(1)


def potentials(given, dtype):
    return torch.linspace(-1, 1, 2 * len(given.keys), dtype=dtype).view(2, -1)


def dense_swapped(given, q, k, scale):
    z, wide = torch.stack((q, q.flip(0))), torch.promote_types(q.dtype, torch.float32)
    x = (z @ k.T).to(wide)
    plans = (2 * x.detach() + potentials(given, wide)[:, None]).softmax(2)
    return -(plans * (scale * x).log_softmax(2).flip(0)).sum((0, 2))


def dense_distilled(given, q, k, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    x = (q @ k.T).to(wide)
    teacher = (2 * x.detach().flip(0) + potentials(given, wide)[0]).softmax(1)
    return -(teacher * (scale * x).log_softmax(1)).sum(1)


OPERATORS = {
    "mean": (lambda given, q, k, scale: ops.expected_similarity(q, k, scale=scale, **given.among), dense_mean),
    "hardest": (lambda given, q, k, scale: ops.topk_logsumexp(q, k, scale=scale, topk=3, **given.among), dense_hardest),
    "all but some": (
        lambda given, q, k, scale: ops.logsumexp_excluding(q, k, excluded(given), scale=scale),
        dense_excluding,
    ),
    "swapped prediction": (
        lambda given, q, k, scale: ops.swapped_prediction(
            torch.stack((q, q.flip(0))), k, potentials(given, torch.float32), scale=scale, plan_scale=2.0,
            backend="blocked",
        ),
        dense_swapped,
    ),
    "distilled prediction": (
        lambda given, q, k, scale: ops.distilled_prediction(
            q, k, q.flip(0), k, scale=scale, teacher_scale=2.0, potentials=potentials(given, torch.float32)[0]
        ),
        dense_distilled,
    ),
}  # fmt: skip
every_operator = pytest.mark.parametrize("operator", OPERATORS)


def evaluate(function, given, dtype, gradient=1.0):
    """Values, gradients of the rows, the keys and the scale."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (given.q, given.k) if x is not None]
    scale = torch.tensor(2.0, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    value = function(given, leaves[0], None if given.k is None else leaves[1], scale)
    weights = torch.linspace(1, 2, len(value), dtype=value.dtype) * gradient
    return [value.detach(), *torch.autograd.grad(value, (*leaves, scale), weights)]


def check(operator, given, dtype):
    fast, dense = OPERATORS[operator]

    def of_rows(given, q, k, scale):
        return dense(given, q, q if k is None else k, scale)

    actual = evaluate(fast, given, dtype)
    exact, plain = (evaluate(of_rows, given, each) for each in (torch.float64, dtype))
    for i, (a, e, p) in enumerate(zip(actual, exact, plain, strict=True)):
        assert a.dtype == p.dtype
        assert_as_accurate(a, e, p, dtype, f"{operator}: {i}")


@halves
@every_operator
@pytest.mark.usefixtures("tensor_cores", "several_tiles")
def test_operators_are_as_accurate_as_plain_torch(operator, dtype):
    check(operator, pairs(13, 70, d=17, dtype=dtype), dtype)


@halves
@every_choice
@pytest.mark.parametrize("operator", ("mean", "hardest"))
@pytest.mark.usefixtures("tensor_cores", "several_tiles")
def test_among_rows_themselves_and_by_ids(operator, candidates, dtype):
    check(operator, pairs(33, None, candidates, d=17, dtype=dtype), dtype)


@every_operator
@pytest.mark.usefixtures("tensor_cores")
def test_weights_below_the_range_of_float16_do_not_vanish(operator):
    # As of a mean over many rows: gradients are still in float16's range, but not what each of 700 alike keys brings.
    given, fast = pairs(13, 700, d=17, dtype=torch.float16), OPERATORS[operator][0]
    given.q, given.k = given.q * 0.05, given.k + 1
    actual = evaluate(fast, given, torch.float16, 1e-4)[1:]
    expected = evaluate(fast, given, torch.float32, 1e-4)[1:]
    for a, e in zip(actual, expected, strict=True):
        assert_as_accurate(a, e, e.half(), torch.float16)


@halves
@pytest.mark.usefixtures("tensor_cores", "several_tiles")
def test_without_gradients_results_are_those_of_float32_copies(dtype):
    given = pairs(13, 300, "other_id", d=17, dtype=dtype)
    copies = given.q.float(), given.k.float()
    options = given.among | {"bins": 20, "range": (-9, 9)}
    assert torch.equal(
        ops.similarity_histogram(given.q, given.k, **options), ops.similarity_histogram(*copies, **options)
    )
    for actual, expected in zip(
        ops.streaming_topk(given.q, given.k, topk=4, **given.among),
        ops.streaming_topk(*copies, topk=4, **given.among),
        strict=True,
    ):
        assert torch.equal(actual, expected)
    every_edge = torch.arange(14) * 900, torch.arange(300).repeat(3 * 13)
    assert torch.equal(ops.edge_similarity(given.q, given.k, *every_edge), ops.edge_similarity(*copies, *every_edge))


@halves
@every_operator
def test_a_block_takes_one_product_forward_and_three_backward_all_of_halves(operator, dtype, tensor_cores, monkeypatch):
    rows, keys, d, views = 32, 1000, 16, 2 if operator == "swapped prediction" else 1
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", views * rows * keys)
    monkeypatch.setattr(half_product, "matmul_nt", None)  # the product of float32 matrices
    given = pairs(3 * rows, keys, d=d, dtype=dtype)
    value = OPERATORS[operator][0](given, given.q.requires_grad_(), given.k.requires_grad_(), torch.tensor(2.0))
    similarities = [(views * rows, d, keys)] * (2 if operator == "distilled prediction" else 1)  # the teacher's too
    assert tensor_cores == similarities * 3
    tensor_cores.clear()
    value.sum().backward()
    assert tensor_cores == [*similarities, (views * rows, keys, d), (d, views * rows, keys)] * 3


# ---- what a block keeps ----


class Live(TorchDispatchMode):
    """The most bytes that results of torch's functions, those of temporary ones inside others too, took at a time."""

    def __init__(self):
        super().__init__()
        self.results, self.most = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.results += [weakref.ref(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.results = [x for x in self.results if x() is not None]
        storages = {x().untyped_storage()._cdata: x().untyped_storage().nbytes() for x in self.results}
        self.most = max(self.most, sum(storages.values()))
        return result


def run_inside(function, *arguments):
    """A registered operator's own function, in which the mode sees everything: of the operator it sees one call."""
    with torch.no_grad(), Live() as live:
        function(*arguments)
    return live.most


@halves
@pytest.mark.usefixtures("tensor_cores")
def test_a_pair_takes_no_more_bytes_than_blocks_are_sized_for(dtype, monkeypatch):
    monkeypatch.setattr(topk, "_largest_of_few", torch.topk)  # as on a GPU, where NumPy is not at hand
    monkeypatch.setattr(softmax, "kth_largest", lambda x, k: topk.largest(x, k)[0][:, -1])
    n, m, d = 64, 5000, 4
    monkeypatch.setattr(blocks, "MAX_ROWS", n)
    monkeypatch.setattr(blocks, "CPU_ELEMENTS", 8 * n * m)
    q, k, ids = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype), torch.arange(n) % 3
    of_keys = torch.arange(m) % 3
    scale, bias, vector, none = torch.tensor(2.0), torch.zeros(m), torch.zeros(n), torch.zeros(0)
    few, rows = torch.zeros(n, 3, dtype=torch.int64), (q, k, scale)
    among, views, all_four = (ids, of_keys, None), torch.stack((q, q)), [True] * 4
    taken = {
        "mean": run_inside(softmax._forward, *rows, bias, *among, "other_id", 0, True),
        "hardest": run_inside(softmax._forward, *rows, None, *among, "other_id", m, False),
        "excluding": run_inside(softmax._forward, *rows, None, None, None, few, "all", 0, False),
        "mean, backward": run_inside(
            softmax._backward, *rows, bias, *among, vector, vector, none, vector, vector, "other_id", all_four
        ),
        "hardest, backward": run_inside(
            softmax._backward, *rows, None, *among, vector, none, vector, vector, none, "other_id",
            [True, True, True, False],
        ),
        "top-k": run_inside(topk._op._init_fn, q, k, ids, of_keys, "other_id", 400, None),
        "top-k below a ceiling": run_inside(topk._op._init_fn, q, k, ids, of_keys, "other_id", 400, vector),
        "histogram": run_inside(histogram._op._init_fn, q, k, ids, of_keys, "other_id", 10, -1.0, 1.0),
        "distilled": run_inside(distilled_prediction._forward, q, k, q, k, None, None, scale, 2.0),
        "distilled, backward": run_inside(
            distilled_prediction._backward, q, k, q, k, None, None, scale, vector, 2.0, all_four[:3]
        ),
        "swapped": run_inside(swapped_prediction._forward, views, k, torch.zeros(2, m), scale, 2.0) // 2,
        "swapped, backward": run_inside(
            swapped_prediction._backward, views, k, torch.zeros(2, m), scale, vector, 2.0, all_four[:3]
        ) // 2,
        "swapped, with the gradient": run_inside(
            swapped_prediction._sum, views, k, torch.zeros(2, m), scale, 2.0, True
        ) // 2,
    }  # fmt: skip
    # Sums for the keys, and what is as small, aside.
    aside = 4 * m * (2 * d + 2)
    assert all(4 * n * m <= bytes <= blocks.BYTES_PER_SIMILARITY * n * m + aside for bytes in taken.values()), taken

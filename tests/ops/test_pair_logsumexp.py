"""The log-sum-exp with a term of each pair against the whole matrix, and against the operators without one."""

import pytest
import torch

from ccl_fast.ops import map_row_blocks, pair_logsumexp, streaming_logsumexp
from tests.oracles.losses import assert_matches, differentiate
from tests.oracles.pairs import every_size
from tests.peak import peak_bytes
from tests.tolerance import OF_TORCH_2_11, assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def window(a, b):
    """Of near positions alone, the nearer the better; some rows have none."""
    distance = (a[:, None, 0] - b[:, 0]).abs()
    return (-0.3 * distance).masked_fill(distance > 1.0, -torch.inf)


def product(a, b):
    return a @ b.T


def labels(a, b):
    """Of attributes that are integers: other labels than both of a row's."""
    return torch.zeros(()).masked_fill((a[:, None, :] == b[:, None]).any(2), -torch.inf)


TERMS = {"window": window, "product": product, "labels": labels}


def tensors(n, m, term="window", dtype=torch.float64, seed=0):
    """Rows, keys and their attributes."""
    generator = torch.Generator().manual_seed(seed)

    def rows(number, d):
        return torch.randn(number, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def attributes(number):
        if term == "labels":
            return torch.randint(3, (number, 2), generator=generator)
        return rows(number, 2)

    k = None if m is None else rows(m, 6)
    a = attributes(n)
    b = None if m is None else attributes(m)
    return [rows(n, 6), k, a, b[:, 0] if term == "labels" and b is not None else b]


def of_labels(term, a, b):
    """In self-contrast keys have the attributes of rows: those of labels their first."""
    return TERMS[term](a, b[:, 0] if term == "labels" and b.ndim == 2 else b)


def reference(q, k, a, b, *, scale, term):
    """The whole matrix."""
    keys, others = (q, a) if k is None else (k, b)
    logits = scale * (q @ keys.T).to(torch.promote_types(q.dtype, torch.float32)) + term(a, others)
    if k is None:
        logits = logits.masked_fill(torch.eye(len(q), dtype=torch.bool), -torch.inf)
    maximum = logits.detach().amax(1, keepdim=True) if logits.shape[1] else logits.new_zeros(len(q), 1)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    total = (logits - maximum).exp().sum(1)
    empty = total == 0
    return (total.masked_fill(empty, 1.0).log() + maximum[:, 0]).masked_fill(empty, -torch.inf)


def operator(q, k, a, b, *, scale, term):
    return pair_logsumexp(q, k, scale=scale, term=term, q_attributes=a, k_attributes=b)


def evaluate(function, given, scale=2.0, **options):
    """The values, which may be -inf, and all gradients, that of the scale too."""
    scale = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    values = function(*given, scale=scale, **options)
    leaves = [x for x in (*given, scale) if x is not None and x.requires_grad]
    masked = torch.where(values.isinf(), 0.0, values)
    return [values.isinf(), *differentiate(masked, leaves, unused=True)]


@every_size
@pytest.mark.parametrize("term", TERMS)
def test_the_definition(n, m, term):
    given = tensors(n, m, term)
    options = {"term": lambda a, b: of_labels(term, a, b)}
    actual, expected = (evaluate(function, given, **options) for function in (operator, reference))
    assert torch.equal(actual[0], expected[0])
    assert_matches(actual[1:], expected[1:], 1e-12)


def test_some_rows_are_masked_altogether():
    given = tensors(13, 5)
    values = operator(*given, scale=2.0, term=window)
    assert values.isinf().any() and values.isfinite().any()


def test_rows_that_are_all_masked_get_no_gradient():
    given = tensors(9, 7)
    q, k, *_ = given
    values = operator(*given, scale=2.0, term=lambda a, b: torch.full((len(a), len(b)), -torch.inf))
    assert (values == -torch.inf).all()
    torch.where(values.isinf(), 0.0, values).sum().backward()
    assert all((x.grad == 0).all() for x in (q, k))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("m", (None, 11))
def test_dtypes(dtype, m):
    given = tensors(9, m, "product", dtype)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in given]
    actual, exact, plain = (
        evaluate(f, x, term=product) for f, x in ((operator, given), (reference, wide), (reference, given))
    )
    assert actual[1].dtype == torch.float32 and actual[2].dtype == dtype
    for a, e, p in zip(actual[1:], exact[1:], plain[1:], strict=True):
        assert_as_accurate(a, e, p, dtype)


@pytest.mark.parametrize("m", (None, 11))
def test_a_bias_of_each_key_and_ids_are_the_streaming_operators(m):
    q, k, *_ = tensors(9, m)
    bias, ids = torch.randn(9 if m is None else m, dtype=torch.float64), torch.arange(9 if m is None else m) % 3
    q_ids, keys = torch.arange(9) % 3, torch.stack((bias, ids.double()), 1)
    rows = keys if m is None else torch.stack((torch.zeros(9).double(), q_ids.double()), 1)

    def term(a, b):
        return b[:, 0].masked_fill(a[:, 1:] == b[:, 1], -torch.inf)

    expected = streaming_logsumexp(
        q, k, scale=2.0, key_bias=bias, q_ids=q_ids, k_ids=None if m is None else ids, candidates="other_id"
    )
    actual = operator(q, k, rows, None if m is None else keys, scale=2.0, term=term)
    torch.testing.assert_close(actual, expected)


def test_one_side_alone_may_require_a_gradient():
    for side in range(4):
        given = [x.detach() for x in tensors(9, 7)]
        given[side].requires_grad_()
        actual, expected = (evaluate(f, given, term=window) for f in (operator, reference))
        assert_matches(actual[1:], expected[1:], 1e-12)


def test_a_tensor_that_is_no_attribute_may_not_require_a_gradient():
    given, slope = tensors(9, 7), torch.tensor(0.3, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"function: expected one of the tensors that it is given alone, .*would be lost"
    ):
        operator(*given, scale=2.0, term=lambda a, b: slope * window(a, b))
    operator(*given, scale=2.0, term=lambda a, b: slope.detach() * window(a, b))


def test_autocast_rounds_the_rows():
    given = [x.detach() for x in tensors(9, 7, dtype=torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = operator(*given, scale=2.0, term=window)
    q, k, a, b = given
    assert torch.equal(values, operator(q.bfloat16(), k.bfloat16(), a, b, scale=2.0, term=window))


def test_a_second_derivative_raises():
    given = tensors(9, 7)
    values = operator(*given, scale=2.0, term=product)
    (gradient,) = torch.autograd.grad(values.sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="pair_logsumexp: the gradient of its gradient"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, at a break
def test_under_func_and_compiled():
    q, k, a, b = (x.detach() for x in tensors(9, 7))
    expected = torch.autograd.functional.vjp(
        lambda q: reference(q, k, a, b, scale=2.0, term=product), q, torch.ones(9).double()
    )[1]

    def total(q):
        return operator(q, k, a, b, scale=2.0, term=product).sum()

    torch.testing.assert_close(torch.func.grad(total)(q), expected)
    torch.compiler.reset()
    leaf = q.clone().requires_grad_()
    torch.compile(total, backend="aot_eager")(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_row_blocks_of_any_function():
    x, y = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (9, 7))
    power = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def far(rows, keys):
        distance = (rows[0][:, None] - keys[0]).square().sum(2) + 1
        return torch.stack((distance.pow(keys[1]).sum(1), distance.amax(1)), 1)

    for size in (None, 1, 100):
        actual = differentiate(map_row_blocks(far, [x], [y, power], size=size), [x, y, power])
        assert_matches(actual, differentiate(far([x], [y, power]), [x, y, power]), 1e-12)


STEP = """
from ccl_fast.ops import pair_logsumexp

def prepare(n):
    q, age = torch.randn(n, 16, requires_grad=True), torch.rand(n, 1, requires_grad=True)
    def near(a, b):
        return -(a - b[:, 0]).square()
    return lambda: pair_logsumexp(q, scale=1.0, term=near, q_attributes=age).sum().backward()
"""


@pytest.mark.slow
def test_memory_is_linear():
    """A single matrix of all pairs would take 64 MiB, and dense code holds several of them."""
    assert peak_bytes(STEP, (4096,), (64,)) <= 32 * 2**20 + OF_TORCH_2_11


def test_errors():
    q, k, a, b = (x.detach() for x in tensors(4, 3))
    good = {"q": q, "k": k, "scale": 1.0, "term": window, "q_attributes": a, "k_attributes": b}
    for change, message in (
        ({"q": q[0]}, r"q: expected shape \[rows, d\], got \[6\]"),
        ({"k": k[:, :2]}, r"k: expected shape \[rows, 6\], got \[3, 2\]"),
        ({"scale": "1"}, r"scale: expected a number or a tensor of one element, got '1'"),
        ({"term": 3}, r"term: expected a function of attributes, got int"),
        ({"q_attributes": a[:2]}, r"q_attributes: expected 4 rows, got shape \[2, 2\]"),
        ({"k_attributes": None}, r"k_attributes: expected attributes \[m, ...\] exactly when k is given"),
        ({"k": None}, r"k_attributes: expected attributes \[m, ...\] exactly when k is given"),
        ({"k_attributes": b.to("meta")}, r"k_attributes: expected device cpu.*meta"),
    ):
        with pytest.raises(ValueError, match=message):
            pair_logsumexp(**good | change)
    with pytest.raises(ValueError, match=r"rows: expected at least one tensor, got none"):
        map_row_blocks(lambda rows, keys: keys[0], [], [q])
    with pytest.raises(ValueError, match=r"size: expected a positive integer, got 0"):
        map_row_blocks(lambda rows, keys: rows[0], [q], size=0)
    with pytest.raises(ValueError, match=r"function: expected a function of rows and keys, got int"):
        map_row_blocks(3, [q])
    for result, got in ((lambda x: x.sum(), r"\[\]"), (lambda x: x[:1], r"\[1, 6\]"), (lambda x: None, "NoneType")):
        with pytest.raises(ValueError, match=f"function: expected a tensor with a row for each of 4 rows, got {got}"):
            map_row_blocks(lambda rows, keys, result=result: result(rows[0]), [q])
    with pytest.raises(ValueError, match=r"rows\[1\]: expected 4 rows, got shape \[3, 6\]"):
        map_row_blocks(lambda rows, keys: rows[0], [q, k], [])

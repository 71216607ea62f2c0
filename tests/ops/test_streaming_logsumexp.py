"""The operator's contract and its plain-torch backends."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccl_fast import streaming_logsumexp
from ccl_fast.ops import matmul
from ccl_fast.ops.logsumexp import blocked
from tests.ops.logsumexp_cases import Case, assert_agrees, evaluate

RELATIONS = [
    {},
    *(
        {"ids": 4, "candidates": candidates, "return_same": return_same}
        for candidates, return_same in itertools.product(("all", "other_id", "same_id"), (False, True))
    ),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Inputs of a few dozen rows then cross several tiles, ragged ones among them."""
    monkeypatch.setattr(blocked, "BLOCK", 8)


def test_reference_is_the_definition():
    q, k = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    q_ids, k_ids = torch.tensor([0, 1, 5]), torch.tensor([0, 0, 1, 2])
    both = streaming_logsumexp(
        q, k, scale=2.0, key_bias=bias, q_ids=q_ids, k_ids=k_ids, return_same=True, backend="reference"
    )
    for i in range(3):
        logit = [2.0 * float(q[i] @ k[j]) + float(bias[j]) for j in range(4)]
        same = [logit[j] for j in range(4) if q_ids[i] == k_ids[j]]
        assert both[0][i] == pytest.approx(torch.tensor(logit).exp().sum().log().item(), rel=1e-6)
        assert both[1][i] == pytest.approx(torch.tensor(same).exp().sum().log().item(), rel=1e-6)
    alone = streaming_logsumexp(q, scale=2.0, backend="reference")
    assert alone[0] == pytest.approx(float(torch.logsumexp(2.0 * q[0] @ q[1:].T, 0)))


@pytest.mark.parametrize("m", [None, 21])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("relation", RELATIONS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 10.0, 200.0])
def test_blocked_agrees(m, bias, relation, scale):
    assert_agrees(Case(m=m, bias=bias, scale=scale, **relation), "blocked")


@pytest.mark.parametrize("m", [None, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [10.0, 200.0])
def test_blocked_agrees_in_every_dtype(m, dtype, scale):
    assert_agrees(Case(m=m, scale=scale, bias=m is not None, ids=3, return_same=True), "blocked", dtype)


@pytest.mark.parametrize("m", [None, 21])
@pytest.mark.parametrize("scale", [10.0, 200.0])
def test_blocked_agrees_without_onednn(m, scale, monkeypatch):
    monkeypatch.setattr(matmul, "_onednn_linear", lambda: None)
    assert_agrees(Case(m=m, scale=scale, bias=m is not None, ids=3, return_same=True), "blocked", torch.float32)


def test_a_scaled_query_does_not_overflow_where_keys_are_tiny():
    q, k = torch.randn(9, 4) * 1e38 / 4, torch.randn(7, 4) * 1e-38
    ours = streaming_logsumexp(q, k, scale=20.0, backend="blocked")
    truth = streaming_logsumexp(q.double(), k.double(), scale=20.0, backend="reference")
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


def test_blocked_agrees_in_large_tiles(monkeypatch):
    monkeypatch.setattr(blocked, "LARGE_BLOCK", 16)
    monkeypatch.setattr(blocked, "LARGE", 20)
    assert_agrees(Case(m=None, scale=10.0, ids=3, return_same=True), "blocked", torch.float32)


@pytest.mark.parametrize("m", [None, 21])
@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize("relation", RELATIONS[1:], ids=str)
def test_blocked_agrees_where_tiles_end_with_an_id(m, group, relation, monkeypatch):
    monkeypatch.setattr(blocked, "LARGE_GROUP", group)
    assert_agrees(Case(m=m, scale=10.0, **relation), "blocked", torch.float32)


def test_tiles_of_two_towers_hold_no_unwanted_pair():
    ids = torch.arange(2).repeat_interleave(300)
    bounded = torch.tensor(True)
    problem = blocked._Problem(torch.randn(600, 4), None, torch.ones(()), None, ids, None, False, True, bounded)
    tiles = list(problem.tiles())
    assert {tile.relation for tile in tiles} == {"other"}
    assert sum((t.rows.stop - t.rows.start) * (t.cols.stop - t.cols.start) for t in tiles) == 300 * 300


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    m=st.one_of(st.none(), st.integers(1, 40)),
    d=st.integers(1, 20),
    ids=st.one_of(st.none(), st.integers(1, 40)),
    scale=st.floats(-300, 300),
    seed=st.integers(0, 1000),
)
def test_blocked_agrees_at_any_shape(n, m, d, ids, scale, seed):
    assert_agrees(Case(n, m, d, scale, ids=ids, return_same=ids is not None), "blocked", seed=seed)


@pytest.mark.parametrize("m,bias", list(itertools.product([None, 21], [False, True])))
@pytest.mark.parametrize("needs", ["q", "s", "qk", "qs", "qb", "ks", "sb", "qks", "ksb", "qkb"])
def test_blocked_gives_only_the_gradients_asked_for(m, bias, needs):
    assert_agrees(Case(m=m, bias=bias, needs=needs), "blocked")


@pytest.mark.parametrize("scale", [3.0, 80.0])
@pytest.mark.parametrize("m", [None, 5])
def test_gradcheck(m, scale):
    q = torch.nn.functional.normalize(torch.randn(9, 3, dtype=torch.float64), dim=1).requires_grad_()
    k = None if m is None else torch.randn(m, 3, dtype=torch.float64).mul_(0.3).requires_grad_()
    bias = torch.randn(m or 9, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)

    def f(q, s, bias, *k):
        return streaming_logsumexp(q, *k, scale=s, key_bias=bias, backend="blocked")

    assert torch.autograd.gradcheck(f, (q, s, bias, *(() if k is None else (k,))))


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_rows_without_candidates_are_minus_infinity_without_gradient(backend):
    q = torch.randn(6, 3, requires_grad=True)
    ids = torch.tensor([0, 0, 0, 1, 2, 2])  # row 3 has no other of its id
    out = streaming_logsumexp(q, scale=1.0, q_ids=ids, candidates="same_id", backend=backend)
    assert (out == -torch.inf).tolist() == [False, False, False, True, False, False]
    out[3].backward()
    assert torch.equal(q.grad, torch.zeros_like(q))
    lonely = torch.randn(1, 3, requires_grad=True)
    assert streaming_logsumexp(lonely, scale=1.0, backend=backend).item() == -torch.inf
    assert streaming_logsumexp(lonely, q[:0].detach(), scale=1.0, backend=backend).item() == -torch.inf
    assert streaming_logsumexp(q[:0], scale=1.0, backend=backend).shape == (0,)


@pytest.mark.parametrize("scale", [10.0, 100.0])
@pytest.mark.parametrize("m", [None, 6])
def test_a_key_with_bias_minus_infinity_is_no_key(m, scale):
    q, k = torch.randn(6, 4), None if m is None else torch.randn(6, 4)
    bias = torch.zeros(6)
    bias[2] = -torch.inf
    kept = [i for i in range(6) if i != 2]
    for backend in ("reference", "blocked"):
        out = streaming_logsumexp(q, k, scale=scale, key_bias=bias, backend=backend)
        if m is None:
            torch.testing.assert_close(out[kept], streaming_logsumexp(q[kept], scale=scale))
        else:
            torch.testing.assert_close(out, streaming_logsumexp(q, k[kept], scale=scale))


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_nan_and_infinity_are_never_hidden(scale):
    for value in (torch.nan, torch.inf):
        q = torch.randn(20, 4)
        q[3, 1] = value
        q.requires_grad_()
        out = streaming_logsumexp(q, scale=scale, backend="blocked")
        assert not out.isfinite().all()
        out.sum().backward()
        assert q.grad.isnan().any()


def test_any_strides_and_offsets():
    wide = torch.randn(3, 40, 50)
    q, k = wide[1, :37, 3:19:2], wide[2].T[:21, ::5]
    assert not q.is_contiguous() and not k.is_contiguous()
    torch.testing.assert_close(
        streaming_logsumexp(q, k, scale=0.3, backend="blocked"),
        streaming_logsumexp(q.contiguous(), k.contiguous(), scale=0.3, backend="reference"),
    )


def test_uninitialised_memory_is_never_read(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))

    def fill(x):
        return x.fill_(torch.nan) if x.is_floating_point() else x

    assert_agrees(Case(bias=True, ids=3, return_same=True), "blocked")
    assert_agrees(Case(scale=200.0), "blocked")


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_the_same_bits_twice(scale):
    case = Case(n=100, ids=5, return_same=True, scale=scale)
    first, second = (evaluate(case, case.inputs(), "blocked", torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["blocked"])
def test_double_backward_is_an_error(backend):
    q = torch.randn(5, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(streaming_logsumexp(q, scale=1.0, backend=backend).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward.*reference"):
        grad.sum().backward()


def test_reference_is_differentiable_twice():
    q = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda q: streaming_logsumexp(q, scale=1.0, backend="reference"), (q,))


def test_no_graph_without_need():
    q = torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        assert not streaming_logsumexp(q, scale=1.0).requires_grad
    assert not streaming_logsumexp(q.detach(), scale=1.0).requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck reads it
def test_registration():
    """torch's own check of an operator: schema, fake, autograd, compilation with static and dynamic shapes."""
    q = torch.randn(6, 3, requires_grad=True)
    k = torch.randn(4, 3, requires_grad=True)
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    scale = torch.tensor(2.0)
    op = torch.ops.ccl_fast.streaming_logsumexp.default
    torch.library.opcheck(op, (q, None, scale, None, None, None, False, True, False, "blocked"))
    torch.library.opcheck(op, (q, k, scale, torch.randn(4), ids, ids[:4], True, True, False, "blocked"))
    torch.library.opcheck(op, (q, k, scale, None, ids, ids[:4], False, True, True, "blocked"))


@pytest.mark.parametrize("m", [None, 21])
def test_compiles_without_graph_breaks(m):
    case = Case(m=m, ids=3, return_same=True)
    inputs = case.inputs()
    inputs.pop("weights")

    def f(q, s):
        return streaming_logsumexp(**(inputs | {"q": q, "scale": s}), return_same=True, backend="blocked")

    results = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        q, s = inputs["q"].clone().requires_grad_(), inputs["scale"].clone().requires_grad_()
        out, same = g(q, s)
        (out.sum() + same.masked_fill(same == -torch.inf, 0).sum()).backward()
        results.append((out, same, q.grad, s.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_autocast_multiplies_in_half_precision_and_sums_in_float32():
    q = torch.nn.functional.normalize(torch.randn(30, 16), dim=1).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = streaming_logsumexp(q, scale=10.0)
    out.sum().backward()
    rounded = q.detach().bfloat16().float().requires_grad_()
    expected = streaming_logsumexp(rounded, scale=10.0, backend="reference")
    expected.sum().backward()
    assert out.dtype == torch.float32 and q.grad.dtype == torch.float32
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(q.grad, rounded.grad, rtol=1e-2, atol=1e-2)


Q, IDS = torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)
BAD = {
    "q: expected a torch.Tensor, got list": {"q": [1.0]},
    r"q: expected shape \[rows, d\], got \[3\]": {"q": Q[0]},
    "q: expected float64, float32, bfloat16 or float16, got torch.int64": {"q": Q.long()},
    r"k: expected shape \[rows, 3\], got \[4, 2\]": {"q": Q, "k": Q[:, :2]},
    "k: expected dtype torch.float32.*got torch.float64": {"q": Q, "k": Q.double()},
    "k: expected device cpu.*got meta": {"q": Q, "k": Q.to("meta")},
    r"scale: expected a number or a tensor of one element, got shape \(2,\)": {"q": Q, "scale": torch.ones(2)},
    r"key_bias: expected shape \[4\], got \[3\]": {"q": Q, "key_bias": torch.ones(3)},
    "key_bias: expected float64.*got torch.int64": {"q": Q, "key_bias": torch.ones(4).long()},
    "candidates: expected one of 'all', 'other_id', 'same_id', got 'some'": {"q": Q, "candidates": "some"},
    "q_ids: expected integers.*got None": {"q": Q, "return_same": True},
    r"q_ids: expected shape \[4\], got \[2\]": {"q": Q, "q_ids": IDS[:2]},
    "q_ids: expected int32 or int64, got torch.float32": {"q": Q, "q_ids": IDS.float()},
    "k_ids: expected integers": {"q": Q, "k": Q, "q_ids": IDS},
    "backend: expected one of 'auto', 'triton', 'blocked', 'reference', got 'cuda'": {"q": Q, "backend": "cuda"},
    "backend: 'triton' cannot run streaming_logsumexp.*no kernel for torch.float64": {
        "q": Q.double(),
        "backend": "triton",
    },
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument_what_was_expected_and_what_came(message):
    with pytest.raises(ValueError, match=message):
        streaming_logsumexp(**({"scale": 1.0} | BAD[message]))


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_autocast_does_not_reach_into_the_operator(scale):
    """Sums weighted by the key bias are matrix-vector products, which autocast would round."""
    q, bias = torch.randn(30, 16, dtype=torch.float64), torch.randn(30, dtype=torch.float64)
    q, results = torch.nn.functional.normalize(q, dim=1).bfloat16(), []
    for enabled in (False, True):
        x, b = q.clone().requires_grad_(), bias.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = streaming_logsumexp(x, scale=scale, key_bias=b, backend="blocked")
            results.append((out, *torch.autograd.grad(out.sum(), (x, b))))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_compiled_gradients_of_column_major_rows():
    """The compiler is promised row-major gradients, whatever the strides that come in."""
    ids = torch.randint(0, 3, (40,))

    def f(x):
        return streaming_logsumexp(x.T, scale=1.0, q_ids=ids, backend="blocked").sum()

    grads = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        x = torch.randn(8, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
        g(x).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_a_row_whose_keys_are_all_removed_by_the_bias_has_no_gradient(backend):
    q, k = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4)
    bias = torch.full((2,), -torch.inf, requires_grad=True)
    out = streaming_logsumexp(q, k, scale=1.0, key_bias=bias, backend=backend)
    assert (out == -torch.inf).all()
    out.masked_fill(out == -torch.inf, 0.0).sum().backward()
    assert torch.equal(q.grad, torch.zeros_like(q)) and torch.equal(bias.grad, torch.zeros_like(bias))


@pytest.mark.parametrize("m", [None, 21])
@pytest.mark.parametrize("relation", RELATIONS, ids=str)
@pytest.mark.parametrize("scale", [10.0, 200.0])
def test_keys_removed_by_the_bias(m, relation, scale):
    assert_agrees(Case(m=m, bias=True, removed=True, scale=scale, **relation), "blocked")

"""InfoNCELoss against its definition, pytorch-metric-learning's NT-Xent and cross-entropy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ccl_fast import InfoNCELoss
from ccl_fast.ops.logsumexp import blocked
from tests.oracles.losses import assert_matches, batch, call, differentiate, infonce, largest, learnable

# The uses of forward: which tensors it gets, and whether both towers are anchors.
USES = {
    "views": ("v", True),
    "views and negatives": ("vn", True),
    "two towers": ("qk", True),
    "two towers and negatives": ("qkn", True),
    "one direction": ("qk", False),
    "one direction and negatives": ("qkn", False),
}
every_use = pytest.mark.parametrize("use", USES)

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(use, n=7, m=5, d=6, seed=0):
    """The tensors of a use, by the names of forward's arguments, and the option `symmetric`."""
    roles, symmetric = USES[use]
    views, _, _ = batch(n, 2, d, 1, seed)
    arguments = {"queries": views} if "v" in roles else {"queries": views[:, 0], "keys": views[:, 1]}
    if "n" in roles:
        arguments["negatives"] = batch(m, 0, d, 1, seed + 1)[0]
    return arguments, symmetric


def gradients(loss_fn, arguments, wrt=None):
    """[loss, gradient of each argument (or of those in `wrt`), gradient of log_temperature]."""
    wrt = arguments if wrt is None else wrt
    arguments = {name: x.detach().requires_grad_(name in wrt) for name, x in arguments.items()}
    return differentiate(loss_fn(**arguments), [*(arguments[name] for name in wrt), *loss_fn.parameters()])


def check(arguments, *, backend, temperature=0.1, wrt=None, **options):
    wrt = arguments if wrt is None else wrt
    actual = gradients(learnable(InfoNCELoss, temperature, backend=backend, **options), arguments, wrt)
    leaves = {name: x.detach().requires_grad_(name in wrt) for name, x in arguments.items()}
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = infonce(**leaves, temperature=log_temperature.exp(), **options)
    wanted = [*(leaves[name] for name in wrt), log_temperature]
    assert_matches(actual, differentiate(expected, wanted, unused=True))


@every_use
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_every_use_and_reduction(use, reduction, backend):
    arguments, symmetric = tensors(use)
    check(arguments, symmetric=symmetric, reduction=reduction, backend=backend)


@every_use
@pytest.mark.parametrize("temperature, normalize", ((0.005, True), (0.07, True), (1.0, True), (0.5, False)))
def test_temperature_and_normalize(use, temperature, normalize, backend):
    arguments, symmetric = tensors(use)
    check(arguments, symmetric=symmetric, temperature=temperature, normalize=normalize, backend=backend)


@every_use
def test_hypothesis_shapes(use, backend):
    @settings(deadline=None, derandomize=True, max_examples=10, database=None)
    @given(
        n=st.integers(1, 7),
        m=st.integers(0, 9),
        d=st.integers(1, 6),
        block=st.sampled_from((1, 3, 8)),
        temperature=st.sampled_from((0.005, 0.1, 1.0)),
        reduction=st.sampled_from(("mean", "sum", "none")),
        seed=st.integers(0, 1000),
    )
    def matches(n, m, d, block, temperature, reduction, seed):
        arguments, symmetric = tensors(use, n, m, d, seed)
        options = {"symmetric": symmetric, "temperature": temperature, "reduction": reduction}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocked, "BLOCK", block)
            check(arguments, backend=backend, **options)

    matches()


@every_use
def test_blocked_over_several_tiles(use, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 8)
    arguments, symmetric = tensors(use, n=19, m=21)
    check(arguments, symmetric=symmetric, backend="blocked")


@every_use
def test_gradcheck(use, backend):
    arguments, symmetric = tensors(use, n=4, m=3, d=3)
    loss_fn = InfoNCELoss(temperature=0.4, symmetric=symmetric, backend=backend)
    inputs = [x.detach().requires_grad_() for x in arguments.values()]

    def loss(*inputs):
        return loss_fn(**dict(zip(arguments, inputs, strict=True)))

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("use", ("views", "two towers", "one direction"))
def test_empty_negatives_change_nothing(use, backend):
    arguments, symmetric = tensors(use)
    loss_fn = InfoNCELoss(symmetric=symmetric, backend=backend)
    assert torch.allclose(loss_fn(**arguments, negatives=torch.zeros(0, 6).double()), loss_fn(**arguments), rtol=1e-12)


@every_use
def test_a_queue_and_keys_without_gradient(use, backend):
    # MoCo: only the queries learn.
    arguments, symmetric = tensors(use)
    check(arguments, symmetric=symmetric, backend=backend, wrt=["queries"])


@pytest.mark.parametrize("use", ("views and negatives", "two towers and negatives", "one direction and negatives"))
def test_only_the_negatives_need_a_gradient(use, backend):
    arguments, symmetric = tensors(use)
    check(arguments, symmetric=symmetric, backend=backend, wrt=["negatives"])


@every_use
def test_empty_batch_is_zero_with_a_graph(use, backend):
    arguments, symmetric = tensors(use, n=0)
    arguments = {name: x.detach().requires_grad_() for name, x in arguments.items()}
    for reduction in ("mean", "sum", "none"):
        loss_fn = learnable(InfoNCELoss, symmetric=symmetric, reduction=reduction, backend=backend)
        loss = loss_fn(**arguments)
        loss.sum().backward()
        assert (loss == 0).all()
        assert all(x.grad is not None and (x.grad == 0).all() for x in (*arguments.values(), *loss_fn.parameters()))


@pytest.mark.parametrize("use", ("views", "two towers", "one direction"))
def test_one_pair_has_nothing_to_contrast(use, backend):
    arguments, symmetric = tensors(use, n=1)
    results = gradients(learnable(InfoNCELoss, symmetric=symmetric, backend=backend), arguments)
    assert all(largest(x) < 1e-12 for x in results)


@pytest.mark.parametrize(
    "use, shape", (("views", (7, 2)), ("two towers", (7, 2)), ("one direction", (7,)), ("views and negatives", (7, 2)))
)
def test_reduction_none_has_a_loss_per_anchor_and_sums_to_sum(use, shape):
    arguments, symmetric = tensors(use)
    rows = InfoNCELoss(symmetric=symmetric, reduction="none")(**arguments)
    assert rows.shape == shape
    total = InfoNCELoss(symmetric=symmetric, reduction="sum")(**arguments)
    assert torch.isclose(rows.sum(), total, rtol=1e-12)
    assert torch.isclose(rows.mean(), InfoNCELoss(symmetric=symmetric)(**arguments), rtol=1e-12)


@every_use
def test_permuting_pairs_permutes_gradients(use, backend):
    arguments, symmetric = tensors(use)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    shuffled = {name: x if name == "negatives" else x[order] for name, x in arguments.items()}
    loss_fn = learnable(InfoNCELoss, symmetric=symmetric, backend=backend)
    loss, gradient, slope = gradients(loss_fn, arguments, ["queries"])
    assert_matches(gradients(loss_fn, shuffled, ["queries"]), [loss, gradient[order], slope], 1e-13)


def test_both_directions_are_the_mean_of_each(backend):
    arguments, _ = tensors("two towers and negatives")
    q, k, negatives = arguments.values()
    one_way = InfoNCELoss(symmetric=False, backend=backend)
    both = call(InfoNCELoss(backend=backend), q, k, negatives)
    there, back = (one_way(*pair, negatives=negatives) for pair in ((q, k), (k, q)))
    assert torch.isclose(both, (there + back) / 2, rtol=1e-12)


def test_one_direction_is_cross_entropy(backend):
    # MoCo's and CLIP's own code; only the keys of the other tower are candidates.
    arguments, _ = tensors("one direction and negatives")
    q, k, negatives = (F.normalize(x, dim=1) for x in arguments.values())
    expected = F.cross_entropy(q @ torch.cat([k, negatives]).T / 0.1, torch.arange(7))
    assert torch.isclose(InfoNCELoss(symmetric=False, backend=backend)(**arguments), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", (0.07, 0.3, 1.0))
def test_views_equal_pytorch_metric_learnings_nt_xent(temperature, backend):
    z = batch(24, 2, 16, 1)[0].float().requires_grad_()
    actual = differentiate(call(InfoNCELoss(temperature=temperature, backend=backend), z), [z])
    peer = pytest.importorskip("pytorch_metric_learning.losses").NTXentLoss(temperature=temperature)
    expected = differentiate(peer(z.transpose(0, 1).flatten(0, 1), torch.arange(24).repeat(2)), [z])
    assert_matches(actual, expected, 2e-5)


@pytest.mark.parametrize("temperature", (0.07, 1.0))
def test_one_direction_equals_pytorch_metric_learnings_nt_xent(temperature, backend):
    z = batch(24, 2, 16, 1)[0].float().requires_grad_()
    labels = torch.arange(24)  # the peer leaves the diagonal out if both labels are one object
    actual = call(InfoNCELoss(temperature=temperature, symmetric=False, backend=backend), z[:, 0], z[:, 1])
    expected = pytest.importorskip("pytorch_metric_learning.losses").NTXentLoss(temperature=temperature)(
        z[:, 0], labels, ref_emb=z[:, 1], ref_labels=labels.clone()
    )
    assert_matches(differentiate(actual, [z]), differentiate(expected, [z]), 2e-5)


def test_noncontiguous_towers(backend):
    views = batch(7, 2, 6, 1)[0].transpose(1, 2).contiguous().transpose(1, 2)
    q, k = views[:, 0], views[:, 1]
    assert not (q.is_contiguous() or k.is_contiguous())
    check({"queries": q, "keys": k}, backend=backend)
    check({"queries": views}, backend=backend)


def test_the_same_tensor_as_both_towers(backend):
    z = batch(7, 0, 6, 1)[0].requires_grad_()
    actual = differentiate(call(InfoNCELoss(backend=backend), z, z), [z])
    assert_matches(actual, differentiate(infonce(z, z), [z]))


Q, K, N = torch.ones(4, 3), torch.ones(4, 3), torch.ones(2, 3)
ERRORS = {
    "queries type": (([1.0],), "queries: .*list"),
    "queries 2-D without keys": ((Q,), r"queries: .*\[n, 2, d\].*\[4, 3\]"),
    "three views": ((torch.ones(4, 3, 3),), r"queries: .*\[n, 2, d\].*\[4, 3, 3\]"),
    "queries 3-D with keys": ((torch.ones(4, 2, 3), K), r"queries: .*\[4, 2, 3\]"),
    "queries dtype": ((Q.long(), K.long()), "queries: .*float32.*int64"),
    "keys type": ((Q, [1.0]), "keys: .*Tensor.*list"),
    "number of keys": ((Q, K[:3]), r"keys: .*\[4, 3\].*\[3, 3\]"),
    "keys width": ((Q, K[:, :2]), r"keys: .*3\].*\[4, 2\]"),
    "keys dtype": ((Q, K.double()), "keys: .*float32.*float64"),
    "keys device": ((Q, K.to("meta")), "keys: .*cpu.*meta"),
    "negatives type": ((Q, K, [1.0]), "negatives: .*Tensor.*list"),
    "negatives shape": ((Q, K, N[0]), r"negatives: .*3\].*\[3\]"),
    "negatives width": ((Q, K, N[:, :2]), r"negatives: .*3\].*\[2, 2\]"),
    "negatives dtype": ((Q, K, N.half()), "negatives: .*float32.*float16"),
    "negatives device": ((Q, K, N.to("meta")), "negatives: .*cpu.*meta"),
}


@pytest.mark.parametrize("arguments, message", ERRORS.values(), ids=ERRORS)
def test_error_names_the_argument_what_was_expected_and_what_came(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(InfoNCELoss(), *arguments)

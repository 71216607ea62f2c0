"""SepCLRLoss against its definition over all pairs, and its edge cases."""

import math

import pytest
import torch

from ccl_fast.losses import SepCLRLoss
from ccl_fast.metrics import uniformity
from tests.oracles.losses import assert_matches, batch, call, differentiate, learnable, unit

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
TARGET = torch.tensor([True, False, True, True, False, False, True, False, True])
WEIGHTS = ("salient_weight", "background_weight", "independence_weight")
ALONE = dict.fromkeys(WEIGHTS, 0.0)


def features(n=9, d=6, e=4, dtype=torch.float64, seed=0):
    return batch(n, 2, d, 1, seed, dtype)[0], batch(n, 2, e, 1, seed + 10, dtype)[0]


def potential(x, tau):
    """exp(-|x_i - x_j|^2 / 2 tau), all pairs."""
    return ((x[:, None] - x[None]).square().sum(-1) / (-2 * tau)).exp()


def sepclr(
    common, salient, is_target, *, temperature=0.5, salient_weight=1000.0, background_weight=1000.0,
    independence_weight=10.0, normalize=True,
):  # fmt: skip
    tau = temperature
    c = unit(common.double()) if normalize else common.double()
    s = salient.double()
    target = is_target.nonzero().flatten().tolist()
    background = [i for i in range(len(c)) if i not in target]
    teacher = torch.stack([s[i] if i in target else 0.0 * s[i] for i in range(len(c))]) if len(c) else s
    zero = 0.0 * (common.double().sum() + salient.double().sum())

    def align(x, rows):
        return sum(((x[i, 0] - x[i, 1]).square().sum() for i in rows), zero) / (2 * tau) / max(len(rows), 1)

    def uniform(x):
        pairs = ~torch.eye(len(x), dtype=torch.bool)
        return sum(potential(x[:, v], tau)[pairs].mean().log() for v in (0, 1)) if len(x) > 1 else zero

    common_term = align(c, range(len(c))) + uniform(c)
    salient_term = align(s, target) + uniform(teacher)
    point = sum((s[i].square().sum() / 2 for i in background), zero) / (2 * tau) / max(len(background), 1)
    joint = zero
    for v in (0, 1) if len(c) else ():
        joint = joint + (potential(c[:, v], tau) * potential(teacher[:, v], tau)).mean(1).log().mean() / 2
    return common_term + salient_weight * salient_term + background_weight * point + independence_weight * joint


def check(common, salient, is_target=TARGET, *, backend="auto", temperature=0.5, tolerance=1e-10, **options):
    leaves = [x.detach().requires_grad_() for x in (common, salient)]
    module = learnable(SepCLRLoss, temperature, backend=backend, **options)
    value = call(module, *leaves, is_target)
    assert value.dtype == torch.promote_types(common.dtype, torch.float32)
    actual = differentiate(value, [*leaves, *module.parameters()])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = sepclr(*exact, is_target, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature], unused=True), tolerance)


def test_the_definition(backend):
    check(*features(), backend=backend)


@pytest.mark.parametrize("term", (None, *WEIGHTS))
def test_each_term(term, backend):
    options = ALONE if term is None else ALONE | {term: 2.5}
    common, salient = (x.requires_grad_() for x in features())
    actual = differentiate(
        call(SepCLRLoss(**options, backend=backend), common, salient, TARGET), [common, salient], True
    )
    expected = differentiate(sepclr(common, salient, TARGET, **options), [common, salient], True)
    assert_matches(actual, expected)


@pytest.mark.parametrize("temperature, normalize", ((0.02, True), (5.0, True), (0.5, False)))
def test_options(temperature, normalize, backend):
    options = {"salient_weight": 1.0, "background_weight": 10.0}  # CheXpert's
    check(*features(), temperature=temperature, normalize=normalize, backend=backend, **options)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    check(*features(33, dtype=dtype), torch.rand(33, generator=generator) < 0.6, tolerance=tolerance)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    leaves = [x.requires_grad_() for x in features(dtype=torch.float32)]
    with torch.autocast("cpu", dtype=dtype):
        loss = call(SepCLRLoss(), *leaves, TARGET)
    assert loss.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in leaves]
    assert_matches(differentiate(loss, leaves), differentiate(sepclr(*exact, TARGET), exact), 0.02)


@pytest.mark.parametrize("n", (2, 9))
@pytest.mark.parametrize("is_target", (True, False))
def test_one_set_alone(n, is_target, backend):
    check(*features(n), torch.full((n,), is_target), backend=backend)


@pytest.mark.parametrize("is_target", (True, False))
def test_a_single_sample_has_no_pair(is_target, backend):
    check(*features(1), torch.tensor([is_target]), backend=backend)


def test_uniformity_of_the_common_features_is_wang_and_isolas():
    common, salient = features()
    same = common[:, :1].expand(-1, 2, -1)  # nothing to align
    loss = call(SepCLRLoss(**ALONE), same, salient, TARGET)
    torch.testing.assert_close(loss, 2 * uniformity(common[:, 0], t=1.0))


def test_background_features_move_to_the_point_alone():
    common, salient = features()
    salient.requires_grad_()
    call(SepCLRLoss(background_weight=0.0), common, salient, TARGET).backward()
    assert (salient.grad[~TARGET] == 0).all() and (salient.grad[TARGET] != 0).all()
    salient.grad = None
    call(SepCLRLoss(**ALONE | {"background_weight": 1.0}), common, salient, TARGET).backward()
    assert (salient.grad[TARGET] == 0).all()
    torch.testing.assert_close(salient.grad[~TARGET], salient.detach()[~TARGET] / (2 * 0.5) / 4)


def test_target_features_are_driven_from_the_point_and_the_kernel_forgets_what_is_far():
    common = batch(2, 2, 3, 1)[0]
    salient = torch.full((2, 2, 1), 0.1, dtype=torch.float64, requires_grad=True)
    call(
        SepCLRLoss(background_weight=0.0, independence_weight=0.0), common, salient, torch.tensor([True, False])
    ).backward()
    assert (salient.grad[0] < 0).all()  # further along its direction
    far = torch.full((2, 2, 1), 1e4, dtype=torch.float64, requires_grad=True)
    loss = call(SepCLRLoss(salient_weight=0.0, background_weight=0.0), common, far, torch.tensor([True, False]))
    loss.backward()
    assert loss.isfinite() and (far.grad == 0).all()


def test_features_that_repeat_each_other_are_dearer_than_independent_ones():
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    targets = torch.ones(16, dtype=torch.bool)

    def joint(common, salient):
        views = [x[:, None, None].expand(-1, 2, 1) for x in (common, salient)]
        parts = [
            call(SepCLRLoss(**ALONE | {"independence_weight": w}, normalize=False), *views, targets) for w in (0.0, 1.0)
        ]
        return parts[1] - parts[0]

    assert joint(grid[:, 0], grid[:, 1]) < joint(grid[:, 0], grid[:, 0]) - 0.5


def test_the_order_of_samples_and_of_views_is_of_no_effect():
    common, salient = features()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    loss = call(SepCLRLoss(), common, salient, TARGET)
    torch.testing.assert_close(call(SepCLRLoss(), common[order], salient[order], TARGET[order]), loss)
    torch.testing.assert_close(call(SepCLRLoss(), common.flip(1), salient.flip(1), TARGET), loss)
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (common, salient))
    torch.testing.assert_close(call(SepCLRLoss(), *strided, TARGET), loss)


def test_empty_batch_is_zero_with_a_graph():
    common, salient = (torch.zeros(0, 2, 4, requires_grad=True) for _ in range(2))
    loss = call(SepCLRLoss(), common, salient, torch.zeros(0, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and common.grad is not None and salient.grad is not None


def test_errors():
    common, salient = features()
    for name in WEIGHTS:
        for value in (-1.0, math.inf, True, "1"):
            with pytest.raises(ValueError, match=f"{name}: expected a number >= 0, got"):
                SepCLRLoss(**{name: value})
    for arguments, message in (
        ((common[:, 0], salient, TARGET), r"embeddings: expected shape \[n, 2, d\], got \[9, 6\]"),
        ((common, salient[:, :1], TARGET), r"salient: expected shape \[n, 2, d\], got \[9, 1, 4\]"),
        ((common, salient[:4], TARGET), r"salient: expected 9 samples \(those of embeddings\), got 4"),
        ((common, salient.float(), TARGET), "salient: expected dtype torch.float64"),
        ((common, salient, TARGET[:4]), r"is_target: expected shape \[9\], got \[4\]"),
        ((common, salient, TARGET.int()), "is_target: expected bool, got torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            call(SepCLRLoss(), *arguments)

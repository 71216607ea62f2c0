"""What every loss promises whatever its formula: dtypes, errors, NaN, graphs, compilation, state."""

import copy
import functools
import inspect
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ccl_fast import CCLLoss, InfoNCELoss, SupConLoss
from ccl_fast.losses import (
    AdaMEOWLoss,
    BECLRLoss,
    CenterNegativesLoss,
    CMIMLoss,
    ConRLoss,
    CSGCLLoss,
    DeepClusterV2Loss,
    FeatureTransformationLoss,
    GatedPairLoss,
    HardContrastiveLoss,
    InterCLRLoss,
    LightGCLLoss,
    ListContrastLoss,
    MaxSimLoss,
    MCLLoss,
    MEOWLoss,
    MLCDLoss,
    MLCLoss,
    MoCHiLoss,
    PamCLoss,
    ProtoGCDLoss,
    ProtoNCELoss,
    SBCLLoss,
    SCGCLoss,
    SepCLRLoss,
    SlotConLoss,
    SwAVLoss,
    WhitenedCSELoss,
)
from ccl_fast.ops import contrast_tile
from ccl_fast.ops.logsumexp import blocked
from tests.losses.test_adameow import adameow
from tests.losses.test_cluster_negatives import center_negatives, definition
from tests.losses.test_cmim import cmim
from tests.losses.test_conr import PREDICTIONS, TARGETS
from tests.losses.test_csgcl import STRENGTH, csgcl
from tests.losses.test_feature_transformation import seeded, transformed
from tests.losses.test_gated_pair import GATES, PARTNERS
from tests.losses.test_lightgcl import lightgcl
from tests.losses.test_list_contrast import NEGATIVES, POSITIVES
from tests.losses.test_pamc import pamc
from tests.losses.test_prototypes import deepcluster, protonce
from tests.losses.test_sbcl import sbcl
from tests.losses.test_scgc import graph, scgc
from tests.losses.test_sepclr import WEIGHTS as SEPARATION
from tests.losses.test_sepclr import sepclr
from tests.losses.test_swav import swav
from tests.losses.test_whitenedcse import permutations, whitenedcse
from tests.oracles.lists import list_contrast
from tests.oracles.losses import (
    assert_matches,
    batch,
    call,
    ccl,
    differentiate,
    evaluate,
    evaluate_oracle,
    infonce,
    learnable,
    supcon,
)
from tests.oracles.matrices import beclr, hard_contrastive, interclr, maxsim, mlc, mlcd, mochi, protogcd, slotcon
from tests.oracles.terms import conr, gated_pairs
from tests.tolerance import assert_as_accurate

pytestmark = pytest.mark.usefixtures("one_thread")
LOSSES = (CCLLoss, SupConLoss, InfoNCELoss)
IDS = torch.tensor([0, 2, -1, 0, 1, 2, 0, -1, 2])
ASSIGNED = IDS.clamp(min=0)
CENTERS = batch(1, 0, 6, 3, seed=5)[2]
QUEUE = batch(1, 0, 6, 7, seed=6)[2]
BANK, BANK_LABELS, _ = batch(30, 0, 6, 4, seed=7)
SHUFFLES = permutations(2, 6)
WEIGHTS = torch.tensor([[0.2, 1.0, 0.0], [0.7, 0.0, 3.0], [1.0, 0.4, 0.1]])
CONCENTRATIONS = torch.tensor([0.05, 0.3, 0.12])


class Use:
    """A loss as a function of views [9, 2, d] alone, and its oracle."""

    fullgraph: bool  # it compiles into one graph (with no sparse tensor or generator as an argument)

    def __init__(self, loss, oracle, arguments, fullgraph=True, **options):
        self.loss, self.oracle, self.arguments, self.options = loss, oracle, arguments, options
        self.fullgraph = fullgraph

    def module(self, **options):
        return Bound(self.loss(**self.options, **self.supported(options)), self.arguments)

    def learnable(self, **options):
        return Bound(learnable(self.loss, **self.options, **self.supported(options)), self.arguments)

    def supported(self, options):
        """Without a backend where there is no choice of one."""
        loss = getattr(self.loss, "func", self.loss)
        return {name: value for name, value in options.items() if name not in loss.unsupported}

    def in_one_tile(self):
        """The same, as "auto" has it of a small batch in the place of "blocked"."""
        return InOneTile(self.loss, self.oracle, self.arguments, self.fullgraph, **self.options)

    def exact(self, z, **options):
        def oracle(z, **options):
            return self.oracle(*self.arguments(z), **options)

        return evaluate_oracle(oracle, z, **self.options, **options)


class InOneTile(Use):
    def supported(self, options):
        return super().supported(options | ({"backend": "auto"} if options.get("backend") == "blocked" else {}))


class MoCHi(MoCHiLoss):
    """With what is drawn for 9 anchors."""

    mixing = MoCHiLoss(num_hardest=3, num_synthetic=4, num_with_query=2).draw(
        9, 3, torch.empty(0).double(), torch.Generator().manual_seed(0)
    )

    def draw(self, n, hardest, like, generator):
        return type(self.mixing)(*(x.to(like if x.is_floating_point() else like.device) for x in self.mixing))


class InterCLR(InterCLRLoss):
    """With what is drawn for 9 anchors from a bank of 30."""

    drawn = InterCLRLoss(num_negatives=6, pool=0.4).draw(9, 30, torch.empty(0), torch.Generator().manual_seed(0))

    def draw(self, n, size, like, generator):
        return self.drawn


class Bound(nn.Module):
    def __init__(self, loss_fn, arguments):
        super().__init__()
        self.loss_fn, self.arguments = loss_fn, arguments
        self.names = list(inspect.signature(loss_fn.forward).parameters)

    def forward(self, z):
        return self.loss_fn(**dict(zip(self.names, self.arguments(z), strict=False)))


def with_centers(z):
    return z, IDS[: len(z)], CENTERS.to(z.dtype)


def rows_with_centers(z):
    return z[:, 0], IDS[: len(z)], CENTERS.to(z.dtype)


def with_prototypes(z):
    return z, CENTERS.to(z.dtype)


def queued(z):
    return z[:, 0], z[:, 1], QUEUE.to(z.dtype)


def banked(z):
    return *queued(z), BANK.to(z.dtype), BANK_LABELS, torch.arange(len(z)) * 3


def dense(arguments):
    return [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor) and not x.is_sparse]


def clusterings(ids, z):
    return [ids[: len(z)]], [CENTERS.to(z.dtype)]


USES = {
    "ccl joint": Use(CCLLoss, ccl, with_centers, form="joint"),
    "ccl split": Use(CCLLoss, ccl, rows_with_centers, form="split"),
    "ccl inside": Use(CCLLoss, ccl, with_centers, form="inside"),
    "ccl with concentrations": Use(CCLLoss, ccl, lambda z: (*with_centers(z), CONCENTRATIONS), center_weight=2),
    "ccl with an instance weight": Use(CCLLoss, ccl, with_centers, instance_weight=0.4),
    "ccl without centres": Use(CCLLoss, ccl, lambda z: (z, IDS[: len(z)])),
    "supcon outside": Use(SupConLoss, supcon, lambda z: (z[:, 0], IDS[: len(z)])),
    "supcon inside": Use(SupConLoss, supcon, lambda z: (z, IDS[: len(z)]), form="inside"),
    "supcon without labels": Use(SupConLoss, supcon, lambda z: (z,)),
    "infonce views": Use(InfoNCELoss, infonce, lambda z: (z,)),
    "infonce towers": Use(InfoNCELoss, infonce, lambda z: (z[:, 0], z[:, 1])),
    "swav": Use(SwAVLoss, lambda z, *rest, **options: swav(z.unbind(1), *rest, **options), with_prototypes),
    "beclr": Use(
        functools.partial(BECLRLoss, temperature=0.1), beclr, lambda z: (z, z.flip(0).tanh(), z.flip(1).cos())
    ),
    "maxsim": Use(
        functools.partial(MaxSimLoss, temperature=0.1),
        maxsim,
        lambda z: (z[:, 0], z[:, 1], torch.arange(len(z)) // 3, torch.arange(len(z)).flip(0) // 3, 3),
    ),
    "protogcd": Use(
        ProtoGCDLoss, protogcd, lambda z: (z, CENTERS.to(z.dtype), IDS[: len(z)]), hard_share=0.5, entropy_weight=0.5
    ),
    "slotcon": Use(
        SlotConLoss,
        slotcon,
        lambda z: (z[:, 0].unflatten(0, (3, -1)), z[:, 1].unflatten(0, (3, -1)), CENTERS.to(z.dtype)),
    ),
    "protonce": Use(ProtoNCELoss, protonce, lambda z: (z, *clusterings(IDS, z), [CONCENTRATIONS])),
    "deepcluster": Use(DeepClusterV2Loss, deepcluster, lambda z: (z, *clusterings(ASSIGNED, z))),
    "pamc": Use(PamCLoss, pamc, lambda z: (z[:, 0], z[:, 1], IDS[: len(z)])),
    "pamc of a graph": Use(
        PamCLoss, pamc, lambda z: (z[:, 0], None, IDS[: len(z)], graph(len(z)).to_sparse()), fullgraph=False
    ),
    "pamc of nodes": Use(PamCLoss, pamc, lambda z: (z[:, 0], z[:, 1], IDS[: len(z)]), form="node"),
    "mcl": Use(MCLLoss, functools.partial(definition, MCLLoss), lambda z: (z, [IDS[: len(z)]])),
    "meow": Use(MEOWLoss, functools.partial(definition, MEOWLoss), lambda z: (z, IDS[: len(z)])),
    "center negatives": Use(CenterNegativesLoss, center_negatives, with_centers),
    "sbcl": Use(SBCLLoss, sbcl, lambda z: (z, IDS[: len(z)], ASSIGNED.flip(0)[: len(z)])),
    "hard contrastive": Use(
        functools.partial(HardContrastiveLoss, temperature=0.1), hard_contrastive, lambda z: (z,), alpha=0.4
    ),
    "mlcd": Use(
        functools.partial(MLCDLoss, temperature=0.1),
        lambda *arguments, sample, **options: mlcd(*arguments, **options),
        lambda z: (z[:, 0], torch.stack((ASSIGNED, (ASSIGNED + 1) % 3), dim=1)[: len(z)], CENTERS.to(z.dtype)),
        sample=1,
    ),
    "mlc": Use(
        MLCLoss,
        lambda z, heads, *, reduction="mean", **options: mlc(z, heads, **options),
        lambda z: (z, z.flip(1)[..., :3].tanh()),
    ),
    "mochi": Use(
        functools.partial(MoCHi, temperature=0.1),
        lambda *arguments, num_synthetic, num_with_query, **options: mochi(*arguments, MoCHi.mixing, **options),
        queued,
        num_hardest=3,
        num_synthetic=4,
        num_with_query=2,
    ),
    "interclr": Use(
        functools.partial(InterCLR, temperature=0.1),
        lambda *arguments, **options: interclr(*arguments, *InterCLR.drawn, **options),
        banked,
        pool=0.4,
    ),
    "scgc": Use(
        functools.partial(SCGCLoss, temperature=0.1),
        scgc,
        lambda z: (z[:, 0], graph(len(z)).to_sparse()),
        fullgraph=False,
    ),
    "feature transformation": Use(
        functools.partial(FeatureTransformationLoss, temperature=0.1),
        transformed,
        lambda z: (z[:5, 0], z[:5, 1], z[5:, 0], seeded()),
        fullgraph=False,
    ),
    "lightgcl": Use(
        functools.partial(LightGCLLoss, temperature=0.1),
        lightgcl,
        lambda z: (z[:, 0], z[:, 1], torch.arange(len(z)).flip(0)),
    ),
    "cmim": Use(CMIMLoss, cmim, lambda z: (z[:, 0],)),
    "cmim views": Use(CMIMLoss, cmim, lambda z: (z,)),
    "conr": Use(
        functools.partial(ConRLoss, temperature=0.1),
        conr,
        lambda z: (z[:, 0], TARGETS[: len(z)], PREDICTIONS[: len(z)]),
        fullgraph=False,
    ),
    "gated pairs": Use(
        GatedPairLoss,
        lambda *arguments, normalize=True, **options: gated_pairs(*arguments, **options),
        lambda z: (z[:, 0], IDS[: len(z)], PARTNERS[: len(z)], GATES[: len(z)]),
        fullgraph=False,
    ),
    "list contrast": Use(
        ListContrastLoss, list_contrast, lambda z: (z[:, 0], POSITIVES[: len(z)], NEGATIVES[: len(z)])
    ),
    "csgcl": Use(
        functools.partial(CSGCLLoss, temperature=0.1), csgcl, lambda z: (z[:, 0], z[:, 1], STRENGTH[: len(z)])
    ),
    "adameow": Use(AdaMEOWLoss, adameow, lambda z: (z, IDS[: len(z)], WEIGHTS)),
    "sepclr": Use(
        functools.partial(SepCLRLoss, temperature=0.1, **dict.fromkeys(SEPARATION, 1.0)),
        functools.partial(sepclr, **dict.fromkeys(SEPARATION, 1.0)),
        lambda z: (z, z.flip(0).tanh(), IDS[: len(z)] > 0),
    ),
    "whitenedcse": Use(
        functools.partial(WhitenedCSELoss, groups=2, temperature=0.1),
        functools.partial(whitenedcse, groups=2),
        lambda z: (z, SHUFFLES),
    ),
    "infonce queue": Use(InfoNCELoss, infonce, lambda z: (z[:5, 0], z[:5, 1], z[5:, 0]), symmetric=False),
}
TILED = ("ccl joint", "ccl inside", "ccl with concentrations", "supcon outside", "infonce views", "infonce towers")
USES |= {f"{name}, a tile": USES[name].in_one_tile() for name in TILED}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES)
# Compiled in the fast half: the commonest, and some that are made in other ways.
COMPILED_FIRST = {"ccl joint", "ccl inside", "infonce views", "infonce queue", "swav", "hard contrastive", "mochi"}
every_loss = pytest.mark.parametrize("loss", LOSSES)
HALVES = (torch.float16, torch.bfloat16)


def views(dtype=torch.float64, seed=0):
    return batch(9, 2, 6, 1, seed, dtype)[0]


# ---- dtypes ----


@every_use
def test_float64_in_float64_out(use, backend):
    results = evaluate(use.learnable(backend=backend), views())
    assert all(x.dtype == torch.float64 for x in results)
    assert_matches(results, use.exact(views()))


@every_use
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
@pytest.mark.parametrize("temperature", (0.005, 0.1, 1.0))
def test_as_accurate_as_the_reference_in_the_same_dtype(use, dtype, temperature):
    for seed in range(2):
        z = views(dtype, seed)
        options = {"temperature": temperature, "learnable_temperature": True}
        plain = evaluate(use.module(backend="reference", **options), z)
        actual = evaluate(use.module(backend="blocked", **options), z)
        assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
        for a, e, p in zip(actual, use.exact(z, temperature=temperature), plain, strict=True):
            # Logits are at most 1 / T, and a softmax of them cannot be better than they are rounded.
            magnitude = max(e.norm().item(), 1.0) * max(1, 0.02 / temperature)
            assert_as_accurate(a, e, p, dtype, magnitude=magnitude)


@every_use
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("temperature", (0.01, 0.1))
@pytest.mark.parametrize("backward_inside", (False, True))
def test_autocast_gives_a_float32_loss_and_near_gradients(use, dtype, temperature, backward_inside, backend):
    z = views(torch.float32).requires_grad_()
    module = use.module(temperature=temperature, learnable_temperature=True, backend=backend)
    with torch.autocast("cpu", dtype=dtype):
        loss = module(z)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert loss.dtype == torch.float32 and z.grad.dtype == torch.float32
    # Unit vectors rounded to eps: a logit is off by eps / T, a weight of the softmax by that share.
    tolerance = 2 * torch.finfo(dtype).eps * (1 + 0.1 / temperature)
    actual = [loss.detach(), z.grad, module.loss_fn.log_temperature.grad]
    assert_matches(actual, use.exact(z, temperature=temperature), tolerance)


@pytest.mark.parametrize("form", ("joint", "split", "inside"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.float64))
@pytest.mark.parametrize("shape", ((), (3,)))
def test_center_temperature_of_another_dtype_keeps_the_dtype_of_the_loss(form, dtype, shape, backend):
    temperature = torch.full(shape, 0.25, dtype=dtype)  # a number that every dtype has
    loss_fn = learnable(CCLLoss, form=form, backend=backend)
    for z in (views(), views(torch.float32), views(torch.float16)):
        loss, gradient, _ = evaluate(loss_fn, z, IDS, CENTERS, temperature)
        exact = evaluate_oracle(ccl, z, IDS, CENTERS, 0.25, form=form)
        assert loss.dtype == torch.promote_types(z.dtype, torch.float32) and gradient.dtype == z.dtype
        assert_matches([loss, gradient], exact[:2], 1e-10 if z.dtype == torch.float64 else 1e-2)


@every_use
def test_float16_rows_longer_than_float16_can_say(use, backend):
    z = (6e4 * views().clamp(-1, 1)).half()
    assert z.double().norm(dim=-1).max() > torch.finfo(torch.float16).max
    loss, gradient, _ = use.exact(z)
    assert_matches(evaluate(use.module(backend=backend), z), [loss, gradient], 1e-2)


@every_use
def test_autocast_leaves_float64_alone(use, backend):
    module = use.learnable(backend=backend)
    expected = evaluate(module, views())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_matches(evaluate(module, views()), expected, 1e-12)


@every_use
def test_a_module_serves_one_dtype_after_another(use, backend):
    module = use.module(learnable_temperature=True, backend=backend)
    first = evaluate(module, views())
    for dtype in HALVES:
        assert_matches(evaluate(module, views(dtype)), first, 3e-2)
    assert all(torch.equal(a, b) for a, b in zip(evaluate(module, views()), first, strict=True))


@every_use
@pytest.mark.parametrize("dtype", (torch.float64, *HALVES))
def test_module_cast_to_another_dtype(use, dtype, backend):
    module = use.module(learnable_temperature=True, backend=backend).to(dtype)
    results = evaluate(module, views(dtype))
    assert results[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches(results, use.exact(views()), 1e-6 if dtype == torch.float64 else 3e-2)


# ---- graphs ----


@every_use
def test_no_grad_builds_no_graph(use, backend):
    module = use.module(learnable_temperature=True, backend=backend)
    z = views().requires_grad_()
    expected = module(z)
    with torch.no_grad():
        loss = module(z)
    with torch.inference_mode():
        inferred = module(views())
    assert expected.requires_grad and not loss.requires_grad and loss.grad_fn is None
    assert torch.equal(loss, expected) and torch.equal(inferred, expected)
    assert not use.module(backend=backend)(views()).requires_grad


@every_use
def test_only_the_temperature_needs_a_gradient(use, backend):
    module = use.learnable(backend=backend)
    module(views()).backward()
    expected = use.exact(views())[2]
    assert torch.isclose(module.loss_fn.log_temperature.grad[0], expected, rtol=1e-10)


@every_use
def test_only_the_embeddings_need_a_gradient(use, backend):
    module = use.learnable(backend=backend).requires_grad_(False)
    z = views().requires_grad_()
    assert_matches(differentiate(module(z), [z]), use.exact(z)[:2])
    assert module.loss_fn.log_temperature.grad is None


@every_use
@pytest.mark.parametrize("normalize", (True, False))
def test_double_backward_is_a_clear_error(use, normalize):
    z = views().requires_grad_()
    module = use.learnable(normalize=normalize, backend="blocked")
    # By the temperature these are plain operations of torch's, which have one.
    by_rows_alone = isinstance(module.loss_fn, ListContrastLoss | MaxSimLoss)
    for leaf in (z,) if by_rows_alone else (z, module.loss_fn.log_temperature):
        gradient = torch.autograd.grad(module(z), leaf, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.square().sum().backward()


@every_use
def test_backward_twice_needs_retain_graph_and_repeats_the_gradient(use, backend):
    z = views().requires_grad_()
    loss = use.module(backend=backend)(z)
    loss.backward(retain_graph=True)
    first = z.grad.clone()
    loss.backward()
    assert torch.equal(z.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@every_use
def test_changing_the_embeddings_before_backward_is_an_error_or_harmless(use, backend):
    z = views().requires_grad_()
    module = use.module(normalize=False, backend=backend)
    expected = differentiate(module(z), [z])[1]
    rows = z * 1.0
    loss = module(rows)
    rows.detach().zero_()  # autograd counts writes through a detached alias too
    try:
        loss.backward()
    except RuntimeError as error:
        assert re.search(r"modified (by an inplace operation|inplace)", str(error))
    else:
        assert torch.allclose(z.grad, expected, rtol=1e-12)


@every_use
def test_inputs_are_left_alone_and_results_repeat_bit_for_bit(use, backend):
    for normalize in (True, False):
        z = views()
        arguments = [x.clone() for x in dense(use.arguments(z))]
        state = torch.random.get_rng_state()
        module = use.learnable(normalize=normalize, backend=backend)
        first, second = evaluate(module, z), evaluate(module, z)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(dense(use.arguments(z)), arguments, strict=True))
        assert torch.equal(torch.random.get_rng_state(), state)


@every_use
def test_auto_is_blocked_on_a_cpu(use, monkeypatch):
    monkeypatch.setattr(contrast_tile, "MAX_ELEMENTS", 0)  # as of a batch that is no single tile
    results = zip(evaluate(use.module(), views()), evaluate(use.module(backend="blocked"), views()), strict=True)
    assert all(torch.equal(a, b) for a, b in results)


# ---- not a number ----


@every_use
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16))
@pytest.mark.parametrize("bad, normalize", ((torch.nan, True), (torch.nan, False), (torch.inf, True)))
def test_a_bad_number_in_the_embeddings_gives_nan(use, bad, normalize, dtype, backend):
    for row in (0, 2, 8):  # assigned, unassigned, the last
        z = views(dtype)
        z[row, 0, 1] = bad
        loss, gradient = evaluate(use.module(normalize=normalize, backend=backend), z)
        assert loss.isnan() and gradient.isnan().any()


@pytest.mark.parametrize("form", ("joint", "split", "inside"))
def test_nan_in_the_centers_gives_nan(form, backend):
    centers = CENTERS.clone()
    centers[1, 1] = torch.nan
    assert CCLLoss(form=form, backend=backend)(views(), IDS, centers).isnan()


@every_use
def test_nan_temperature_gives_nan(use, backend):
    module = use.learnable(backend=backend)
    nn.init.constant_(module.loss_fn.log_temperature, torch.nan)
    assert module(views()).isnan()


@pytest.mark.parametrize("form", ("joint", "split", "inside"))
def test_nan_reaches_every_anchor_and_crosses_tiles(form, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 4)
    z = views()
    z[-1, -1, 0] = torch.nan
    rows = CCLLoss(form=form, reduction="none", backend="blocked")(z, IDS)
    assert rows.isnan().all()


# ---- torch.compile ----


def compiled(module, backend="aot_eager", fullgraph=True, **options):
    torch.compiler.reset()
    return torch.compile(module, backend=backend, fullgraph=fullgraph, **options)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, at a break
@pytest.mark.parametrize(
    "use", [pytest.param(USES[n], id=n, marks=() if n in COMPILED_FIRST else pytest.mark.slow) for n in USES]
)
def test_compiled_loss_and_gradients_are_the_same(use):
    module = use.learnable()
    fast = compiled(module, fullgraph=use.fullgraph)
    assert_matches(evaluate(fast, views()), evaluate(module, views()), 1e-12)


def test_compiled_reference_is_the_same():
    module = USES["ccl joint"].learnable(backend="reference")
    assert_matches(evaluate(compiled(module), views()), evaluate(module, views()), 1e-12)


@pytest.mark.slow
def test_compiled_loss_follows_the_batch_size():
    module = USES["ccl joint"].learnable()
    fast = compiled(module, dynamic=True)
    for n in (9, 7, 3, 0, 9):
        assert_matches(evaluate(fast, views()[:n]), evaluate(module, views()[:n]), 1e-12)


def test_compiled_loss_still_refuses_an_id_out_of_range():
    # A graph cannot raise an IndexError that depends on data; torch's own assertion is a RuntimeError.
    with pytest.raises((IndexError, RuntimeError), match=r"cluster_ids: expected ids from -1 to 2"):
        compiled(CCLLoss())(views(), IDS + 1, CENTERS)


@pytest.mark.slow
def test_compiled_by_inductor_is_the_same():
    module = USES["ccl joint"].module(learnable_temperature=True)
    z = views(torch.float32)
    assert_matches(evaluate(compiled(module, "inductor"), z), evaluate(module, z), 1e-5)


# ---- state ----


@every_loss
def test_temperature_is_a_parameter_only_if_learnable(loss):
    assert not list(loss(temperature=0.07).parameters()) and not loss().state_dict()
    assert loss(temperature=0.07).temperature == 0.07
    loss_fn = loss(temperature=0.07, learnable_temperature=True)
    assert [name for name, _ in loss_fn.named_parameters()] == ["log_temperature"]
    assert loss_fn.log_temperature.shape == (1,) and abs(loss_fn.temperature.item() - 0.07) < 1e-8


@every_use
def test_learnable_and_constant_temperature_agree(use, backend):
    learned = evaluate(use.learnable(temperature=0.3, backend=backend), views())[:2]
    assert_matches(learned, evaluate(use.module(temperature=0.3, backend=backend), views()), 1e-13)


@every_loss
def test_state_dict_round_trip(loss):
    source = loss(temperature=0.03, learnable_temperature=True)
    target = loss(temperature=0.5, learnable_temperature=True)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.temperature, source.temperature)


@every_use
def test_copy_and_pickle(use):
    loss_fn = use.module(learnable_temperature=True).loss_fn
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert torch.equal(call(other, *use.arguments(views())), call(loss_fn, *use.arguments(views())))


@every_use
def test_optimiser_lowers_the_loss_and_keeps_the_temperature_positive(use, backend):
    module = use.module(temperature=0.5, learnable_temperature=True, backend=backend)
    z = nn.Parameter(views(torch.float32))
    optimiser = torch.optim.SGD([z, *module.parameters()], lr=0.1)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = module(z)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert 0 < module.loss_fn.temperature != 0.5
    for _ in range(3):  # however large the step
        module.loss_fn.log_temperature.grad.fill_(50.0)
        optimiser.step()
        assert module.loss_fn.temperature > 0


IDS_OF = {"cluster_ids", "labels", "bank_cluster_ids"}
IDS_OF_A_LOSS = {
    name: use for name, use in USES.items() if IDS_OF & set(use.module().names[: len(use.arguments(views()))])
}


def with_ids(use, change):
    """Its uses with other ids."""
    names = use.module().names
    arguments = dict(zip(names, use.arguments(views()), strict=False))
    for name in IDS_OF & arguments.keys():
        ids = arguments[name]
        arguments[name] = [change(each) for each in ids] if isinstance(ids, list) else change(ids)
    return use.module().loss_fn(**arguments)


@pytest.mark.parametrize("use", IDS_OF_A_LOSS.values(), ids=IDS_OF_A_LOSS)
@pytest.mark.parametrize("dtype", (torch.int8, torch.int16, torch.int32))
def test_ids_are_of_any_integer_dtype(use, dtype):
    assert torch.equal(with_ids(use, lambda ids: ids.to(dtype)), with_ids(use, lambda ids: ids))


@pytest.mark.parametrize("use", IDS_OF_A_LOSS.values(), ids=IDS_OF_A_LOSS)
def test_ids_without_a_sign(use):
    expected = with_ids(use, lambda ids: ids.clamp(min=0))
    assert torch.equal(with_ids(use, lambda ids: ids.clamp(min=0).to(torch.uint8)), expected)


@pytest.mark.parametrize("use", IDS_OF_A_LOSS.values(), ids=IDS_OF_A_LOSS)
def test_an_id_below_minus_one_is_an_index_error(use):
    with pytest.raises(IndexError, match=r"(cluster_ids|labels).*: expected ids .*-1.*, got -2 to"):
        with_ids(use, lambda ids: ids.clone().index_fill_(0, torch.tensor([1]), -2))


# ---- errors: the argument, what was expected, what came ----


@every_loss
@pytest.mark.parametrize("learnable_temperature", (False, True))
@pytest.mark.parametrize("temperature", (0, -1, -0.0, float("nan"), float("inf"), "0.1", None))
def test_temperature_must_be_positive(loss, learnable_temperature, temperature):
    with pytest.raises(ValueError, match=rf"temperature: expected a positive number, got .*{temperature}"):
        loss(temperature=temperature, learnable_temperature=learnable_temperature)


@every_loss
@pytest.mark.parametrize("number", (torch.tensor(0.125), np.float32(0.125), np.float64(0.125)), ids=type)
def test_temperature_as_a_number_of_any_kind(loss, number):
    for loss_fn in (loss(temperature=number), loss(temperature=number, learnable_temperature=True)):
        loss_fn.temperature = number
        assert float(torch.as_tensor(loss_fn.temperature).detach()) == 0.125 and "temperature=0.125" in repr(loss_fn)


@every_loss
@pytest.mark.parametrize(
    "bad",
    (torch.tensor([0.1]), torch.tensor(0.1, requires_grad=True), torch.tensor(0.1, device="meta"), 1e-320, 10**400),
)
def test_temperature_that_is_no_number(loss, bad):
    for given in (lambda: loss(temperature=bad), lambda: setattr(loss(), "temperature", bad)):
        with pytest.raises(ValueError, match=r"^temperature: expected a .*number.*, got "):
            given()


@every_loss
def test_reduction_names_its_choices(loss):
    with pytest.raises(ValueError, match=r"reduction: .*'mean', 'sum', 'none'.*'max'"):
        loss(reduction="max")


@every_loss
def test_unknown_backend_names_the_choices(loss):
    with pytest.raises(ValueError, match=r"backend: .*blocked.*reference.*'cuda'"):
        loss(backend="cuda")(views())


@every_loss
def test_backend_that_cannot_run_here_says_why(loss):
    with pytest.raises(ValueError, match=r"backend: 'triton' cannot run .*float64: ."):
        loss(backend="triton")(views())


OPTIONS = {
    "form": ({"form": "both"}, r"form: .*'joint', 'split', 'inside'.*'both'"),
    "negative weight": ({"center_weight": -0.5}, r"center_weight: .*0.*-0\.5"),
    "nan weight": ({"center_weight": float("nan")}, r"center_weight: .*0.*nan"),
    "infinite weight": ({"center_weight": float("inf")}, r"center_weight: .*0.*inf"),
    "weight type": ({"center_weight": "1"}, r"center_weight: .*'1'"),
    "instance weight above 1": ({"instance_weight": 1.5}, r"instance_weight: .*0 to 1.*1\.5"),
    "negative instance weight": ({"instance_weight": -0.1}, r"instance_weight: .*0 to 1.*-0\.1"),
    "nan instance weight": ({"instance_weight": float("nan")}, r"instance_weight: .*0 to 1.*nan"),
    "weight tensor": ({"center_weight": torch.tensor(1.0)}, r"center_weight: .*tensor"),
    "center temperature 0": ({"center_temperature": 0}, r"center_temperature: .*positive.*0"),
    "center temperature nan": ({"center_temperature": float("nan")}, r"center_temperature: .*positive.*nan"),
    "center temperature type": ({"center_temperature": [0.1]}, r"center_temperature: .*\[0\.1\]"),
    "center temperature 2-D": ({"center_temperature": torch.ones(3, 1)}, r"center_temperature: .*\[k\].*\[3, 1\]"),
    "center temperature ints": ({"center_temperature": torch.ones(3).int()}, r"center_temperature: .*int32"),
}


@pytest.mark.parametrize("options, message", OPTIONS.values(), ids=OPTIONS)
def test_option_error_names_it(options, message):
    with pytest.raises(ValueError, match=message):
        CCLLoss(**options)


Z, C = torch.ones(4, 2, 3), torch.ones(5, 3)
I = torch.tensor([0, 4, -1, 2])
INPUTS = {
    "embeddings type": ((Z.tolist(), I), r"embeddings: .*Tensor.*list"),
    "embeddings 1-D": ((Z[0, 0], I), r"embeddings: .*\[n, d\] or \[n, views, d\].*\[3\]"),
    "embeddings 4-D": ((Z[None], I), r"embeddings: .*\[n, d\] or \[n, views, d\].*\[1, 4, 2, 3\]"),
    "embeddings ints": ((Z.long(), I), r"embeddings: .*float32.*int64"),
    "embeddings complex": ((Z + 0j, I), r"embeddings: .*float32.*complex64"),
    "ids type": ((Z, I.tolist()), r"cluster_ids: .*Tensor.*list"),
    "ids length": ((Z, I[:3]), r"cluster_ids: .*\[4\].*\[3\]"),
    "ids per view": ((Z, torch.stack([I, I], 1)), r"cluster_ids: .*\[4\].*\[4, 2\]"),
    "ids floats": ((Z, I.float()), r"cluster_ids: expected integers, got .*float32"),
    "ids bools": ((Z, I > 0), r"cluster_ids: expected integers, got .*bool"),
    "ids device": ((Z, I.to("meta")), r"cluster_ids: .*cpu.*meta"),
    "no ids, rows": ((Z[:, 0],), r"cluster_ids: .*\[n, d\].*None"),
    "no ids, centers": ((Z, None, C), r"cluster_ids: .*centers.*None"),
    "centers type": ((Z, I, C.tolist()), r"centers: .*Tensor.*list"),
    "centers 1-D": ((Z, I, C[0]), r"centers: .*\[rows, 3\].*\[3\]"),
    "centers width": ((Z, I, C[:, :2]), r"centers: .*3\].*\[5, 2\]"),
    "centers ints": ((Z, I, C.int()), r"centers: .*float32.*int32"),
    "centers device": ((Z, I, C.to("meta")), r"centers: .*cpu.*meta"),
    "center_temperature number": ((Z, I, C, -1.0), r"center_temperature: .*positive.*-1"),
    "center_temperature scalar": ((Z, I, C, torch.tensor(-1.0)), r"center_temperature: .*positive.*-1"),
    "center_temperature value": ((Z, I, C, torch.arange(5.0)), r"center_temperature: .*positive.*0"),
    "center_temperature nan": ((Z, I, C, torch.full((5,), torch.nan)), r"center_temperature: .*positive.*nan"),
    "center_temperature length": ((Z, I, C, torch.ones(4)), r"center_temperature: .*\[5\].*\[4\]"),
    "center_temperature of one": ((Z, I, C, torch.ones(1)), r"center_temperature: .*\[5\].*\[1\]"),
    "center_temperature ints": ((Z, I, C, torch.ones(5).int()), r"center_temperature: .*int32"),
    "center_temperature device": ((Z, I, C, torch.ones(5, device="meta")), r"center_temperature: .*cpu.*meta"),
    "center_temperature scalar device": (
        (Z, I, C, torch.ones((), device="meta")),
        r"center_temperature: .*cpu.*meta",
    ),
}


@pytest.mark.parametrize("arguments, message", INPUTS.values(), ids=INPUTS)
def test_input_error_names_the_argument_what_was_expected_and_what_came(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(CCLLoss(), *arguments)


OUT_OF_RANGE = {
    "not below k": ([0, 5, -1, 2], C, r"cluster_ids: .*-1 to 4 .*5 centers.*5"),
    "below -1": ([0, 1, -2, 2], C, r"cluster_ids: .*-1.*-2"),
    "below -1 without centers": ([0, 1, -7, 2], None, r"cluster_ids: .*-1.*-7"),
    "no centers at all": ([0, 1, -1, 2], C[:0], r"cluster_ids: .*0 centers.*2"),
}


@pytest.mark.parametrize("ids, centers, message", OUT_OF_RANGE.values(), ids=OUT_OF_RANGE)
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_id_out_of_range_is_an_index_error(ids, centers, message, dtype):
    with pytest.raises(IndexError, match=message):
        CCLLoss()(Z, torch.tensor(ids, dtype=dtype), centers)


def test_no_centers_at_all_and_all_unassigned_is_nt_xent(backend):
    # The first epoch, before any clustering.
    z, unassigned = views(), torch.full((9,), -1)
    for form in ("joint", "split", "inside"):
        actual = evaluate(learnable(CCLLoss, form=form, backend=backend), z, unassigned, z.new_zeros(0, 6))
        assert_matches(actual, evaluate_oracle(infonce, z))


# ---- rows of zeros, and the temperature ----


@every_use
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_a_row_of_zeros_gets_no_gradient_and_leaves_the_others_theirs(use, dtype):
    z = views(dtype)
    z[0, 0] = 0
    _, gradient, *_ = evaluate(use.module(learnable_temperature=True), z)
    assert gradient.isfinite().all() and gradient.float().norm() < 1e3
    # (SepCLR's salient features are not of unit length, whitened rows are not those that came, SlotCon's slots are
    # means of rows as they come, and meta-nodes sums.)
    loss_fn = use.module().loss_fn
    others = (
        isinstance(loss_fn, SepCLRLoss | SlotConLoss | WhitenedCSELoss) or getattr(loss_fn, "form", None) == "meta-node"
    )
    assert (gradient[0, 0] == 0).all() or others


@every_loss
@pytest.mark.parametrize("learnable_temperature", (False, True))
def test_the_temperature_may_be_set_by_a_schedule(loss, learnable_temperature):
    module = loss(temperature=0.5, learnable_temperature=learnable_temperature)
    module.temperature = 0.1
    torch.testing.assert_close(module(views()), loss(temperature=0.1)(views()), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"temperature: expected a positive number, got 0"):
        module.temperature = 0

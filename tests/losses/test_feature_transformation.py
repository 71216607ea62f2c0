"""The feature transformations, their loss and the histogram of scores, against their definitions."""

import pytest
import torch

from ccl_fast.losses import (
    FeatureTransformationLoss,
    extrapolate_positives,
    interpolate_negatives,
)
from ccl_fast.losses.feature_transformation import symmetric_beta as symmetric_beta_on
from ccl_fast.metrics import score_histogram
from tests.oracles.losses import assert_matches, batch, call, differentiate, infonce, learnable, reduced, unit

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
per_dimension = pytest.mark.parametrize("per_dimension", (False, True))


def symmetric_beta(shape, alpha, generator):
    return symmetric_beta_on(shape, alpha, torch.device("cpu"), generator)


@torch.compiler.disable  # torch 2.11 compiles no generator
def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


NAMES = ("queries", "keys", "negatives")


def pairs(n=9, d=6, m=13, dtype=torch.float64):
    """Queries, keys and a queue."""
    z = batch(n + n + m, 0, d, 1, dtype=dtype)[0]
    return z[:n], z[n : 2 * n], z[2 * n :]


def transformed(
    queries, keys, negatives, generator, *, temperature=0.2, positive_alpha=2.0, negative_alpha=1.6,
    per_dimension=False, normalize=True, reduction="mean",
):  # fmt: skip
    """Numbers are drawn in the order of the loss, all else follows the paper."""
    scaled = unit if normalize else torch.Tensor.double
    q, k, queue = scaled(queries.double()), scaled(keys.detach().double()), scaled(negatives.detach().double())
    if positive_alpha is not None:
        weights = 1 + symmetric_beta((len(q), q.shape[1] if per_dimension else 1), positive_alpha, generator)
        q, k = weights * q + (1 - weights) * k, weights * k + (1 - weights) * q
    if negative_alpha is not None:
        weights = symmetric_beta((len(queue), q.shape[1] if per_dimension else 1), negative_alpha, generator)
        order = torch.randperm(len(queue), generator=generator)
        queue = weights * queue + (1 - weights) * queue[order]
    losses = []
    for i in range(len(q)):
        positive = q[i] @ k[i] / temperature
        losses.append(torch.cat([positive[None], queue @ q[i] / temperature]).logsumexp(0) - positive)
    return reduced(losses, [True] * len(losses), (len(losses),), reduction, queries)


def check(queries, keys, negatives, *, backend="auto", temperature=0.2, tolerance=1e-10, seed=0, **options):
    module = learnable(FeatureTransformationLoss, temperature, backend=backend, **options)
    queries = queries.detach().requires_grad_()
    actual = differentiate(call(module, queries, keys, negatives, seeded(seed)), [queries, *module.parameters()])
    exact = queries.detach().double().requires_grad_()
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    loss = transformed(exact, keys, negatives, seeded(seed), temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(loss, [exact, log_temperature], unused=True), tolerance)


# ---- the loss ----


@per_dimension
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(per_dimension, reduction, backend):
    check(*pairs(), per_dimension=per_dimension, reduction=reduction, backend=backend)


@pytest.mark.parametrize("options", (
    {"temperature": 0.05}, {"temperature": 1.0}, {"positive_alpha": None}, {"negative_alpha": None},
    {"positive_alpha": 0.3, "negative_alpha": 5}, {"normalize": False, "temperature": 2.0}, {"seed": 3},
))  # fmt: skip
def test_options(options, backend):
    check(*pairs(), **options, backend=backend)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)))
def test_dtypes(dtype, tolerance):
    inputs = pairs(33, dtype=dtype)
    assert call(FeatureTransformationLoss(), *inputs, seeded()).dtype == torch.float32
    check(*inputs, tolerance=tolerance)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    with torch.autocast("cpu", dtype=dtype):
        check(*pairs(33, dtype=torch.float32), tolerance=0.05)


def test_without_transformations_it_is_moco():
    q, k, queue = pairs()
    loss_fn = FeatureTransformationLoss(positive_alpha=None, negative_alpha=None, reduction="none")
    alone = [infonce(q[[i]], k[[i]], queue, temperature=0.2, symmetric=False) for i in range(9)]
    torch.testing.assert_close(call(loss_fn, q, k, queue, seeded()), torch.stack(alone))


def test_positives_are_harder():
    q, k, queue = pairs()
    plain, hard = (
        call(FeatureTransformationLoss(positive_alpha=alpha, negative_alpha=None), q, q + 0.1 * k, queue, seeded())
        for alpha in (None, 2.0)
    )
    assert hard > plain


def test_only_queries_get_a_gradient_and_nothing_is_changed():
    inputs = [x.clone().requires_grad_() for x in pairs()]
    before, state = [x.detach().clone() for x in inputs], torch.random.get_rng_state()
    call(FeatureTransformationLoss(), *inputs, seeded()).backward()
    assert [x.grad is None for x in inputs] == [False, True, True]
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_call_draws_anew_and_a_seed_repeats_it():
    generator, loss_fn = seeded(), FeatureTransformationLoss()
    losses = [call(loss_fn, *pairs(), generator) for _ in range(2)]
    assert losses[0] != losses[1]
    assert torch.equal(call(loss_fn, *pairs(), seeded()), losses[0])


def test_by_default_torch_draws_also_when_compiled():
    loss_fn = FeatureTransformationLoss(per_dimension=True)
    torch.compiler.reset()
    losses = []
    for either in (loss_fn, torch.compile(loss_fn, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(5)
        losses.append(either(**dict(zip(NAMES, pairs(), strict=True))))
    torch.testing.assert_close(losses[1], losses[0])
    assert call(loss_fn, *pairs()) != losses[0]
    torch.testing.assert_close(call(loss_fn, *pairs(), seeded(5)), losses[0])


def test_empty_batch_and_empty_queue_are_zero_with_a_graph():
    for n, m in ((0, 5), (9, 0), (0, 0)):
        q, k, queue = pairs(n, m=m)
        q = q.clone().requires_grad_()
        loss = call(FeatureTransformationLoss(), q, k, queue, seeded())
        loss.backward()
        assert loss == 0 and (q.grad == 0).all()


# ---- the transformations ----


@per_dimension
@pytest.mark.parametrize("alpha", (0.3, 2.0, 50))
def test_a_pairs_similarity_only_falls_and_its_sum_is_kept(per_dimension, alpha):
    q, k, _ = pairs(500)
    far_q, far_k = extrapolate_positives(q, k, generator=seeded(), alpha=alpha, per_dimension=per_dimension)
    assert ((far_q * far_k).sum(1) < (q * k).sum(1)).all()
    torch.testing.assert_close(far_q + far_k, q + k)
    weights = ((far_q - far_k) / (q - k) + 1) / 2
    assert (weights > 1).all() and (weights < 2).all()
    if not per_dimension:  # the paper's formula of the score
        assert (weights - weights[:, :1]).abs().max() < 1e-8
        weights = weights[:, 0]
        expected = (q * k).sum(1) - weights * (weights - 1) * (q - k).square().sum(1)
        torch.testing.assert_close((far_q * far_k).sum(1), expected)
    else:
        assert (weights[:, 1:] - weights[:, :1]).abs().min() > 1e-8


def test_equal_pairs_stay_as_they_are():
    q = pairs()[0]
    far_q, far_k = extrapolate_positives(q, q.clone(), generator=seeded())
    assert torch.equal(far_q, q) and torch.equal(far_k, q)


@per_dimension
def test_negatives_are_mixed_with_those_of_a_permutation(per_dimension):
    queue = torch.eye(40, dtype=torch.float64)  # so that each mixture tells of what it is made
    mixed = interpolate_negatives(queue, generator=seeded(), per_dimension=per_dimension)
    assert ((mixed >= 0) & (mixed <= 1)).all() and ((mixed > 0).sum(1) <= 2).all()
    assert (mixed > 0).sum() > 70 and ((mixed > 0).sum(0) <= 2).all()  # each is taken once as the other one
    if not per_dimension:
        torch.testing.assert_close(mixed.sum(1), torch.ones(40, dtype=torch.float64))


@per_dimension
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_the_transformations_keep_the_dtype_and_have_gradients(per_dimension, dtype):
    q, k, queue = (x.clone().requires_grad_() for x in pairs(dtype=dtype))
    options = {"per_dimension": per_dimension, "generator": seeded()}
    results = [*extrapolate_positives(q, k, **options), interpolate_negatives(queue, **options)]
    assert [x.dtype for x in results] == [dtype] * 3
    sum(x.float().square().sum() for x in results).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, queue))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_rounded_once(dtype):
    q, k, queue = pairs(dtype=dtype)
    actual = [*extrapolate_positives(q, k, generator=seeded()), interpolate_negatives(queue, generator=seeded())]
    q, k, queue = q.double(), k.double(), queue.double()
    exact = [*extrapolate_positives(q, k, generator=seeded()), interpolate_negatives(queue, generator=seeded())]
    for a, e in zip(actual, exact, strict=True):
        assert ((a - e).abs() <= 0.501 * torch.finfo(dtype).eps * e.abs() + 1e-7).all()


@pytest.mark.parametrize("alpha, distribution", (
    (1.0, lambda x: x),
    (0.5, lambda x: 2 / torch.pi * x.sqrt().asin()),
    (2.0, lambda x: 3 * x**2 - 2 * x**3),
    (3.0, lambda x: 10 * x**3 - 15 * x**4 + 6 * x**5),
))  # fmt: skip
def test_symmetric_beta_by_its_distribution(alpha, distribution):
    x = symmetric_beta((100, 200), alpha, seeded()).flatten().sort().values
    steps = torch.arange(1, 20001, dtype=torch.float64) / 20000
    # Kolmogorov: above 1.95 / sqrt(n) once in a thousand.
    assert (distribution(x) - steps).abs().max() < 1.95 / 20000**0.5


@pytest.mark.parametrize("alpha", (1e-3, 0.01, 0.2, 1.6, 100.0, 1e6))
def test_symmetric_beta_by_its_moments(alpha):
    x = symmetric_beta((100_000,), alpha, seeded()) - 0.5
    assert x.isfinite().all() and x.abs().max() <= 0.5
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    assert x.mean().abs() < 4 * (variance / 1e5) ** 0.5
    assert abs(x.square().mean() / variance - 1) < 0.03
    assert abs(x.pow(4).mean() / fourth - 1) < 0.06


# ---- the histogram of scores ----


def dense_scores(q, k, queue, normalize=True):
    q, k = (unit(x.double()) if normalize else x.double() for x in (q, k))
    scores = q @ k.T
    own = torch.eye(len(q), dtype=torch.bool)
    if queue is None:
        return scores[own], scores[~own]
    return scores[own], (q @ (unit(queue.double()) if normalize else queue.double()).T).flatten()


@pytest.mark.parametrize("with_queue", (False, True))
@pytest.mark.parametrize("normalize, range", ((True, (-1.0, 1.0)), (True, (0, 0.5)), (False, (-3, 8))))
def test_scores(with_queue, normalize, range):
    q, k, queue = pairs(17)
    k = q + 0.7 * k
    queue = queue + 0.5 if with_queue else None
    found = score_histogram(q, k, negatives=queue, bins=20, range=range, normalize=normalize)
    scores = dense_scores(q, k, queue, normalize)
    torch.testing.assert_close(found.edges, torch.linspace(*range, 21, dtype=torch.float64))
    for counts, mean, variance, exact in zip(
        (found.positives, found.negatives), (found.positive_mean, found.negative_mean),
        (found.positive_variance, found.negative_variance), scores, strict=True,
    ):  # fmt: skip
        inside = (exact.clamp(*range)[:, None] >= found.edges[:-1]).sum(1) - 1
        assert counts.dtype == torch.int64 and torch.equal(counts, inside.bincount(minlength=20))
        torch.testing.assert_close(mean, exact.mean())
        torch.testing.assert_close(variance, exact.var(correction=0))


def test_scores_by_default_and_of_equal_rows():
    found = score_histogram(*pairs()[:2])
    assert len(found.edges) == 101 and found.edges[0] == -1 and found.edges[-1] == 1
    for d in range(2, 20):
        one = torch.ones(7, d)
        found = score_histogram(one, one, bins=3)
        assert found.positives.tolist() == [0, 0, 7] and found.negatives.tolist() == [0, 0, 42]
        torch.testing.assert_close(found.negative_mean, torch.tensor(1.0))
        assert 0 <= found.negative_variance < 1e-12 and found.positive_variance < 1e-12


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("with_queue", (False, True))
@pytest.mark.parametrize("autocast, normalize", ((False, True), (False, False), (True, True)))
def test_scores_of_other_dtypes_are_in_float32(dtype, with_queue, autocast, normalize):
    q, k, queue = (20 + x for x in pairs(17, dtype=dtype))  # all scores near 1, so that variances may cancel
    queue = queue if with_queue else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = score_histogram(q.requires_grad_(), k, negatives=queue, normalize=normalize)
    scores = dense_scores(q.detach(), k, queue, normalize)
    assert all(x.dtype == torch.float32 and not x.requires_grad for x in found[3:])
    torch.testing.assert_close(found.negative_mean.double(), scores[1].mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.positive_variance.double(), scores[0].var(correction=0), rtol=2e-3, atol=0)
    torch.testing.assert_close(found.negative_variance.double(), scores[1].var(correction=0), rtol=2e-3, atol=0)


@pytest.mark.parametrize("n, m, positives, negatives", ((0, None, 0, 0), (1, None, 1, 0), (3, 0, 3, 0), (0, 4, 0, 0)))
def test_scores_without_a_pair(n, m, positives, negatives):
    q, k, queue = pairs(n, m=m or 0)
    found = score_histogram(q, k, negatives=None if m is None else queue)
    assert found.positives.sum() == positives and found.negatives.sum() == negatives
    for number, values in ((positives, found[3:5]), (negatives, found[5:7])):
        assert all(x.isnan() == (number == 0) for x in values)


# ---- errors ----


def test_errors():
    q, k, queue = pairs()
    for name in ("positive_alpha", "negative_alpha"):
        for value in (0, -1.0, float("nan"), "2", True):
            with pytest.raises(ValueError, match=f"{name}: expected a positive number, got "):
                FeatureTransformationLoss(**{name: value})
    loss_fn = FeatureTransformationLoss()
    for attempt, message in (
        (lambda: call(loss_fn, q, k, queue, 0), "generator: expected a torch.Generator or None, got int"),
        (lambda: call(loss_fn, q, None, queue, seeded()), "keys: expected a torch.Tensor, got NoneType"),
        (lambda: call(loss_fn, q, k, None, seeded()), "negatives: expected a torch.Tensor, got NoneType"),
        (lambda: call(loss_fn, q, k[:4], queue, seeded()), r"keys: expected shape \[9, 6\]"),
        (lambda: call(loss_fn, q, k, queue[:, :4], seeded()), r"negatives: expected shape \[rows, 6\], got \[13, 4\]"),
        (lambda: call(loss_fn, q.long(), k.long(), queue.long(), seeded()), "queries: expected float64"),
        (lambda: extrapolate_positives(q, None, generator=seeded()), "keys: expected a torch.Tensor"),
        (lambda: extrapolate_positives(q, k, generator=0), "generator: expected a torch.Generator or None"),
        (lambda: interpolate_negatives(queue, generator=0), "generator: expected a torch.Generator or None"),
        (lambda: extrapolate_positives(q, k, generator=seeded(), alpha=0), "alpha: expected a positive number, got 0"),
        (lambda: interpolate_negatives(queue[0], generator=seeded()), r"negatives: expected shape \[rows, d\]"),
        (lambda: interpolate_negatives(queue.long(), generator=seeded()), "negatives: expected float64"),
        (lambda: score_histogram(q, None), "keys: expected a torch.Tensor"),
        (lambda: score_histogram(q, k, bins=0), "bins: expected a positive integer, got 0"),
        (lambda: score_histogram(q, k, range=(1, 0)), r"range: expected two increasing numbers, got \(1, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()

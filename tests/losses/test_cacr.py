"""CACRLoss against its definition, its limits in t, and a loss whose softmax sees no other row."""

import functools

import pytest
import torch

from ccl_fast.losses import CACRLoss
from tests.oracles.losses import as_rows, assert_matches, batch, differentiate, reduced, unit
from tests.oracles.matrices import cacr_of_two_views

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
LABELS = torch.tensor([4, 0, -1, 4, 1, 0, 4, -1, 3])  # classes of 3 and 2 samples; two unlabelled, two alone
NO_LABELS = torch.arange(9)


def views(n=9, count=3, d=6, dtype=torch.float64, seed=0):
    return batch(n, count, d, 1, seed, dtype)[0]


def cacr(
    embeddings, labels=None, *, t_positive=1.0, t_negative=2.0, negatives_of="other views", rbf=None, normalize=True,
    reduction="mean",
):  # fmt: skip
    z, ids, shape = as_rows(embeddings, labels, normalize)

    def mean_distance(i, others, t):
        distances = torch.stack([(z[i] - z[j]).square().sum() for j in others])
        return (torch.softmax(t * distances, 0) * distances).sum()

    @functools.cache
    def log_of_costs(rows, candidates):
        """Of rows that share candidates, each but those of its own id."""
        costs = []
        for i in rows:
            distances = [(z[i] - z[j]).square().sum() for j in candidates if ids[j] != ids[i]]
            if distances:
                distances = torch.stack(distances)
                costs.append((torch.softmax(-t_negative * distances, 0) * torch.exp(-rbf * distances)).sum())
        return torch.stack(costs).mean().log()

    losses, counted = [], []
    for i in range(len(z)):
        positives = [j for j in range(len(z)) if ids[j] == ids[i] and j != i]
        negatives = [j for j in range(len(z)) if ids[j] != ids[i]]
        counted.append(bool(positives))
        loss = mean_distance(i, positives, t_positive) if positives else None
        if positives and negatives:
            groups = [negatives]
            if labels is None and negatives_of == "other views":
                views = embeddings.shape[1]
                others = [v for v in range(views) if v != i % views]
                groups = [[j for j in negatives if j % views == v] for v in others]
            if rbf is None:
                loss = loss - sum(mean_distance(i, group, -t_negative) for group in groups) / len(groups)
            elif labels is None and negatives_of == "other views":
                rows = [range(v, len(z), views) for v in range(views)]
                loss = loss + sum(log_of_costs(rows[i % views], rows[v]) for v in others) / len(others)
            else:
                loss = loss + log_of_costs(range(len(z)), range(len(z)))
        losses.append(loss)
    return reduced(losses, counted, shape, reduction, embeddings)


def check(z, labels=None, tolerance=1e-10, **options):
    z = z.detach().requires_grad_()
    actual = differentiate(CACRLoss(**options)(z, labels), [z])
    exact = z.detach().double().requires_grad_()
    assert_matches(actual, differentiate(cacr(exact, labels, **options), [exact]), tolerance)
    return actual


@pytest.mark.parametrize("labels", (None, LABELS), ids=("samples", "classes"))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(labels, normalize, reduction):
    check(views(), labels, normalize=normalize, reduction=reduction)
    if labels is not None:
        check(views()[:, 0], labels, normalize=normalize, reduction=reduction)


@pytest.mark.parametrize("labels", (None, LABELS), ids=("samples", "classes"))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("t_positive, t_negative", ((0, 0), (0.0, 2.0), (1.0, 0.0), (0.1, 20.0), (30, 0.3)))
def test_negatives_of_all_views(t_positive, t_negative, normalize, labels):
    options = {"t_positive": t_positive, "t_negative": t_negative, "normalize": normalize}
    check(views(), labels, 1e-9, negatives_of="all views", **options)


def test_it_is_the_authors():
    q = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    k = torch.tensor([[0.8, 0.6], [-0.6, 0.8], [-0.8, -0.6], [0.6, -0.8]], dtype=torch.float64)
    loss = CACRLoss(t_positive=1.0, t_negative=2.0)(torch.stack((q, k), 1))
    torch.testing.assert_close(loss.item(), -0.4297505582, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="negatives_of: expected one of"):
        CACRLoss(negatives_of="both")


@pytest.mark.parametrize("labels", (None, LABELS), ids=("samples", "classes"))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("t_positive, t_negative", ((0, 0), (0.0, 2.0), (1.0, 0.0), (0.1, 20.0), (30, 0.3)))
def test_options(labels, normalize, t_positive, t_negative):
    check(views(), labels, 1e-9, t_positive=t_positive, t_negative=t_negative, normalize=normalize)


@pytest.mark.parametrize("labels", (None, LABELS), ids=("samples", "classes"))
@pytest.mark.parametrize("negatives_of", ("other views", "all views"))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("rbf, t_negative", ((2.0, 2.0), (2, 0), (0.5, 20.0), (30.0, 0.3)))
def test_rbf_cost(labels, negatives_of, normalize, rbf, t_negative):
    check(views(), labels, 1e-9, rbf=rbf, t_negative=t_negative, negatives_of=negatives_of, normalize=normalize)
    for reduction in ("sum", "none"):
        check(views(), labels, 1e-9, rbf=rbf, negatives_of=negatives_of, normalize=normalize, reduction=reduction)
    if labels is not None:
        check(views()[:, 0], labels, 1e-9, rbf=rbf, normalize=normalize)


def test_rbf_cost_of_the_authors():
    """A matrix of costs without its diagonal, the logarithm of the mean over its rows; here of both directions."""
    z = views(count=2)
    x, y = unit(z).unbind(1)
    found = []
    for a, b in ((x, y), (y, x)):
        away = ~torch.eye(9, dtype=torch.bool)
        cost = (-2.0 * (a[:, None] - b).norm(dim=-1) ** 2).exp()[away].view(9, 8)
        weights = (cost.log() * 3.0 / 2.0).softmax(1)
        found.append((cost * weights).sum(1).mean().log())
    expected = (x - y).square().sum(1).mean() + sum(found) / 2
    torch.testing.assert_close(CACRLoss(t_negative=3.0, rbf=2.0)(z), expected)


@pytest.mark.parametrize("labels", (None, torch.zeros(9, dtype=torch.long), torch.arange(9)))
@pytest.mark.parametrize("normalize", (True, False))
def test_rbf_cost_of_no_negatives_or_positives(labels, normalize):
    z = views(1 if labels is None else 9).requires_grad_()
    z = z if labels is None else z[:, 0]
    loss = CACRLoss(rbf=2.0, normalize=normalize)(z, labels)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and gradient.isfinite().all() and (loss == 0) == (labels is not None and bool(labels.any()))


def test_rbf_cost_without_weights_is_uniformity():
    z = views()
    attraction = (
        CACRLoss(t_negative=0.0, rbf=2.0)(z)
        - sum(
            torch.cdist(a, b).square().mul(-2.0).exp()[~torch.eye(9, dtype=torch.bool)].mean().log()
            for v, a in enumerate(unit(z).unbind(1))
            for w, b in enumerate(unit(z).unbind(1))
            if v != w
        )
        / 6
    )
    one = CACRLoss(t_negative=0.0)(z)
    x = unit(z)
    mean = sum(
        torch.cdist(x[:, v], x[:, w]).square()[~torch.eye(9, dtype=torch.bool)].mean()
        for v in range(3)
        for w in range(3)
        if v != w
    )
    torch.testing.assert_close(attraction, one + mean / 6)


def test_a_wrong_rbf():
    for wrong in (0, -1.0, "2", True):
        with pytest.raises(ValueError, match="rbf: expected a positive number"):
            CACRLoss(rbf=wrong)


@pytest.mark.parametrize("rbf", (None, 2.0))
@pytest.mark.parametrize("labels", (None, LABELS), ids=("samples", "classes"))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(labels, normalize, dtype, tolerance, rbf):
    loss, gradient = check(views(dtype=dtype), labels, tolerance, normalize=normalize, rbf=rbf)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype


@pytest.mark.parametrize("labels", (None, LABELS), ids=("samples", "classes"))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(labels, normalize, dtype):
    z = views(dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        loss, gradient = check(z, labels, 0.03, normalize=normalize)
    assert loss.dtype == gradient.dtype == torch.float32


def test_distances_small_beside_the_norms():
    # The squares of the norms are 1e4 times the squared distances.
    z = 50 + 0.5 * views(dtype=torch.float32)
    for labels in (None, LABELS):
        check(z, labels, 1e-4, normalize=False)


@pytest.mark.parametrize("labels", (None, LABELS), ids=("samples", "classes"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_distances_are_computed_in_float32(labels, dtype):
    z, loss_fn = views(dtype=dtype) + 0.1, CACRLoss(normalize=False)
    expected = cacr(z, labels, normalize=False).float()
    torch.testing.assert_close(loss_fn(z, labels), expected)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(loss_fn(z.float(), labels), expected)
    rounded = torch.nn.functional.normalize(z.float(), dim=2).to(dtype)[:1]
    torch.testing.assert_close(CACRLoss()(z[:1]), cacr(rounded, normalize=False).float())


def test_the_matrix_of_two_views_says_the_same():
    z = views(count=2)
    torch.testing.assert_close(cacr_of_two_views(z, 3.0), cacr(z, t_negative=3.0))


def test_uniform_weights_are_alignment_and_the_mean_distance():
    x = unit(views())
    distance = (x[:, :, None, None] - x).square().sum(-1)  # [n, views, n, views]
    own = torch.eye(9, dtype=torch.bool)
    alignment = distance.transpose(1, 2)[own].sum() / (9 * 3 * 2)
    torch.testing.assert_close(
        CACRLoss(t_positive=0, t_negative=0, negatives_of="all views")(views()),
        alignment - distance.transpose(1, 2)[~own].mean(),
    )


def test_one_positive_has_all_the_weight():
    z = views(count=2)
    losses = [CACRLoss(t_positive=t)(z) for t in (0.0, 1.0, 50.0)]
    torch.testing.assert_close(losses[1:], losses[:1] * 2)
    assert not torch.isclose(CACRLoss(t_positive=50.0)(views()), CACRLoss()(views()))


@pytest.mark.parametrize("labels", (NO_LABELS, LABELS), ids=("samples", "classes"))
def test_large_t_takes_the_farthest_positive_and_the_nearest_negative(labels):
    x, ids = unit(views()).flatten(0, 1), torch.where(labels < 0, 9 + NO_LABELS, labels).repeat_interleave(3)
    distance, same = (x[:, None] - x).square().sum(-1), ids[:, None] == ids
    expected = distance.masked_fill(~same, 0).amax(1) - distance.masked_fill(same, torch.inf).amin(1)
    for normalize in (True, False):
        loss_fn = CACRLoss(t_positive=1e5, t_negative=1e5, normalize=normalize, reduction="none")
        torch.testing.assert_close(loss_fn(x.view(9, 3, 6), labels).flatten(), expected)
    torch.testing.assert_close(loss_fn(x.view(9, 3, 6)).shape, torch.Size([9, 3]))


@pytest.mark.parametrize("normalize", (True, False))
def test_samples_as_classes_and_views_in_any_order(normalize):
    loss_fn = CACRLoss(negatives_of="all views", normalize=normalize)
    expected = loss_fn(views())
    for labels in (NO_LABELS, NO_LABELS.flip(0), torch.full((9,), -1)):
        torch.testing.assert_close(loss_fn(views(), labels), expected)
    torch.testing.assert_close(loss_fn(views().flip(1)[torch.randperm(9)]), expected)


def test_a_rotation_and_a_shift_change_nothing():
    z, rotation = views(), torch.linalg.qr(views(6, 6)[0])[0]
    torch.testing.assert_close(CACRLoss()(z @ rotation), CACRLoss()(z))
    moved = z @ rotation + torch.arange(6)
    for labels in (None, LABELS):
        loss_fn = CACRLoss(normalize=False)
        torch.testing.assert_close(loss_fn(moved, labels), loss_fn(z, labels))


def test_the_authors_attraction():
    """Their loop over queries, a view each: softmax and mean over the other views, then the mean over all."""
    z = unit(views(count=4))
    attraction = 0.0
    for query in range(4):
        cost = (z[:, [query]] - z[:, [v for v in range(4) if v != query]]).norm(dim=-1).square()
        attraction += (cost * (1.3 * cost).softmax(1)).sum(1).mean() / 4
    alone = [CACRLoss(t_positive=1.3)(sample[None]) for sample in z]  # with nothing to repel it
    torch.testing.assert_close(torch.stack(alone).mean(), attraction)


@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("labels", (None, torch.zeros(9, dtype=torch.int64)), ids=("one sample", "one class"))
def test_no_negatives(labels, normalize):
    check(views()[:1] if labels is None else views(), labels, normalize=normalize)


@pytest.mark.parametrize("normalize", (True, False))
def test_no_positives(normalize):
    z = views()[:, 0].clone().requires_grad_()
    loss = CACRLoss(normalize=normalize)(z, NO_LABELS)
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


@pytest.mark.parametrize("labels", (None, torch.zeros(2, dtype=torch.int64)))
@pytest.mark.parametrize("normalize", (True, False))
def test_equal_rows(labels, normalize):
    z = views()[:1, :1].expand(2, 3, 6).clone().requires_grad_()
    loss = CACRLoss(normalize=normalize)(z, labels)
    loss.backward()
    assert loss.abs() < 1e-12 and z.grad.abs().max() < 1e-12


@pytest.mark.parametrize("normalize", (True, False))
def test_empty_batch_is_zero_with_a_graph(normalize):
    for labels in (None, torch.zeros(0, dtype=torch.int64)):
        z = torch.zeros(0, 2, 6, requires_grad=True)
        loss = CACRLoss(normalize=normalize)(z, labels)
        loss.backward()
        assert loss == 0 and z.grad.shape == z.shape


@pytest.mark.parametrize("normalize", (True, False))
def test_strides_make_no_difference(normalize):
    z = views().transpose(0, 1).contiguous().transpose(0, 1)
    assert not z.is_contiguous()
    check(z, normalize=normalize)
    check(views(d=12)[..., ::2], LABELS, normalize=normalize)


@pytest.mark.parametrize("labels", (None, LABELS), ids=("samples", "classes"))
@pytest.mark.parametrize("normalize", (True, False))
def test_not_a_number_gives_nan(labels, normalize):
    z = views()
    z[4, 1, 2] = torch.nan
    assert CACRLoss(normalize=normalize)(z, labels).isnan()


@pytest.mark.parametrize("labels", (None, LABELS), ids=("samples", "classes"))
@pytest.mark.parametrize("normalize", (True, False))
def test_compiled_is_the_same(labels, normalize):
    torch.compiler.reset()
    loss_fn = CACRLoss(normalize=normalize)
    fast = torch.compile(loss_fn, backend="aot_eager", fullgraph=True)
    z = views().requires_grad_()
    assert_matches(differentiate(fast(z, labels), [z]), differentiate(loss_fn(z, labels), [z]), 1e-12)


def test_double_backward_is_a_clear_error():
    z = views().requires_grad_()
    gradient = torch.autograd.grad(CACRLoss()(z), z, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_representation_and_state():
    text = "CACRLoss(t_positive=1.0, t_negative=3, negatives_of='other views', normalize=True, reduction='mean')"
    assert repr(CACRLoss(t_negative=3)) == text and not CACRLoss().state_dict()


def test_errors():
    for name in ("t_positive", "t_negative"):
        for value in (-1.0, float("nan"), float("inf"), "1", None, True, torch.tensor(1.0)):
            with pytest.raises(ValueError, match=f"{name}: expected a number >= 0, got "):
                CACRLoss(**{name: value})
    for arguments, message in (
        ((views()[:, :1],), "embeddings: expected at least two views without labels, got 1"),
        ((views()[:, 0],), r"labels: expected integers \[n\] with embeddings \[n, d\], got None"),
        ((views(), LABELS[:4]), r"labels: expected shape \[9\], got \[4\]"),
        ((views(), LABELS / 2.0), "labels: expected integers, got torch.float32"),
        ((views().long(),), "embeddings: expected float64"),
    ):
        with pytest.raises(ValueError, match=message):
            CACRLoss()(*arguments)

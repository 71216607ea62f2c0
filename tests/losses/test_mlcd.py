"""MLCDLoss against its definition; the draw of its prototypes; the nearest centres."""

import pytest
import torch

from ccl_fast.losses import MLCDLoss, nearest_centers
from ccl_fast.losses.mlcd import draw_prototypes
from tests.oracles.losses import assert_matches, batch, call, differentiate, largest, learnable, unit
from tests.oracles.matrices import mlcd

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
LABELS = torch.tensor(
    [[0, 3, 7], [7, 0, 1], [-1, -1, -1], [2, -1, 5], [3, 7, 0], [4, 4 + 1, 6], [-1, -1, 2], [0, 1, 2], [7, 6, 5]]
)


def tensors(n=9, k=8, dtype=torch.float64, seed=0):
    z, _, centers = batch(n, 0, 6, k, seed, dtype)
    return z, centers


def check(z, centers, labels, *, seed=None, temperature=0.1, tolerance=1e-10, sample=1, **options):
    module, leaves = learnable(MLCDLoss, temperature, sample=sample, **options), [z.clone(), centers.clone()]
    leaves = [x.detach().requires_grad_() for x in leaves]
    generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
    value = call(module, leaves[0], labels, leaves[1], generators[0])
    assert value.dtype == torch.promote_types(z.dtype, torch.float32)
    actual = differentiate(value, [*leaves, *module.parameters()])
    among = None if sample == 1 else draw_prototypes(labels, len(centers), sample, generators[1])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = mlcd(exact[0], labels, exact[1], among, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature]), tolerance)


@pytest.mark.parametrize("labels", (LABELS, LABELS[:, :1], LABELS.int(), LABELS.clamp(max=0)[:, :1]))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(labels, reduction):
    check(*tensors(), labels, reduction=reduction)


@pytest.mark.parametrize("k", (8, 61))
@pytest.mark.parametrize("temperature, normalize", ((1 / 32, True), (1.0, True), (0.5, False)))
def test_options(k, temperature, normalize):
    check(*tensors(k=k), LABELS, temperature=temperature, normalize=normalize)


@pytest.mark.parametrize("sample", (0.01, 0.3, 0.99))
@pytest.mark.parametrize("seed", (0, 1))
def test_a_sample_of_centers(sample, seed):
    check(*tensors(k=61), LABELS, sample=sample, seed=seed)
    check(*tensors(k=8), LABELS, sample=sample, seed=seed)  # all are labels of the batch, or nearly


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    check(*tensors(dtype=dtype), LABELS, tolerance=tolerance)
    check(*tensors(k=61, dtype=dtype), LABELS, tolerance=tolerance, sample=0.3, seed=0)


def test_near_positives_do_not_drown_the_negatives():
    # A row on its centres, another orthogonal to it: e^-32 of the sum over all centres is left, which is 1.
    rows = torch.eye(4)
    centers = torch.cat((rows[:1], rows[:1], rows[1:2]))
    loss = call(MLCDLoss(sample=1), rows[:1], torch.tensor([[0, 1]]), centers)
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


def test_one_label_of_two_centers_is_a_sum_of_logistic_losses():
    z, centers = tensors(k=2)
    labels = torch.arange(9)[:, None] % 2
    scores = unit(z) @ unit(centers).T / 0.1
    own, other = scores.gather(1, labels), scores.gather(1, 1 - labels)
    expected = torch.nn.functional.softplus(torch.cat((-own, other), dim=1)).sum(1).mean()
    torch.testing.assert_close(call(MLCDLoss(0.1, sample=1), z, labels, centers), expected)


def test_order_of_labels_and_centers_is_without_effect():
    z, centers = tensors()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    moved = torch.where(LABELS < 0, -1, order.argsort()[LABELS.clamp(min=0)]).flip(1)
    loss = MLCDLoss(0.1, sample=1)
    torch.testing.assert_close(loss(z, moved, centers[order]), loss(z, LABELS, centers))


def test_only_centers_that_take_part_get_a_gradient():
    z, centers = tensors(k=200)
    centers.requires_grad_()
    call(MLCDLoss(0.1, sample=0.2), z, LABELS, centers, torch.Generator().manual_seed(0)).backward()
    moved = (centers.grad != 0).any(1)
    assert moved.sum() == 40 and moved[:8].all()


@pytest.mark.parametrize(
    "share, k, count", ((0.1, 100, 10), (0.14, 100, 14), (0.115, 100, 12), (0.07, 100, 8), (0.2, 8, 8))
)
def test_the_draw(share, k, count):
    generator = torch.Generator().manual_seed(0)
    draws = [draw_prototypes(LABELS, k, share, generator) for _ in range(300)]
    for drawn in draws:
        assert len(drawn) == count and (drawn[1:] > drawn[:-1]).all() and torch.equal(drawn[:8], torch.arange(8))
    if count > 8:
        rest = torch.cat([drawn[8:] for drawn in draws]).bincount(minlength=k)[8:]
        mean = 300 * (count - 8) / (k - 8)
        assert rest.min() > 0 or mean < 7
        assert (rest - mean).abs().max() < 6 * mean**0.5


def test_the_generator_decides():
    z, centers = tensors(k=100)
    loss, state = MLCDLoss(sample=0.2), torch.random.get_rng_state()

    def value(seed):
        return loss(z, LABELS, centers, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(value(1), value(1)) and value(1) != value(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    loss(z, LABELS, centers)
    assert not torch.equal(torch.random.get_rng_state(), state)


def test_rows_without_labels_and_empty_batches():
    z, centers = tensors()
    labels = torch.full((9, 2), -1)
    for sample in (1, 0.5):
        rows, matrix = z.clone().requires_grad_(), centers.clone().requires_grad_()
        loss = call(MLCDLoss(sample=sample), rows, labels, matrix)
        assert all(largest(x) == 0 for x in differentiate(loss, [rows, matrix]))
        rows = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
        loss = call(MLCDLoss(sample=sample), rows, labels[:0], matrix)
        assert all(largest(x) == 0 for x in differentiate(loss, [rows, matrix]))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_nearest_centers(dtype):
    z, centers = tensors(n=13, k=29, dtype=dtype)
    labels = nearest_centers(z * 7, centers * torch.linspace(0.1, 9, 29, dtype=dtype)[:, None], num_centers=5)
    assert labels.dtype == torch.int64
    cosine = unit(z.double()) @ unit(centers.double()).T
    largest_cosines = cosine.topk(5).values
    torch.testing.assert_close(cosine.gather(1, labels), largest_cosines, rtol=0, atol=0.02)
    if dtype == torch.float64:
        assert torch.equal(labels, cosine.topk(5).indices)


def test_nearest_centers_of_few():
    z, centers = tensors(n=3, k=2)
    labels = nearest_centers(z, centers)
    assert labels.shape == (3, 8) and (labels[:, 2:] == -1).all() and (labels[:, :2] >= 0).all()
    check(z, centers, labels)


def test_errors():
    z, centers = tensors()
    for sample in (0, 1.01, "1", True):
        with pytest.raises(ValueError, match="sample: expected a number above 0 and at most 1, got"):
            MLCDLoss(sample=sample)
    for arguments, message in (
        ((z, LABELS, centers[:, :2]), r"prototypes: expected shape \[rows, 6\], got \[8, 2\]"),
        ((z, LABELS, centers[:0]), "prototypes: expected at least one row, got none"),
        ((z, LABELS[:4], centers), r"cluster_ids: expected shape \[9, l\] with l of at least 1, got \[4, 3\]"),
        ((z, LABELS[:, :0], centers), r"cluster_ids: expected shape \[9, l\] with l of at least 1, got \[9, 0\]"),
        ((z, LABELS[:, 0], centers), r"cluster_ids: expected shape \[rows, d\], got \[9\]"),
        ((z, LABELS.double(), centers), "cluster_ids: expected integers, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call(MLCDLoss(), *arguments)
    with pytest.raises(IndexError, match=r"cluster_ids: expected ids from -1 to 6 \(there are 7 pro.*got -1 to 7"):
        call(MLCDLoss(), z, LABELS, centers[:7])
    with pytest.raises(ValueError, match="num_centers: expected a positive integer, got 0"):
        nearest_centers(z, centers, num_centers=0)


# ---- margins ----

ROW = torch.tensor([[1.0, 0]], dtype=torch.float64)
PROTOTYPES = torch.tensor([[0.5, 0.75**0.5], [0, 1], [-1, 0], [0.8, 0.6]], dtype=torch.float64)


@pytest.mark.parametrize(
    "margin, form, value",
    (
        (0.0, "arcface", 0.8644650648),
        (0.0, "cosface", 0.8644650648),
        (0.3, "arcface", 1.1127041346),
        (0.3, "cosface", 1.1626358750),
    ),
)
def test_margins_are_the_authors(margin, form, value):
    """Their value; the gradient is that of the margins' sigmoids through logits without one."""
    loss_fn = MLCDLoss(0.25, sample=1, margin=margin, margin_form=form)
    leaves = [ROW.clone().requires_grad_(), PROTOTYPES.clone().requires_grad_()]
    loss = loss_fn(leaves[0], torch.tensor([[0, 3]]), leaves[1])
    torch.testing.assert_close(loss.item(), value, rtol=0, atol=1e-9)
    actual = torch.autograd.grad(loss, leaves)
    exact = [x.detach().requires_grad_() for x in leaves]
    s = unit(exact[0]) @ unit(exact[1]).T / 0.25
    cosines = s.detach()[0, [0, 3]] * 0.25
    shifted = (cosines.acos() + margin).cos() if form == "arcface" else cosines - margin
    of_positive = torch.softmax(torch.cat((torch.zeros(1), -shifted / 0.25)), 0)[1:]
    of_negative = torch.softmax(torch.cat((torch.zeros(1), s.detach()[0, [1, 2]])), 0)[1:]
    linear = (s[0, [1, 2]] * of_negative).sum() - (s[0, [0, 3]] * of_positive).sum()
    for a, e in zip(actual, torch.autograd.grad(linear, exact), strict=True):
        torch.testing.assert_close(a, e)


def test_margin_errors():
    for options, message in (
        ({"margin": -0.1}, "margin: expected a number >= 0"),
        ({"margin_form": "sphere"}, "margin_form: expected one of 'arcface', 'cosface'"),
        ({"margin": 0.2, "normalize": False}, "margin: expected 0 with normalize=False"),
    ):
        with pytest.raises(ValueError, match=message):
            MLCDLoss(**options)

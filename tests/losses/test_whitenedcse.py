"""WhitenedCSELoss and shuffled_group_whitening against their definitions, and what whitening promises."""

import pytest
import torch
from torch import nn

from ccl_fast.losses import WhitenedCSELoss, shuffled_group_whitening
from tests.oracles.losses import assert_matches, batch, call, differentiate, infonce, learnable, reduced, unit

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
EPS = 1e-5


def permutations(views, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(d, generator=generator) for _ in range(views)])


def inverse_root(a):
    """By Newton and Schulz's iteration, without eigenvalues."""
    identity, norm = torch.eye(len(a), dtype=a.dtype), a.norm()
    y, z = a / norm, identity
    for _ in range(40):
        step = (3 * identity - z @ y) / 2
        y, z = y @ step, step @ z
    return z / norm.sqrt()


def whitening(x, groups, shuffle, eps=EPS, through_covariance=False):
    x, width = x.double(), x.shape[1] // groups
    columns = [None] * x.shape[1]
    for first in range(0, x.shape[1], width):
        members = shuffle[first : first + width].tolist()
        centered = x[:, members] - x[:, members].mean(0)
        covariance = centered.T @ centered / len(x) + eps * torch.eye(width, dtype=x.dtype)
        if not through_covariance:
            covariance = covariance.detach()
        whitened = centered @ inverse_root(covariance)
        for column, member in zip(whitened.unbind(1), members, strict=True):
            columns[member] = column
    return torch.stack(columns, 1)


def whitenedcse(
    embeddings, shuffles, *, groups=2, temperature=0.05, eps=EPS, head=None, normalize=True, reduction="mean",
    through_covariance=False,
):  # fmt: skip
    n, views = embeddings.shape[:2]
    h = [whitening(embeddings[:, v], groups, shuffles[v], eps, through_covariance) for v in range(views)]
    h = [x if head is None else head(x) for x in h]
    h = [unit(x) if normalize else x for x in h]
    losses = [-sum((k @ h[0][i] / temperature).log_softmax(0)[i] for k in h[1:]) / (views - 1) for i in range(n)]
    return reduced(losses, [True] * n, (n,), reduction, embeddings)


def check(z, shuffles, *, groups=2, backend="auto", temperature=0.05, tolerance=1e-9, **options):
    z = z.detach().requires_grad_()
    module = learnable(WhitenedCSELoss, temperature, groups=groups, backend=backend, **options)
    value = call(module, z, shuffles)
    assert value.dtype == torch.promote_types(z.dtype, torch.float32)
    exact = z.detach().double().requires_grad_()
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = whitenedcse(exact, shuffles, groups=groups, temperature=log_temperature.exp(), **options)
    actual = differentiate(value, [z, module.log_temperature])
    assert_matches(actual, differentiate(expected, [exact, log_temperature]), tolerance)


@pytest.mark.parametrize("views, groups", ((2, 1), (3, 2), (4, 3), (3, 6)))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(views, groups, reduction, backend):
    check(batch(15, views, 6, 1)[0], permutations(views, 6), groups=groups, reduction=reduction, backend=backend)


@pytest.mark.parametrize("options", (
    {"temperature": 0.01}, {"temperature": 1.0}, {"eps": 0.1}, {"normalize": False, "temperature": 2.0},
))  # fmt: skip
def test_options(options, backend):
    check(batch(15, 3, 6, 1)[0], permutations(3, 6), backend=backend, **options)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)))
def test_dtypes(dtype, tolerance):
    check(batch(33, 3, 6, 1, dtype=dtype)[0], permutations(3, 6), temperature=0.1, tolerance=tolerance)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    z = batch(33, 3, 6, 1, dtype=torch.float32)[0].requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = call(WhitenedCSELoss(groups=2, temperature=0.1), z, permutations(3, 6))
    assert loss.dtype == torch.float32
    exact = z.detach().double().requires_grad_()
    expected = differentiate(whitenedcse(exact, permutations(3, 6), temperature=0.1), [exact])
    assert_matches(differentiate(loss, [z]), expected, 0.05)


def test_the_head_learns():
    torch.manual_seed(0)
    head, z = nn.Sequential(nn.Linear(6, 4), nn.Tanh()).double(), batch(15, 3, 6, 1)[0].requires_grad_()
    module = WhitenedCSELoss(groups=2, head=head)
    assert list(module.parameters()) == list(head.parameters())
    leaves = [z, *head.parameters()]
    actual = differentiate(call(module, z, permutations(3, 6)), leaves)
    assert_matches(actual, differentiate(whitenedcse(z, permutations(3, 6), head=head), leaves), 1e-9)


def test_equal_shuffles_of_one_pass_are_infonce():
    z, shuffle = batch(15, 0, 6, 1)[0], permutations(1, 6)
    ours = call(WhitenedCSELoss(groups=2), z[:, None].expand(-1, 3, -1), shuffle.expand(3, -1))
    h = whitening(z, 2, shuffle[0])
    torch.testing.assert_close(ours, infonce(h, h, temperature=0.05, symmetric=False))


def test_invariances():
    z, shuffles = batch(40, 3, 6, 1)[0], permutations(3, 6)
    loss_fn = WhitenedCSELoss(groups=2, eps=1e-12)
    loss = call(loss_fn, z, shuffles)
    torch.testing.assert_close(call(loss_fn, z[:, [0, 2, 1]], shuffles[[0, 2, 1]]), loss)
    torch.testing.assert_close(call(loss_fn, 7 * z + torch.arange(6.0), shuffles), loss)
    order = permutations(1, 6, seed=5)[0]  # of the channels, with them the groups' members
    torch.testing.assert_close(call(loss_fn, z[..., order], order.argsort()[shuffles]), loss)
    # Of the members of a group ZCA knows no order.
    within = (permutations(2, 3, seed=6) + torch.tensor([[0], [3]])).flatten()
    torch.testing.assert_close(call(loss_fn, z, shuffles[:, within]), loss)


def test_drawn_shuffles():
    z = batch(15, 3, 6, 1)[0]

    def drawn(seed):
        return call(WhitenedCSELoss(groups=2), z, generator=torch.Generator().manual_seed(seed))

    state = torch.random.get_rng_state()
    assert torch.equal(drawn(0), call(WhitenedCSELoss(groups=2), z, permutations(3, 6, seed=0)))
    assert not torch.equal(drawn(0), drawn(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(0)
    without = call(WhitenedCSELoss(groups=2), z)
    assert not torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(0)
    assert torch.equal(call(WhitenedCSELoss(groups=2), z), without)


@pytest.mark.parametrize("n", (0, 1))
def test_nothing_to_contrast_is_zero_with_a_graph(n):
    z = torch.ones(n, 3, 6, requires_grad=True)
    loss = call(WhitenedCSELoss(groups=2), z, permutations(3, 6))
    loss.backward()
    assert loss == 0 and z.grad is not None and (z.grad == 0).all()


def test_errors():
    z = batch(9, 3, 6, 1)[0]
    for options, message in (
        ({"groups": 0}, "groups: expected a positive integer, got 0"),
        ({"groups": True}, "groups: expected a positive integer, got True"),
        ({"eps": 0.0}, "eps: expected a positive number, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            WhitenedCSELoss(**options)
    for arguments, message in (
        ((z[:, 0],), r"embeddings: expected shape \[n, at least 2 views, d\], got \[9, 6\]"),
        ((z[:, :1],), r"embeddings: expected shape \[n, at least 2 views, d\], got \[9, 1, 6\]"),
        ((z.int(),), "embeddings: expected float64, .* got torch.int32"),
        ((z[..., :5],), r"groups: expected a divisor of 5 \(the channels\), got 2"),
        ((z, permutations(2, 6)), r"shuffles: expected 3 rows \(one per view\), got 2"),
        ((z, permutations(3, 5)), r"shuffles: expected shape \[rows, 6\], got \[3, 5\]"),
        ((z, permutations(3, 6).int()), r"shuffles\[0\]: expected int64, got torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            call(WhitenedCSELoss(groups=2), *arguments)


# ---- the whitening ----


def correlated(n, d, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return (torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 3).to(dtype)


@pytest.mark.parametrize(
    "n, d, groups", ((20, 6, 1), (20, 6, 2), (20, 6, 6), (4, 6, 1), (2, 6, 2), (1, 6, 2), (3, 8, 1))
)
def test_whitening(n, d, groups):
    # Also with fewer rows than channels of a group: singular covariances, whose zeros are equal eigenvalues.
    x, shuffle = correlated(n, d).requires_grad_(), permutations(1, d)[0]
    for through in (False, True):
        options = {"groups": groups, "shuffle": shuffle, "through_covariance": through}
        expected = differentiate(whitening(x, **options), [x])
        assert_matches(differentiate(shuffled_group_whitening(x, **options), [x]), expected, 1e-8)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.float16, 0.01)))
def test_groups_are_white(dtype, tolerance):
    x, shuffle = correlated(500, 6, dtype), permutations(1, 6)[0]
    white = shuffled_group_whitening(x, groups=2, shuffle=shuffle, eps=1e-12)
    assert white.dtype == dtype
    for members in shuffle.view(2, 3):
        rows = white[:, members].double()
        torch.testing.assert_close(rows.mean(0), torch.zeros(3).double(), atol=tolerance, rtol=0)
        torch.testing.assert_close(rows.T @ rows / 500, torch.eye(3).double(), atol=tolerance, rtol=0)
    # Zero-phase: of all whitenings the nearest to the data, so no channel changes its sign or place.
    assert ((x.double() - x.double().mean(0)) * white.double()).sum(0).min() > 0


def test_white_rows_stay_as_they_are_and_have_a_gradient():
    # All eigenvalues are equal: the eigenvectors have no derivative, the root has.
    x = torch.cat((torch.eye(4), -torch.eye(4))).double() * 2
    x.requires_grad_()
    eps = 1e-3
    options = {"groups": 1, "shuffle": torch.arange(4), "eps": eps, "through_covariance": True}
    white = shuffled_group_whitening(x, **options)
    torch.testing.assert_close(white, x / (1 + eps) ** 0.5)
    assert_matches(differentiate(white, [x]), differentiate(whitening(x, **options), [x]))
    assert torch.autograd.gradcheck(lambda x: shuffled_group_whitening(x, **options), (x,))


def test_second_derivative():
    x = correlated(7, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: shuffled_group_whitening(x, groups=2, shuffle=torch.arange(4), through_covariance=True),
        (x,),
        atol=1e-4,
    )


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("scale", (0.0, 1e-4, 1.0, 1e3))
def test_rows_on_a_line_are_finite(dtype, scale):
    # Rounding makes some of the zero eigenvalues negative, by more than eps for the largest scale.
    line = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None] * torch.linspace(1, 2, 8, dtype=torch.float64)
    x = (scale * line).to(dtype).requires_grad_()
    white = shuffled_group_whitening(x, groups=1, shuffle=torch.arange(8))
    white.sum().backward()
    assert white.isfinite().all() and x.grad.isfinite().all()
    if scale == 0:
        assert (white == 0).all()


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_a_bad_number_gives_nan_in_its_group_alone(bad):
    x, shuffle = correlated(20, 6), permutations(1, 6)[0]
    x[3, shuffle[1]] = bad
    white = shuffled_group_whitening(x, groups=2, shuffle=shuffle)
    assert white[:, shuffle[:3]].isnan().all() and white[:, shuffle[3:]].isfinite().all()


def test_whitening_draws_and_refuses():
    x = correlated(20, 6)
    drawn = shuffled_group_whitening(x, groups=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, shuffled_group_whitening(x, groups=2, shuffle=permutations(1, 6, seed=0)[0]))
    for arguments, message in (
        ((x[0], 2), r"x: expected shape \[rows, d\], got \[6\]"),
        ((x, 4), r"groups: expected a divisor of 6 \(the channels\), got 4"),
        ((x, 2.0), "groups: expected a positive integer, got 2.0"),
        ((x, 2, torch.arange(5)), r"shuffle: expected shape \[6\], got \[5\]"),
        ((x, 2, [0, 1]), "shuffle: expected a torch.Tensor, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            call(shuffled_group_whitening, *arguments)


@pytest.mark.parametrize("through_covariance", (False, True))
def test_the_covariance_in_the_backward(through_covariance):
    check(batch(15, 3, 6, 1)[0], permutations(3, 6), through_covariance=through_covariance)


def test_the_gradient_is_the_authors():
    x = torch.tensor([[1.0, 2], [3, 0], [0, 1], [2, 5]], dtype=torch.float64, requires_grad=True)
    for through, column in (
        (False, [0.67082, -0.22361, -0.22361, -0.22361]),
        (True, [0.62610, -0.08944, -0.35777, -0.17889]),
    ):
        y = shuffled_group_whitening(x, groups=1, shuffle=torch.arange(2), eps=1e-14, through_covariance=through)
        (grad,) = torch.autograd.grad(y[0, 0], x)
        torch.testing.assert_close(grad[:, 0], torch.tensor(column, dtype=torch.float64), rtol=0, atol=1e-5)

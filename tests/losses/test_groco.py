"""GroCoLoss against its definition, its figure and what it is invariant to."""

import pytest
import torch

from ccl_fast.losses import GroCoLoss
from tests.oracles.losses import assert_matches, batch, differentiate
from tests.oracles.sorting import groco
from tests.oracles.waves import waves

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def views(n=9, count=2, dtype=torch.float64, seed=0):
    return batch(n, count, 6, 1, seed, dtype)[0]


def check(z, *, tolerance=1e-10, **options):
    leaf, exact = z.clone().requires_grad_(), z.double().clone().requires_grad_()
    value = GroCoLoss(**options)(leaf)
    assert value.dtype == torch.promote_types(z.dtype, torch.float32)
    assert_matches(differentiate(value, [leaf]), differentiate(groco(exact, **options), [exact]), tolerance)


@pytest.mark.parametrize("count", (2, 3, 4))
@pytest.mark.parametrize("num_negatives", (1, 4, 10))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(count, num_negatives, reduction):
    check(views(count=count), num_negatives=num_negatives, reduction=reduction)


@pytest.mark.parametrize("n", (2, 3, 17))
@pytest.mark.parametrize("steepness, normalize", ((10.0, True), (0.5, False)))
def test_options(n, steepness, normalize):
    check(views(n, 3), num_negatives=4, steepness=steepness, normalize=normalize)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)))
def test_dtypes(dtype, tolerance):
    check(views(dtype=dtype), tolerance=tolerance)


def test_the_figure():
    first = waves(9, 4)
    z = torch.stack((first, first + 0.3 * waves(9, 4, 1.1, 0.2)), 1)
    torch.testing.assert_close(GroCoLoss(num_negatives=4)(z).item(), 0.263144, rtol=0, atol=5e-7)


def test_the_order_of_samples_and_of_views_makes_no_difference():
    z, order = views(count=3), torch.randperm(9)
    loss_fn = GroCoLoss(num_negatives=4, reduction="none")
    torch.testing.assert_close(loss_fn(z[order]), loss_fn(z)[order])
    torch.testing.assert_close(loss_fn(z.flip(1)), loss_fn(z).flip(1))


def test_hard_swaps_of_what_is_in_order_cost_nothing():
    z = torch.eye(6, dtype=torch.float64)[:, None].expand(6, 2, 6)
    loss_fn = GroCoLoss(num_negatives=1, steepness=1e9)
    assert 0 <= loss_fn(z) < 1e-8 and loss_fn(z[:, :1].roll(1, 0).expand(6, 2, 6)) < 1e-8
    assert loss_fn(torch.stack((z[:, 0], z[:, 0].roll(1, 0)), 1)) > 0.5


def test_what_a_row_is_compared_with_gets_no_gradient():
    first = views()[:, 0].requires_grad_()
    other = views()[:, 1].requires_grad_()
    z = torch.stack((first, other), 1)
    to_other = torch.autograd.grad(GroCoLoss(reduction="none")(z)[:, 0].sum(), other)[0]
    assert (to_other == 0).all()


@pytest.mark.parametrize("n", (0, 1))
def test_without_negatives_the_loss_is_zero(n):
    z = views(n, 3).requires_grad_()
    loss = GroCoLoss()(z)
    loss.backward()
    assert loss == 0 and (z.grad == 0).all()


def test_a_row_of_zeros_and_certain_swaps_leave_gradients_finite():
    z = views(dtype=torch.float32)
    z[0, 0] = 0
    z.requires_grad_()
    GroCoLoss(steepness=1e30)(z).backward()
    assert z.grad.isfinite().all()


def test_a_bad_number_gives_nan():
    z = views()
    z[3, 1, 2] = torch.nan
    assert GroCoLoss()(z).isnan()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    z = views(dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = GroCoLoss()(z)
    loss.backward()
    assert loss.dtype == torch.float32 and z.grad.dtype == torch.float32
    torch.testing.assert_close(loss.double(), groco(z.detach().double()), rtol=0.01, atol=0)


def test_a_second_derivative_raises():
    z = views().requires_grad_()
    gradient = torch.autograd.grad(GroCoLoss()(z), z, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.square().sum().backward()


def test_compiles_as_one_graph(compiler):
    fast = torch.compile(GroCoLoss(num_negatives=4), fullgraph=True, backend=compiler)
    # (Of float64 rows torch's own C++ does not compile.)
    leaf, plain = (views(dtype=torch.float32).requires_grad_() for _ in range(2))
    expected = differentiate(GroCoLoss(num_negatives=4)(plain), [plain])
    assert_matches(differentiate(fast(leaf), [leaf]), expected, 1e-5)


def test_errors():
    for z, message in (
        (torch.ones(4, 3), r"embeddings: expected shape \[n, views, d\] with two views at least, got \[4, 3\]"),
        (torch.ones(4, 1, 3), r"embeddings: expected shape \[n, views, d\] with two views at least, got \[4, 1, 3\]"),
        (torch.ones(4, 2, 3).long(), r"embeddings: expected float64.*int64"),
    ):
        with pytest.raises(ValueError, match=message):
            GroCoLoss()(z)
    for options, message in (
        ({"num_negatives": 0}, r"num_negatives: expected a positive integer, got 0"),
        ({"steepness": -1}, r"steepness: expected a positive number, got -1"),
        ({"temperature": 0.5}, r"temperature: expected 1.0, the only value that GroCoLoss can honour, got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            GroCoLoss(**options)

"""MLCLoss against its definition, and the projection under it."""

import math

import pytest
import torch

from benchmarks.harness.memory import forget_peak, status
from ccl_fast.losses import CodingRateLoss, MLCLoss
from ccl_fast.ops.transport import doubly_stochastic as projection
from tests.oracles.losses import assert_matches, batch, call, differentiate, learnable
from tests.oracles.matrices import mlc

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(n, views=2, d=4, h=3, dtype=torch.float64):
    z, c = batch(n, views, d, 0)[0], batch(n, views, h, 0, seed=1)[0]
    return [x.to(dtype).clone().requires_grad_() for x in (z, c)]


def check(z, c, tolerance=1e-9, temperature=0.1, **options):
    module = learnable(MLCLoss, temperature, **options)
    loss = module(z, heads=c)
    assert loss.dtype == torch.promote_types(z.dtype, torch.float32)
    actual = differentiate(loss, [z, c, *module.parameters()])
    exact = [x.detach().double().requires_grad_() for x in (z, c)]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    options.pop("backend", None)
    expected = mlc(*exact, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature]), tolerance)


@pytest.mark.parametrize("n, views", ((9, 2), (1, 1), (2, 1), (17, 3)))
@pytest.mark.parametrize("temperature", (0.02, 0.1, 2.0))
@pytest.mark.parametrize("normalize", (True, False))
@pytest.mark.parametrize("eps", (0.2, 1.0))
def test_the_definition(n, views, temperature, normalize, eps):
    z, c = inputs(n, views)
    if not normalize:
        c = (c / 2).detach().requires_grad_()
    check(z, c, temperature=temperature, normalize=normalize, eps=eps)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)))
@pytest.mark.parametrize("backend", ("auto", "blocked", "reference"))
def test_dtypes(dtype, tolerance, backend):
    check(*inputs(9, dtype=dtype), tolerance, backend=backend)


def test_in_blocks_of_columns(monkeypatch):
    monkeypatch.setattr(projection, "CPU_ELEMENTS", 80)
    check(*inputs(9))


def test_rows_and_columns_have_the_mass_one():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        c = batch(40, 1, 5, 0, dtype=dtype)[0][:, 0] * 2
        g = projection.columns(c, projection.doubly_stochastic(c), slice(None))
        torch.testing.assert_close(g.sum(0), torch.ones(40, dtype=dtype), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(g, g.T)
        torch.testing.assert_close(projection.times(c, projection.doubly_stochastic(c), c), g @ c)


def test_equal_heads_are_zero():
    z, c = inputs(9)
    assert MLCLoss()(z, heads=torch.ones_like(c)).item() == pytest.approx(0, abs=1e-10)


def test_orthogonal_heads_tell_all_rows_apart():
    z = batch(6, 1, 4, 0)[0][:, 0]
    loss = MLCLoss(0.005)(z, heads=torch.eye(6).double())
    expected = math.log(1 + 4 / 0.25) - torch.logdet(
        torch.eye(4) + 4 / (6 * 0.25) * torch.nn.functional.normalize(z).T @ torch.nn.functional.normalize(z)
    )
    torch.testing.assert_close(loss, expected)


def test_heads_of_clusters_give_the_coding_rate():
    z, ids = batch(9, 2, 4, 0)[0], torch.arange(9) % 3
    heads = torch.eye(3).double()[ids][:, None].expand(9, 2, 3)
    torch.testing.assert_close(MLCLoss(0.01)(z, heads=heads), CodingRateLoss()(z, ids))


def test_order_does_not_count():
    (z, c), order = inputs(9), torch.randperm(9)
    torch.testing.assert_close(MLCLoss()(z[order], heads=c[order]), MLCLoss()(z, heads=c))


def test_an_empty_batch_is_zero_with_a_graph():
    z, c = torch.zeros(0, 2, 4, requires_grad=True), torch.zeros(0, 2, 3, requires_grad=True)
    loss = MLCLoss()(z, heads=c)
    loss.backward()
    assert loss == 0 and z.grad is not None and c.grad is not None


def test_memory_is_linear():
    """Weighted for all columns the rows would take 288 MiB."""
    z, c = torch.randn(1536, 32, requires_grad=True), torch.randn(1536, 4, requires_grad=True)
    call(MLCLoss(), z[:64], heads=c[:64]).backward()
    before = forget_peak()
    call(MLCLoss(), z, heads=c).backward()
    assert status("VmHWM") - before < 64 * 2**20


def test_errors():
    z, c = torch.zeros(4, 3), torch.zeros(4, 2)
    for arguments, message in (
        ((z, c[:3]), r"heads: expected shape \[4, h\], got \[3, 2\]"),
        ((z, c.double()), "heads: expected dtype torch.float32"),
        ((z, c.long()), "heads: expected float64, float32"),
        ((z[0], c), r"embeddings: expected shape \[n, d\] or \[n, views, d\], got \[3\]"),
        ((z, None), "heads: expected a torch.Tensor, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            MLCLoss()(arguments[0], heads=arguments[1])
    with pytest.raises(ValueError, match="eps: expected a positive number, got 0"):
        MLCLoss(eps=0)

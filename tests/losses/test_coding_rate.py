"""CodingRateLoss against its definition."""

import math

import pytest
import torch
import torch.distributed as dist

from benchmarks.harness.memory import forget_peak, status
from ccl_fast.losses import CodingRateLoss
from tests.oracles.losses import assert_matches, batch, differentiate
from tests.oracles.matrices import coding_rate as definition
from tests.oracles.waves import waves
from tests.processes import run

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([0, 7, -1, 0, 7, 3, 0, -1, 3])


@pytest.mark.parametrize("views", (1, 2, 5, None))
@pytest.mark.parametrize("ids", (IDS, IDS.clamp(min=0), torch.full((9,), -1), torch.arange(9), None))
@pytest.mark.parametrize("eps", (0.1, 0.5, 3.0))
@pytest.mark.parametrize("normalize", (True, False))
def test_the_definition(views, ids, eps, normalize):
    z = batch(9, views or 1, 4, 0)[0]
    z = (z[:, 0] if views is None else z).clone().requires_grad_()
    if views is None and ids is None:
        return
    actual = differentiate(CodingRateLoss(eps=eps, normalize=normalize)(z, ids), [z])
    expected = definition(z, ids, eps=eps, normalize=normalize)
    assert_matches(actual, differentiate(expected, [z]), 1e-9)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    z = batch(9, 2, 4, 0, dtype=dtype)[0].clone().requires_grad_()
    loss = CodingRateLoss()(z, IDS)
    assert loss.dtype == torch.float32
    exact = z.detach().double().requires_grad_()
    assert_matches(differentiate(loss, [z]), differentiate(definition(exact, IDS), [exact]), tolerance)


def test_the_authors_figures():
    z, ids = torch.nn.functional.normalize(waves(8, 4)), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    whole = CodingRateLoss()(z, torch.arange(8))  # a single row of unit length: log(1 + d / eps^2)
    assert math.log(1 + 4 / 0.25) - whole.item() == pytest.approx(6.345095, abs=1e-6)
    assert CodingRateLoss()(z, ids).item() == pytest.approx(4.896936 - 6.345095, abs=1e-6)


def test_one_cluster_is_zero_and_clusters_never_cost():
    z = batch(9, 2, 4, 0)[0]
    assert CodingRateLoss()(z, torch.zeros(9).long()).item() == pytest.approx(0, abs=1e-12)
    assert CodingRateLoss()(z, IDS) < 0


def test_names_and_order_do_not_count():
    z, order = batch(9, 2, 4, 0)[0], torch.randperm(9)
    expected = CodingRateLoss()(z, IDS)
    torch.testing.assert_close(CodingRateLoss()(z[order], torch.where(IDS < 0, -1, IDS + 5)[order]), expected)
    rotation = torch.linalg.qr(torch.randn(4, 4).double()).Q
    torch.testing.assert_close(CodingRateLoss()(z @ rotation, IDS.int()), expected)


def test_orthogonal_subspaces_are_best():
    def loss(x):
        return CodingRateLoss()(x, torch.arange(40) % 2).item()

    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    half = torch.where((torch.arange(40) % 2 == 0)[:, None], torch.tensor([1.0, 1, 0, 0]), torch.tensor([0, 0, 1.0, 1]))
    assert loss(x * half) < loss(x * (half + 0.3)) < loss(x)


def test_an_empty_batch_is_zero_with_a_graph():
    z = torch.zeros(0, 2, 4, requires_grad=True)
    loss = CodingRateLoss()(z, torch.zeros(0).long())
    loss.backward()
    assert loss == 0 and z.grad is not None


def test_nan_is_told():
    z = batch(9, 2, 4, 0)[0].clone()
    z[4, 1, 2] = torch.nan
    assert CodingRateLoss()(z, IDS).isnan()


def of_process(z, ids, sizes):
    start = sum(sizes[: dist.get_rank()])
    part = slice(start, start + sizes[dist.get_rank()])
    own = z[part].clone().requires_grad_()
    loss = CodingRateLoss(process_group="world")(own, None if ids is None else ids[part])
    loss.backward()
    return loss.detach(), own.grad


@pytest.mark.xdist_group("test_family_distributed")
@pytest.mark.parametrize("ids", (IDS, IDS.clamp(min=0), None), ids=("some", "all", "none"))
def test_several_processes_have_the_loss_of_all_rows(ids):
    z = batch(9, 2, 4, 0)[0].clone().requires_grad_()
    expected = CodingRateLoss()(z, ids)
    (gradient,) = torch.autograd.grad(expected, z)
    for sizes in ((4, 5), (0, 2, 7)):
        results = run(of_process, len(sizes), z.detach(), ids, sizes)
        for value, _ in results:
            torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(torch.cat([part for _, part in results]) / len(sizes), gradient)


def test_memory_is_linear():
    """A matrix of the rows' similarities would take 16 GiB."""
    z = torch.randn(65_536, 32, requires_grad=True)
    before = forget_peak()
    CodingRateLoss()(z, torch.arange(65_536) % 10).backward()
    assert status("VmHWM") - before < 64 * 2**20 + 10 * z.numel() * 4


def test_autocast_rounds_the_rows_alone():
    """Sizes and rates are not rounded, whose difference is small."""
    z, ids = torch.randn(1501, 8, generator=torch.Generator().manual_seed(0)), torch.arange(1501) % 5
    rounded = torch.nn.functional.normalize(z, dim=1).bfloat16().double()
    with torch.autocast("cpu", torch.bfloat16):
        loss = CodingRateLoss()(z, ids)
    torch.testing.assert_close(loss.double(), CodingRateLoss(normalize=False)(rounded, ids), rtol=1e-3, atol=0)


def test_errors():
    for eps in (0, -1, math.inf, "a"):
        with pytest.raises(ValueError, match="eps: expected a positive number, got"):
            CodingRateLoss(eps=eps)
    with pytest.raises(ValueError, match=r"cluster_ids: expected integers \[n\] with embeddings \[n, d\], got None"):
        CodingRateLoss()(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="cluster_ids: expected a tensor with values"):
        CodingRateLoss()(torch.zeros(4, 3, device="meta"), torch.zeros(4, device="meta").long())

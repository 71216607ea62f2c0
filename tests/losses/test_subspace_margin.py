"""SubspaceMarginLoss against its dense form and the authors' figure; slices that follow their clusters."""

import pytest
import torch

from ccl_fast.clustering import align_clusters
from ccl_fast.losses import SubspaceMarginLoss
from tests.oracles.lists import subspace_margin
from tests.oracles.losses import assert_matches, batch, differentiate
from tests.oracles.waves import waves

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
LABELS = torch.tensor([0, 2, -1, 0, 1, 2, 0, -1, 2, 1, 1, 0, 0])
CLUSTERS = torch.tensor([0, 1, 1, 0, 2, 1, 0, 0, -1, 2, 0, 1, 0])


def rows(n=13, dtype=torch.float64):
    return batch(n, 0, 6, 1, dtype=dtype)[0]


def check(z, *, clusters=None, tolerance=1e-10, **options):
    n = len(z)
    leaf, exact = z.clone().requires_grad_(), z.double().clone().requires_grad_()
    clusters = None if clusters is None else clusters[:n]
    value = SubspaceMarginLoss(**options)(leaf, LABELS[:n], clusters)
    assert value.dtype == torch.promote_types(z.dtype, torch.float32)
    expected = subspace_margin(exact, LABELS[:n], clusters, **options)
    assert_matches(differentiate(value, [leaf]), differentiate(expected, [exact]), tolerance)


@pytest.mark.parametrize("n", (0, 1, 2, 13))
@pytest.mark.parametrize("num_slices", (1, 3))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(n, num_slices, reduction):
    check(rows(n), clusters=CLUSTERS if num_slices > 1 else None, num_slices=num_slices, reduction=reduction)


@pytest.mark.parametrize("boundary, margin, least_distance", ((1.0, 0.5, 0.0), (1.5, 0.0, 1.3), (0.3, 0.2, 2.0)))
def test_options(boundary, margin, least_distance):
    check(rows(), boundary=boundary, margin=margin, least_distance=least_distance)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)))
def test_dtypes(dtype, tolerance):
    check(rows(dtype=dtype), tolerance=tolerance)


def test_it_is_the_authors():
    loss = SubspaceMarginLoss()(waves(8, 4).float(), torch.arange(8) // 2)
    torch.testing.assert_close(loss.item(), 1.119533, rtol=0, atol=1e-6)


def test_slices_are_losses_of_their_clusters():
    z, options = rows(), {"reduction": "sum"}
    whole = SubspaceMarginLoss(num_slices=3, **options)(z, LABELS, CLUSTERS)
    parts = [
        SubspaceMarginLoss(**options)(z[c == CLUSTERS, 2 * c : 2 * c + 2], LABELS[c == CLUSTERS]) for c in range(3)
    ]
    torch.testing.assert_close(whole, sum(parts))


def test_slices_follow_their_clusters():
    last, again = CLUSTERS.clamp(min=0), (CLUSTERS.clamp(min=0) + 1) % 3  # the same, renamed
    renamed = align_clusters(again, last, 3)[again]
    losses = [SubspaceMarginLoss(num_slices=3)(rows(), LABELS, ids) for ids in (last, renamed, again)]
    assert losses[0] == losses[1] != losses[2]


def test_equal_rows_have_a_finite_gradient():
    z = torch.ones(6, 4, requires_grad=True)
    SubspaceMarginLoss(boundary=0.0, margin=0.5)(z, torch.arange(6) // 2).backward()
    assert z.grad.isfinite().all()


def test_without_a_least_distance_equal_rows_of_other_labels_are_negatives():
    """Their products may round to more than 1."""
    scales, labels = torch.linspace(1, 3, 6)[:, None], torch.arange(6) // 2
    for seed in range(20):
        z = scales * torch.randn(33, generator=torch.Generator().manual_seed(seed))
        losses = SubspaceMarginLoss(least_distance=0.0, reduction="none")(z, labels)
        torch.testing.assert_close(losses, torch.full((6,), 1.4), rtol=0, atol=2e-3)


def test_errors():
    z = torch.ones(13, 6)
    for options, arguments, error, message in (
        ({"num_slices": 4}, (z, LABELS, CLUSTERS), ValueError, r"embeddings: expected a multiple of 4 columns, got 6"),
        ({"num_slices": 2}, (z, LABELS), ValueError, r"cluster_ids: expected integers \[n\] with 2 slices, got None"),
        ({"num_slices": 2}, (z, LABELS, CLUSTERS), IndexError, r"cluster_ids: expected ids from -1 to 1 \(there are 2"),
        ({}, (z, LABELS[:3]), ValueError, r"labels: expected shape \[13\], got \[3\]"),
    ):
        with pytest.raises(error, match=message):
            SubspaceMarginLoss(**options)(*arguments)
    for name in ("boundary", "margin", "least_distance"):
        with pytest.raises(ValueError, match=rf"{name}: expected a number >= 0, got -1"):
            SubspaceMarginLoss(**{name: -1})

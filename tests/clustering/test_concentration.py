"""PCL's concentration, against its formula."""

import math

import pytest
import torch
from torch.nn import functional as F

from ccl_fast.clustering import concentration
from ccl_fast.losses import ProtoNCELoss


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_formula(metric, dtype):
    x, ids, centers = torch.randn(200, 5).to(dtype), torch.randint(12, (200,)), torch.randn(12, 5).to(dtype)
    ids[ids == 3] = 4  # cluster 3 is empty
    rows, means = x.double(), centers.double()
    if metric == "cosine":
        rows, means = F.normalize(rows, dim=1), F.normalize(means, dim=1)
    phi = []
    for k in range(12):
        members = rows[ids == k]
        n = len(members)
        phi.append((members - means[k]).norm(dim=1).sum() / (n * math.log(n + 10)) if n > 1 else torch.tensor(0.0))
    phi[3] = max(phi)
    phi = torch.stack(phi).double()
    phi = phi.clamp(phi.quantile(0.1), phi.quantile(0.9))
    ours = concentration(x, ids, centers, metric=metric)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(ours.double(), phi, rtol=1e-5, atol=0)
    assert concentration(x, ids, centers, metric=metric, mean=0.2).mean() == pytest.approx(0.2)


def test_looser_clusters_have_larger_ones():
    spread = torch.tensor([0.1, 1.0, 3.0]).repeat_interleave(100)
    ids = torch.arange(3).repeat_interleave(100)
    x = spread[:, None] * torch.randn(300, 4)
    phi = concentration(x, ids, torch.zeros(3, 4), metric="euclidean")
    assert phi[0] < phi[1] < phi[2]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("mean, expected", [(0.2, 0.2), (None, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_collapsed_features_have_equal_ones_which_a_loss_takes(metric, mean, expected, dtype):
    """All rows on their centres: the mean of distances is 0."""
    centers = torch.eye(4, dtype=dtype)
    ids = torch.arange(12) % 4
    phi = concentration(centers[ids], ids, centers, metric=metric, mean=mean)
    assert phi.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(phi, torch.full_like(phi, expected))
    of_loss = ProtoNCELoss()(torch.randn(12, 2, 4), [ids], [centers.float()], center_temperature=[phi.float()])
    assert of_loss.isfinite()


@pytest.mark.parametrize("collapsed", [1, 5, 9])
def test_a_collapsed_cluster_has_the_smallest_of_those_with_a_spread(collapsed):
    """However many they are: the percentiles that clip may be 0."""
    ids, centers = torch.arange(40) % 10, torch.zeros(10, 3)
    spread = torch.arange(10) >= collapsed
    x = torch.eye(3)[ids % 3] * (spread * (1.0 + torch.arange(10)))[ids, None]
    phi = concentration(x, ids, centers, metric="euclidean")
    assert (phi > 0).all() and (phi[~spread] == phi.min()).all() and phi.min() <= phi[spread].min()
    assert phi.min() >= (1.0 + collapsed) / math.log(14) - 1e-5
    assert concentration(x, ids, centers, metric="euclidean", mean=0.1).mean() == pytest.approx(0.1)


def test_wrong_arguments():
    x, centers = torch.randn(4, 2), torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"^cluster_ids: expected a cluster of at least two rows, got 4 rows in 4"):
        concentration(x, torch.arange(4), centers)
    with pytest.raises(ValueError, match=r"^smoothing: expected a number >= 1, got 0"):
        concentration(x, torch.zeros(4, dtype=torch.int64), centers, smoothing=0)
    good = {"x": x, "cluster_ids": torch.zeros(4, dtype=torch.int64), "centers": centers}
    for name, value in (
        ("x", x.long()),
        ("x", x * torch.nan),
        ("x", x[0]),
        ("cluster_ids", torch.zeros(4)),
        ("cluster_ids", torch.tensor([0, 1])),
        ("cluster_ids", torch.tensor([0, 0, 0, 4])),
        ("centers", centers[:, :1]),
        ("metric", "foo"),
        ("mean", -1.0),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            concentration(**good | {name: value})

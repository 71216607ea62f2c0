"""Torch's default device and dtype are the user's: what is drawn, counted or listed inside does not depend on them."""

import pytest
import torch

from ccl_fast import metrics, ood
from ccl_fast.clustering import OnlineClusters
from ccl_fast.losses import SVDView, extrapolate_positives, influence_matrix, shuffled_group_whitening
from ccl_fast.training.prototypes import Prototypes

X = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(200) % 4
GRAPH = (torch.arange(30)[:, None] - torch.arange(30)).abs().eq(1).float()


def seeded():
    return torch.Generator().manual_seed(0)


CALLS = {
    "ensemble": lambda: ood.Ensemble([ood.NearestNeighbor(), ood.CosineNorm()]).fit_features(X).predict_features(X),
    "mahalanobis": lambda: ood.Mahalanobis().fit_features(X, LABELS).predict_features(X),
    "linear separation": lambda: ood.LinearSeparation(posterior=0.5).fit_features(X).predict_features(X),
    "quality": lambda: torch.full((), metrics.cluster_quality(LABELS, LABELS)["accuracy"], device="cpu").float(),
    "online clusters": lambda: OnlineClusters(X, LABELS).centers,
    "prototypes": lambda: Prototypes([3], 6, seed=0, device=torch.device("cpu"))[0].detach(),
    "whitening": lambda: shuffled_group_whitening(X, groups=2, generator=seeded()),
    "positives": lambda: extrapolate_positives(X, X.flip(0), generator=seeded())[0],
    "influence": lambda: influence_matrix(GRAPH.to_sparse()).to_dense(),
    "singular values": lambda: SVDView(GRAPH, rank=3).s,
}


@pytest.mark.parametrize("what", ["meta", torch.float64], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_the_same_under_another_default(name, what):
    torch.manual_seed(0)
    expected = CALLS[name]()
    torch.manual_seed(0)
    if what == "meta":
        with torch.device("meta"):
            found = CALLS[name]()
    else:
        torch.set_default_dtype(what)
        try:
            found = CALLS[name]()
        finally:
            torch.set_default_dtype(torch.float32)
    assert found.device == expected.device and found.dtype == expected.dtype and torch.equal(found, expected)

"""LSA on scikit-learn's digits: outliers among unlabelled rows, few and many, beside the seed that it starts from.

The inliers are five digits, the outliers rows of the other five; which, the seed says. Features are those that contrast
of two views learns from all these rows, of which nobody says which is which.
"""

import torch
from torch import Tensor

from benchmarks.worked._digits import digits, network, two_views
from ccl_fast.losses import InfoNCELoss
from ccl_fast.ood import LinearSeparation, NearestNeighbor, auroc
from ccl_fast.ood.folds import scores_of_unseen

INLIER_DIGITS, OUTLIERS, NEIGHBOR, FOLDS = 5, {"few": 50, "many": 150}, 5, 5
EPOCHS, BATCH = 100, 256


def run(seed: int) -> dict[str, float]:
    figures = {}
    for name, number in OUTLIERS.items():
        images, is_outlier = rows(seed, number)
        x = contrastive_features(images, seed)
        alone = scores_of_unseen(NearestNeighbor(k=NEIGHBOR), x, None, FOLDS, seed)
        separation = LinearSeparation(seed=NearestNeighbor(k=NEIGHBOR), folds=FOLDS, random_state=seed).fit_features(x)
        figures[f"auroc_nearest_neighbor_{name}"] = auroc(alone, is_outlier)
        figures[f"auroc_linear_separation_{name}"] = auroc(separation.predict_features(x), is_outlier)
        figures[f"trusted_{name}"] = separation.trusted
    return figures


def rows(seed: int, outliers: int) -> tuple[Tensor, Tensor]:
    """All rows of some digits and some of the others, and which are these."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    inside = torch.isin(labels, torch.randperm(10, generator=generator)[:INLIER_DIGITS])
    inliers, others = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
    others = others[torch.randperm(len(others), generator=generator)[:outliers]]
    chosen = torch.cat((inliers, others))
    return images[chosen], torch.arange(len(chosen)) >= len(inliers)


def contrastive_features(images: Tensor, seed: int) -> Tensor:
    torch.manual_seed(seed)
    model, loss_fn = network(32), InfoNCELoss(temperature=0.2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            loss_fn(two_views(model, images[batch])).backward()
            optimizer.step()
    with torch.no_grad():
        return model(images)

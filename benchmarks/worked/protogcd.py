"""ProtoGCD on scikit-learn's digits: 0 to 4 have labels, half of their images at least, and 5 to 9 have none.

After contrast of views, with and without labels, prototypes begin at the labelled classes' means and at the clusters
that are left, and are trained with the network. Accuracy is that of all unlabelled images, of the labelled digits
("old") and of the others ("new"), clusters being matched with digits once for all; beside it k-means of the pixels, and
of the features at the point where prototypes begin.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.worked._digits import digits, network, two_views
from ccl_fast.clustering import KMeans
from ccl_fast.losses import InfoNCELoss, ProtoGCDLoss, SupConLoss
from ccl_fast.ops import kmeans_assign

OLD, DIGITS, DIMENSION = 5, 10, 32
WARM_UP, EPOCHS, BATCH = 60, 60, 256
SUPERVISED = 0.35


def run(seed: int) -> dict[str, float]:
    images, truth = digits()
    generator = torch.Generator().manual_seed(seed)
    is_labelled = (truth < OLD) & (torch.rand(len(truth), generator=generator) < 0.5)
    labels, unlabelled = torch.where(is_labelled, truth, -1), ~is_labelled

    torch.manual_seed(seed)
    model = network(DIMENSION)
    train(model, None, images, labels, WARM_UP)
    features = embed(model, images)
    found = {
        "k_means_of_pixels": KMeans(DIGITS, n_init=5, random_state=seed).fit_predict(images[unlabelled]),
        "k_means_of_features": spherical(features[unlabelled], seed).labels_,
    }
    prototypes = nn.Parameter(first_prototypes(features, labels, seed))
    train(model, prototypes, images, labels, EPOCHS)
    ids = kmeans_assign(embed(model, images), nn.functional.normalize(prototypes.detach()), metric="cosine")[0]
    found["protogcd"] = ids[unlabelled]
    return {
        f"accuracy_{kind}_{name}": value
        for name, clusters in found.items()
        for kind, value in accuracies(clusters, truth[unlabelled]).items()
    }


def train(model: nn.Module, prototypes: nn.Parameter | None, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Contrast without and with labels, and ProtoGCD if there are prototypes, weighted as its authors do."""
    parameters = [*model.parameters(), *([] if prototypes is None else [prototypes])]
    optimizer = torch.optim.Adam(parameters, 1e-3)
    contrast, with_labels, protogcd = InfoNCELoss(0.2), SupConLoss(0.2), ProtoGCDLoss(supervised_weight=SUPERVISED)
    for epoch in range(epochs):
        protogcd.hard_share = 0.2 + 0.8 * min(2 * epoch / epochs, 1.0)
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            z, y = two_views(model, images[batch]), labels[batch]
            loss = (1 - SUPERVISED) * contrast(z) + SUPERVISED * with_labels(z[y >= 0], y[y >= 0])
            if prototypes is not None:
                loss = loss + protogcd(z, prototypes, labels=y)
            loss.backward()
            optimizer.step()


def embed(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images)


def spherical(features: Tensor, seed: int) -> KMeans:
    return KMeans(DIGITS, metric="cosine", n_init=5, random_state=seed).fit(features)


def first_prototypes(features: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Mean directions of the labelled classes, then the centres of the clusters that are matched with none of them."""
    unit = nn.functional.normalize(features)
    old = torch.stack([nn.functional.normalize(unit[labels == c].mean(0), dim=0) for c in range(OLD)])
    centers = spherical(features[labels < 0], seed).cluster_centers_
    taken = linear_sum_assignment(old @ centers.T, maximize=True)[1]
    return torch.cat((old, centers[[c for c in range(DIGITS) if c not in taken]]))


def accuracies(clusters: Tensor, truth: Tensor) -> dict[str, float]:
    counts = torch.zeros(DIGITS, DIGITS).index_put_((clusters, truth), torch.ones(len(truth)), accumulate=True)
    of_cluster = torch.from_numpy(linear_sum_assignment(counts, maximize=True)[1])
    is_right = (of_cluster[clusters] == truth).double()
    parts = {"all": truth >= 0, "old": truth < OLD, "new": truth >= OLD}
    return {name: is_right[part].mean().item() for name, part in parts.items()}

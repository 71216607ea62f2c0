"""CCLLoss in a plain training loop: k-means before every epoch, then contrast on its clusters.

The data is the 5,000 digits that come with the extra "train": pip install "ccl-fast[train]"
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from ccl_fast import CCLLoss
from ccl_fast.clustering import KMeans
from ccl_fast.data import load_split
from ccl_fast.ood import NearestNeighbor, ood_metrics


def main(epochs: int = 10, warmup_epochs: int = 5, batch_size: int = 256) -> float:
    torch.manual_seed(0)
    digits = load_split("digits")  # six classes to train on, four held out
    images, test, unknown = (part[torch.arange(len(part))] for part in (digits.train, digits.test, digits.held_out))

    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    augment = v2.Compose([v2.RandomAffine(20, (0.1, 0.1), (0.9, 1.4), 10), v2.ColorJitter(0.2, 0.5)])
    loss_fn = CCLLoss(temperature=0.1, center_weight=1.0)
    loader = DataLoader(TensorDataset(torch.arange(len(images))), batch_size, shuffle=True, drop_last=True)

    cluster_ids = centers = None  # without them, the loss is SimCLR's
    for epoch in range(epochs):
        if epoch >= warmup_epochs:
            kmeans = KMeans(12, metric="cosine", init="k-means++" if centers is None else centers)
            cluster_ids, centers = kmeans.fit_predict(embed(model, images)), kmeans.cluster_centers_
        for (index,) in loader:
            views = torch.stack([augment(image) for image in images[index] for _ in range(2)])
            embeddings = model(views).unflatten(0, (len(index), 2))  # [n, views, d]
            loss = loss_fn(embeddings, None if cluster_ids is None else cluster_ids[index], centers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    detector = NearestNeighbor().fit_features(embed(model, images))
    scores = detector.predict_features(embed(model, torch.cat([test, unknown])))
    metrics = ood_metrics(scores, torch.arange(len(scores)) >= len(test))
    print(f"AUROC {metrics['auroc']:.3f}")
    return metrics["auroc"]


@torch.no_grad()
def embed(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    embeddings = model(images)
    model.train()
    return embeddings


if __name__ == "__main__":
    main()

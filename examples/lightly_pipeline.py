"""CCLLoss where lightly's NTXentLoss stood, in lightly's own pipeline: its transform, dataset and projection head.

pip install "ccl-fast[train]" lightly
"""

import torch
from lightly.data import LightlyDataset
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image

from ccl_fast import CCLLoss
from ccl_fast.clustering import KMeans
from ccl_fast.data import load_split
from ccl_fast.models import build_backbone
from ccl_fast.ood import NearestNeighbor, auroc


class PilImages(Dataset):
    """What LightlyDataset.from_torch_dataset wants: (PIL image, label), transformed by what it sets here."""

    transform = None

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.transform(to_pil_image(self.images[index]).convert("RGB")), 0


def main(epochs: int = 4, warmup_epochs: int = 2, limit: int | None = None) -> float:
    torch.manual_seed(0)
    digits = load_split("digits", limit=limit)
    images, test, unknown = (
        part[torch.arange(len(part))].expand(-1, 3, -1, -1) for part in (digits.train, digits.test, digits.held_out)
    )
    transform = SimCLRTransform(input_size=28, min_scale=0.5, hf_prob=0.0, gaussian_blur=0.0, normalize=None)
    dataset = LightlyDataset.from_torch_dataset(PilImages(images[:, :1]), transform=transform)
    index_of = {name: index for index, name in enumerate(dataset.get_filenames())}  # the batch has file names
    loader = DataLoader(dataset, batch_size=200, shuffle=True, drop_last=True)

    backbone, width = build_backbone("small", (3, 28, 28))
    model = nn.Sequential(backbone, SimCLRProjectionHead(width, width, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_fn = CCLLoss(temperature=0.1)  # before: NTXentLoss(temperature=0.1)

    cluster_ids = centers = None
    for epoch in range(epochs):
        if epoch >= warmup_epochs:
            kmeans = KMeans(12, metric="cosine", init="k-means++" if centers is None else centers)
            cluster_ids, centers = kmeans.fit_predict(embed(model, images)), kmeans.cluster_centers_
        for (first, second), _, names in loader:
            index = torch.tensor([index_of[name] for name in names])
            embeddings = torch.stack([model(first), model(second)], dim=1)
            # before: loss = loss_fn(model(first), model(second))
            loss = loss_fn(embeddings, None if cluster_ids is None else cluster_ids[index], centers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    detector = NearestNeighbor().fit_features(embed(model, images))
    scores = detector.predict_features(embed(model, torch.cat([test, unknown])))
    value = auroc(scores, torch.arange(len(scores)) >= len(test))
    print(f"AUROC {value:.3f}")
    return value


@torch.no_grad()
def embed(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    model.eval()
    embeddings = torch.cat([model(block) for block in images.split(1024)])
    model.train()
    return embeddings


if __name__ == "__main__":
    main()

"""CCLLoss in a Lightning module, which clusters at the start of every epoch after the warm-up.

pip install "ccl-fast[train]"
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ccl_fast import CCLLoss
from ccl_fast.clustering import KMeans
from ccl_fast.data import load_split
from ccl_fast.models import build_backbone
from ccl_fast.ood import NearestNeighbor, auroc


class TwoViews(Dataset):
    """(two views of an image, its index): the index leads to its cluster."""

    def __init__(self, images: torch.Tensor):
        self.images = images
        self.augment = v2.Compose([v2.RandomAffine(20, (0.1, 0.1), (0.9, 1.4), 10), v2.ColorJitter(0.2, 0.5)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.stack([self.augment(self.images[index]) for _ in range(2)]), index


class ClusterAwareContrast(LightningModule):
    def __init__(self, images: torch.Tensor, clusters: int = 12, warmup_epochs: int = 5):
        super().__init__()
        encoder, width = build_backbone("small", tuple(images.shape[1:]))
        self.model = nn.Sequential(encoder, nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))
        self.loss_fn = CCLLoss(temperature=0.1)
        self.images, self.clusters, self.warmup_epochs = images, clusters, warmup_epochs
        # Buffers are saved in checkpoints and follow the module to its device. All unassigned: the loss is SimCLR's.
        self.register_buffer("cluster_ids", torch.full((len(images),), -1))
        self.register_buffer("centers", torch.zeros(clusters, 64))

    @torch.no_grad()
    def embed(self, images: torch.Tensor) -> torch.Tensor:
        self.model.eval()
        embeddings = torch.cat([self.model(block.to(self.device)) for block in images.split(1024)])
        self.model.train()
        return embeddings

    def on_train_epoch_start(self) -> None:
        if self.current_epoch >= self.warmup_epochs:
            start = self.centers if (self.cluster_ids >= 0).any() else "k-means++"
            kmeans = KMeans(self.clusters, metric="cosine", init=start)
            self.cluster_ids.copy_(kmeans.fit_predict(self.embed(self.images)))
            self.centers.copy_(kmeans.cluster_centers_)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _) -> torch.Tensor:
        views, index = batch
        embeddings = self.model(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        clustered = self.current_epoch >= self.warmup_epochs
        loss = self.loss_fn(embeddings, self.cluster_ids[index], self.centers if clustered else None)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(epochs: int = 10, warmup_epochs: int = 5, accelerator: str = "auto") -> float:
    seed_everything(0)
    digits = load_split("digits")
    images, test, unknown = (part[torch.arange(len(part))] for part in (digits.train, digits.test, digits.held_out))
    module = ClusterAwareContrast(images, warmup_epochs=warmup_epochs)
    loader = DataLoader(TwoViews(images), batch_size=256, shuffle=True, drop_last=True)
    trainer = Trainer(max_epochs=epochs, accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False)
    trainer.fit(module, loader)

    detector = NearestNeighbor().fit_features(module.embed(images))
    scores = detector.predict_features(module.embed(torch.cat([test, unknown])))
    value = auroc(scores.cpu(), torch.arange(len(scores)) >= len(test))
    print(f"AUROC {value:.3f}")
    return value


if __name__ == "__main__":
    main()

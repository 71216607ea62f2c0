"""A data set that needs nothing."""

import torch


class Noise(torch.utils.data.Dataset):
    """n colour images of 8 x 8 pixels, and no labels."""

    def __init__(self, n: int, seed: int):
        self.images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]

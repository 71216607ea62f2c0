"""What the examples on scikit-learn's digits share: the images, random views of them, and a small network."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

SIDE = 8


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 images [n, 64], 0 to 1, and which digit each is."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float() / 16, torch.from_numpy(labels)


def view(x: Tensor) -> Tensor:
    """Images moved by up to a pixel, darker or brighter, with noise; from torch's generator."""
    n, places = len(x), torch.arange(SIDE)
    rows, columns = (torch.randint(3, (n, 1)) + places for _ in range(2))
    padded = nn.functional.pad(x.view(n, SIDE, SIDE), (1, 1, 1, 1))
    moved = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1)
    return moved * (0.7 + 0.6 * torch.rand(n, 1)) + 0.1 * torch.randn_like(moved)


def two_views(network: nn.Module, x: Tensor) -> Tensor:
    """Embeddings [n, 2, d]."""
    return network(torch.cat((view(x), view(x)))).unflatten(0, (2, len(x))).transpose(0, 1)


def network(dimension: int) -> nn.Module:
    return nn.Sequential(nn.Linear(SIDE**2, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, dimension))

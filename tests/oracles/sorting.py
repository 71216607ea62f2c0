"""The dense form of the loss that sorts: whole matrices of similarities, and of probabilities of every list."""

import torch
from torch import Tensor

from ccl_fast.ops.soft_rank_mass_reference import soft_rank_mass
from tests.oracles.losses import unit
from tests.oracles.matrices import over_rows


def groco(
    embeddings: Tensor,
    *,
    num_negatives: int = 10,
    steepness: float = 1.0,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    z = unit(embeddings) if normalize else embeddings
    n, views, _ = z.shape
    kept, losses = min(num_negatives, n - 1), []
    for view in range(views):
        own = z[:, view]
        x = (own @ own.detach().T).masked_fill(torch.eye(n, dtype=torch.bool, device=z.device), -torch.inf)
        negatives = x.topk(kept).values.flip(1)
        others = [w for w in range(views) if w != view]
        positives = (own[:, None] * z[:, others].detach()).sum(2).sort(1).values
        mass = soft_rank_mass(torch.cat((negatives, positives), 1), views - 1, steepness=steepness)
        is_positive = torch.arange(mass.shape[1], device=z.device) >= kept
        losses.append(-torch.where(is_positive, mass.log(), (1 - mass).log()).mean(1))
    of_rows = torch.stack(losses, 1)
    return of_rows if reduction == "none" else over_rows(of_rows.flatten(), reduction)

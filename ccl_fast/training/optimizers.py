"""The optimisers of ``train``, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from ccl_fast.errors import packages_of_training

OptimizerName = Literal["adamw", "sgd", "lars"]


def make_optimizer(
    name: OptimizerName,
    network: Iterable[nn.Parameter],
    prototypes: Iterable[nn.Parameter],
    *,
    weight_decay: float,
    momentum: float,
    exclude_bias_and_norm: bool,
    fused: bool,
) -> torch.optim.Optimizer:
    r"""Make an optimiser of the network's parameters and, as its last group, of the prototypes.

    With learning rate :math:`\eta`, gradient g and weights w, "sgd" is torch's and "lars" timm's:

    .. math::
        \text{sgd:} \quad v \leftarrow \mu v + (g + \beta w), \qquad
        \text{lars:} \quad v \leftarrow \mu v + 0.001 \frac{|w|}{|g| + \beta |w|} (g + \beta w); \qquad
        w \leftarrow w - \eta v

    Args:
        name: "adamw", "sgd" or "lars".
        network, prototypes: what is optimised; there may be no prototypes.
        weight_decay: :math:`\beta`, or AdamW's.
        momentum: :math:`\mu`; AdamW has betas of its own.
        exclude_bias_and_norm: give the network's vectors and scalars no weight decay and, of LARS, no factor of their
            own.
        fused: one kernel for a step; "lars" has none.

    Papers: Loshchilov, Hutter, "Decoupled weight decay regularization", 2019 (AdamW); You, Gitman, Ginsburg, "Large
    batch training of convolutional networks", arXiv:1708.03888, 2017 (LARS).

    Example:
        >>> layer = torch.nn.Linear(3, 2)
        >>> options = {"weight_decay": 0.1, "momentum": 0.9, "fused": False}
        >>> optimizer = make_optimizer("sgd", layer.parameters(), [], exclude_bias_and_norm=True, **options)
        >>> [(group["params"][0].shape, group["weight_decay"]) for group in optimizer.param_groups]
        [(torch.Size([2, 3]), 0.1), (torch.Size([2]), 0.0)]
    """
    decayed, excluded = list(network), []
    if exclude_bias_and_norm:  # as timm tells them: whatever is no matrix
        excluded = [parameter for parameter in decayed if parameter.ndim <= 1]
        decayed = [parameter for parameter in decayed if parameter.ndim > 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        # So timm's LARS has no factors here; to other optimisers the word means nothing.
        {"params": excluded, "weight_decay": 0.0, "always_adapt": False},
        {"params": list(prototypes)},
    ]
    groups = [group for group in groups if group["params"]]
    match name:
        case "adamw":
            return torch.optim.AdamW(groups, weight_decay=weight_decay, fused=fused or None)
        case "sgd":
            return torch.optim.SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=fused or None)
        case "lars":
            with packages_of_training():
                # With all of timm's models, so only where it is asked for; documented, if not marked as exported.
                from timm.optim import create_optimizer_v2  # pyright: ignore[reportPrivateImportUsage]

            # Without always_adapt it would be plain SGD where there is no weight decay.
            options: dict = {"momentum": momentum, "weight_decay": weight_decay, "always_adapt": True}
            return create_optimizer_v2(groups, "lars", **options)

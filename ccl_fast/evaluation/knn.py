"""How well features tell classes apart, without anything being trained on them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ccl_fast.ops import streaming_topk

# Test features that vote at a time: their votes are a row of all classes each.
BLOCK = 4096


@torch.no_grad()
def knn_accuracy(
    train: Tensor,
    train_classes: Tensor,
    test: Tensor,
    test_classes: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    r"""Return the share of test features whose class is the one that their nearest training features vote for.

    .. math::
        \hat c(x) = \arg\max_c \sum_{i \in N_k(x)} [c_i = c] \, e^{\cos(x, x_i) / \tau}

    Memory is linear: the matrix of cosines is never whole.

    Args:
        train, test: features ``[n, d]`` and ``[m, d]``; their lengths do not count.
        train_classes, test_classes: int ``[n]`` and ``[m]``, any numbers.
        k: neighbours that vote; all if there are fewer.
        temperature: how fast a vote loses weight with distance.

    Papers: Wu, Xiong, Yu, Lin, "Unsupervised feature learning via non-parametric instance discrimination", 2018; with
    these defaults, Caron et al., "Emerging properties in self-supervised vision transformers", 2021 (DINO).
    """
    names, numbers = torch.cat([train_classes, test_classes]).to(train.device).unique(return_inverse=True)
    of_train, of_test = numbers.split([len(train), len(test)])
    bank, right = normalize(train), 0
    for queries, truth in zip(test.split(BLOCK), of_test.split(BLOCK), strict=True):
        cosines, nearest = streaming_topk(normalize(queries), bank, topk=min(k, len(bank)))
        votes = cosines.new_zeros(len(queries), len(names))
        votes.scatter_add_(1, of_train[nearest], ((cosines - 1) / temperature).exp())
        right += int((votes.argmax(1) == truth).sum())
    return right / len(test)

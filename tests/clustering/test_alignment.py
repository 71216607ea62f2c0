"""Alignment of cluster ids, against every permutation."""

import itertools

import pytest
import torch

from ccl_fast.clustering import align_clusters


@pytest.mark.parametrize("seed", range(10))
def test_agrees_best_of_all_permutations(seed):
    generator = torch.Generator().manual_seed(seed)
    ids, reference = torch.randint(5, (2, 40), generator=generator)
    names = align_clusters(ids, reference, 5)
    assert sorted(names.tolist()) == list(range(5))
    best = max((torch.tensor(p)[ids] == reference).sum() for p in itertools.permutations(range(5)))
    assert (names[ids] == reference).sum() == best


def test_finds_a_renaming_and_orders_centers():
    reference = torch.arange(100) % 7
    renaming = torch.randperm(7)
    names = align_clusters(renaming[reference], reference, 7)
    assert names[renaming].equal(torch.arange(7))
    centers = torch.arange(7.0)[:, None]  # of clusters as they were named before
    assert centers[names.argsort()][names[3]] == centers[3]


def test_different_numbers_of_clusters():
    assert align_clusters(torch.tensor([0, 0, 1]), torch.tensor([2, 2, 0]), 3)[:2].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("ids", "reference", "message"),
    [
        (torch.tensor([0, 3]), torch.tensor([0, 1]), r"^cluster_ids: expected ids in \[0, 3\), got 0 to 3"),
        (torch.tensor([0, 1]), torch.tensor([-1, 1]), r"^reference_ids: expected ids in \[0, 3\), got -1 to 1"),
        (torch.tensor([0, 1]), torch.tensor([1]), r"^reference_ids: expected shape \[2\], got \[1\]"),
        (torch.tensor([0.0]), torch.tensor([1]), r"^cluster_ids: expected int32 or int64"),
    ],
)
def test_wrong_arguments(ids, reference, message):
    with pytest.raises(ValueError, match=message):
        align_clusters(ids, reference, 3)

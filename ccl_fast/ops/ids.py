"""Relabelling of cluster ids, and their range."""

import torch
from torch import Tensor

from ccl_fast.checks import assert_on_device, host_knows


def check_ids_below(name: str, ids: Tensor, number: int, limit: str) -> None:
    """Check that ids are less than a number, called the limit: an IndexError, on a GPU an assertion on the device."""
    if not host_knows(ids):
        assert_on_device((ids < number).all(), f"{name}: expected ids below {limit}={number}")
    elif ids.numel() and ids.max() >= number:
        raise IndexError(f"{name}: expected ids below {limit}={number}, got up to {ids.max():d}")


def consecutive_ids(ids: Tensor) -> Tensor:
    """Relabel ids to 0, 1, ... in their order, int64 [n]; unlike torch.unique without a host copy."""
    ordered, order = ids.sort()
    rank = torch.zeros(ids.shape, dtype=torch.int64, device=ids.device)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(rank).scatter_(0, order, rank)


def place_of_first(ids: Tensor, out_int32: bool = False) -> Tensor:
    """Numbers of 0 to n - 1, int64 [n], equal where ids are: the place of the first of an id among all in order."""
    return torch.searchsorted(ids.sort().values, ids.contiguous(), out_int32=out_int32)


def groups_of(ids: Tensor, k_ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Numbers from 0 below n + m, int32, that are equal where the ids are: a step sorts its ids once, for all uses."""
    if k_ids is None:
        return place_of_first(ids, out_int32=True), None
    of_rows, of_keys = place_of_first(torch.cat((ids, k_ids)), out_int32=True).split((ids.shape[0], k_ids.shape[0]))
    return of_rows, of_keys


def int32_ids(q_ids: Tensor | None, k_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Numbers of 32 bits that are equal where the ids are, for a kernel compares these with fewer registers."""
    if q_ids is None or (q_ids.dtype == torch.int32 and (k_ids is None or k_ids.dtype == torch.int32)):
        return q_ids, k_ids
    return groups_of(q_ids, k_ids)


def same_group_count(group: Tensor, of: Tensor | None = None) -> Tensor:
    """How many others are in the group of each, int32 [n]; or how many of the rows ``of``. They are of `groups_of`."""
    counted, n = group if of is None else of, group.shape[0] + (0 if of is None else of.shape[0])
    number = group.new_zeros(n).index_add_(0, counted, torch.ones_like(counted))[group]
    return number - 1 if of is None else number


def groups_of_single_positives(
    group: Tensor, k_group: Tensor | None, single: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Numbers of rows, and of keys, that are equal for a row that is ``single`` and its positive alone.

    Given those of `groups_of`. None where no row is single.
    """
    if single is None:
        return None, None
    n = group.shape[0]
    first = n if k_group is None else n + k_group.shape[0]
    own = torch.arange(first, first + n, dtype=group.dtype, device=group.device)
    return torch.where(single, group, own), k_group


def separate_unassigned(ids: Tensor, first: int = 0) -> Tensor:
    """Give each sample whose id is below 0 one of its own, below 0 too; ``first`` is the number of the first sample."""
    if host_knows(ids) and ids.shape[0] and ids.min().item() >= 0:
        return ids
    return torch.where(ids < 0, -1 - torch.arange(first, first + ids.shape[0], device=ids.device), ids)


def joint_ids(*ids: Tensor) -> Tensor:
    """Ids, int64 [n], that are equal where all of the given ones are."""
    joint = consecutive_ids(ids[0])
    for further in ids[1:]:
        joint = consecutive_ids(joint * joint.shape[0] + consecutive_ids(further))
    return joint

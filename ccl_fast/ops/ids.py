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


def int32_ids(q_ids: Tensor | None, k_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Numbers of 32 bits that are equal where the ids are, for a kernel compares these with fewer registers."""
    if q_ids is None or (q_ids.dtype == torch.int32 and (k_ids is None or k_ids.dtype == torch.int32)):
        return q_ids, k_ids
    ids = q_ids if k_ids is None else torch.cat((q_ids, k_ids))
    numbers = place_of_first(ids, out_int32=True)
    if k_ids is None:
        return numbers, None
    of_q, of_k = numbers.split((q_ids.shape[0], k_ids.shape[0]))
    return of_q, of_k


def same_id_count(ids: Tensor, of: Tensor | None = None) -> Tensor:
    """How many others have the id of each, int64 [n]; or how many ``of`` further ids are equal to it."""
    group = place_of_first(ids if of is None else torch.cat((ids, of)))
    counted = group if of is None else group[ids.shape[0] :]
    number = torch.zeros_like(group).index_add_(0, counted, torch.ones_like(counted))[group[: ids.shape[0]]]
    return number - 1 if of is None else number


def ids_of_single_positives(
    ids: Tensor, k_ids: Tensor | None, single: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Ids of rows, and of keys if those have ids, that are equal for a row that is ``single`` and its positive alone.

    None where no row is single.
    """
    if single is None:
        return None, None
    n = ids.shape[0]
    group = place_of_first(ids if k_ids is None else torch.cat((ids, k_ids)))
    own = torch.arange(group.shape[0], group.shape[0] + n, device=ids.device)
    return torch.where(single, group[:n], own), None if k_ids is None else group[n:]


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

"""What losses are given: embeddings with their views, queries and keys, ids, and checks of them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ccl_fast.checks import (
    assert_on_device,
    check_floating,
    check_matrix,
    check_same,
    check_tensor,
    check_vector,
    checked_temperature,
    host_knows,
    is_integer,
    shown,
    whole_numbers,
)
from ccl_fast.distributed import Exchange
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.ids import consecutive_ids, separate_unassigned


class Batch(NamedTuple):
    """One row per view. Rows with one id are positives of each other."""

    z: Tensor  # [n, d]
    ids: Tensor  # [n] int64; an unassigned sample has an id (< 0) of its own
    shape: torch.Size  # of the result under reduction="none": [n] or [n, views]
    exchange: Exchange  # with the other processes' rows
    first: int = 0  # number of the first sample among those of all processes

    @property
    def assigned(self) -> Tensor:
        return self.ids >= 0


def labels_as_ids(labels: Tensor, embeddings: Tensor, unassigned: int | None = -1, alone: bool = True) -> Tensor:
    """Return labels as the ids of `check_ids`.

    They may be of any integer dtype, bool, or whole numbers of a floating one, [n, 1], and on the CPU, as data loaders
    leave them. If none of them means "unassigned" each is a class: they are numbered where the process is ``alone``,
    else folded over 0. What is no vector of whole numbers is left to the checks.
    """
    if not isinstance(labels, Tensor) or labels.shape[1:] not in ((), (1,)) or labels.ndim == 0:
        return labels
    labels = labels.flatten()
    if labels.device.type == "cpu" and isinstance(embeddings, Tensor):
        labels = labels.to(embeddings.device)
    labels = whole_numbers(labels)
    if unassigned is not None or labels.dtype != torch.int64:
        return labels
    return consecutive_ids(labels) if alone else torch.where(labels < 0, -2 * labels - 1, 2 * labels)


def ids_of_references(
    embeddings: Tensor, labels: Tensor | None, ref_emb: Tensor, ref_labels: Tensor | None, unassigned: int | None
) -> tuple[Tensor, Tensor]:
    """Ids of rows [n, d] and of references [m, d], equal where the labels are; all are checked."""
    check_references(embeddings, ref_emb)
    both = []
    for name, ids, rows in (("labels", labels, embeddings), ("ref_labels", ref_labels, ref_emb)):
        if ids is None:
            raise ArgumentError(f"{name}: expected integers [{len(rows)}] with ref_emb, got None")
        ids = labels_as_ids(ids, rows)
        check_vector(name, ids, len(rows))
        check_integers(name, ids, rows)
        if unassigned is not None:
            check_id_range(name, ids, None)
        both.append(ids)
    together = torch.cat(both)
    together = consecutive_ids(together) if unassigned is None else separate_unassigned(together)
    return together[: len(embeddings)], together[len(embeddings) :]


def check_references(embeddings: Tensor, ref_emb: Tensor | None) -> None:
    """Rows [n, d] and, if there are, references [m, d]."""
    check_matrix("embeddings", embeddings)
    check_floating("embeddings", embeddings)
    if ref_emb is not None:
        check_matrix("ref_emb", ref_emb, columns=embeddings.shape[1])
        check_same("ref_emb", ref_emb, "embeddings", embeddings)


def ceil_of_share(share: float, total: int) -> int:
    """How many a share is, rounded up; 0.07 * 100 is a little more than 7."""
    return math.ceil(round(share * total, 9))


# ---- checks ----


def check_batch(
    embeddings: Tensor,
    ids: Tensor | None,
    ids_name: str,
    centers: Tensor | None = None,
    center_temperature: float | Tensor | None = None,
    at: str = "",
) -> tuple[int, int]:
    """Numbers of samples, and of rows of each; ``at`` is what names of several clusterings end with."""
    check_tensor("embeddings", embeddings)
    check_floating("embeddings", embeddings)
    if embeddings.ndim not in (2, 3):
        raise ArgumentError(f"embeddings: expected shape [n, d] or [n, views, d], got {list(embeddings.shape)}")
    if embeddings.ndim == 2 and ids is None:
        raise ArgumentError(
            f"{ids_name}: expected integers [n] with embeddings [n, d], got None "
            "(without ids the views of a sample must be told apart: embeddings [n, views, d])"
        )
    if centers is not None:
        if ids is None:
            raise ArgumentError(f"{ids_name}: expected integers [n] with centers, got None")
        check_centers(centers, embeddings, center_temperature, at)
    if ids is not None:
        check_ids(f"{ids_name}{at}", ids, embeddings, None if centers is None else centers.shape[0])
    return embeddings.shape[0], embeddings.shape[1] if embeddings.ndim == 3 else 1


def check_centers(
    centers: Tensor, embeddings: Tensor, center_temperature: float | Tensor | None = None, at: str = ""
) -> None:
    """Centres [k, d] of the embeddings, and a temperature of all, or of each of them."""
    check_matrix(f"centers{at}", centers, columns=embeddings.shape[-1])
    check_floating(f"centers{at}", centers)
    check_same(f"centers{at}", centers, "embeddings", embeddings, dtype=False)
    name = f"center_temperature{at}"
    check_center_temperature(center_temperature, name)
    if isinstance(center_temperature, Tensor):
        check_same(name, center_temperature, "embeddings", embeddings, dtype=False)
        if center_temperature.ndim == 1:
            check_vector(name, center_temperature, centers.shape[0])


def check_unassigned(value: int | None) -> None:
    """Check the label that means none: -1, or None where all labels are classes."""
    if value is not None and not (is_integer(value) and value == -1):
        raise ArgumentError(f"unassigned: expected -1 or None, got {shown(value)}")


def check_center_temperature(value: float | Tensor | None, name: str = "center_temperature") -> None:
    """Check a temperature of the centres: positive, of all, or ``[k]`` of each of them."""
    if isinstance(value, Tensor):
        check_tensor(name, value)
        if not value.is_floating_point() or value.element_size() < 2 or value.ndim > 1:
            raise ArgumentError(f"{name}: expected floating point of shape [k], got {value.dtype} {list(value.shape)}")
        are_positive = (value > 0).all()
        if host_knows(are_positive) and not are_positive:
            raise ArgumentError(f"{name}: expected positive numbers, got a smallest of {value.min():g}")
    elif value is not None:
        checked_temperature(name, value)


def check_queries(
    queries: Tensor,
    keys: Tensor | None,
    negatives: Tensor | None = None,
    *,
    required: tuple[str, ...] = (),
    names: tuple[str, str] = ("queries", "keys"),
) -> tuple[int, int]:
    """Queries [n, d] with keys [n, d], or two views [n, 2, d] without; further keys [m, d].

    Args:
        required: which of "keys" and "negatives" may not be None.
        names: of the first two arguments.

    Returns:
        Numbers of samples, and of rows of each.
    """
    of_queries, of_keys = names
    if isinstance(queries, Tensor):
        check_tensor(of_queries, queries)
    if keys is None and "keys" not in required:
        if not isinstance(queries, Tensor) or queries.ndim != 3 or queries.shape[1] != 2:
            got = list(queries.shape) if isinstance(queries, Tensor) else type(queries).__name__
            raise ArgumentError(f"{of_queries}: expected shape [n, 2, d] without {of_keys}, got {got}")
    else:
        check_tensor(of_keys, keys)
        assert keys is not None
        check_matrix(of_queries, queries)
        check_matrix(of_keys, keys, columns=queries.shape[1])
        check_same(of_keys, keys, of_queries, queries)
        if keys.shape != queries.shape:
            expected = f"{list(queries.shape)} (that of {of_queries})"
            raise ArgumentError(f"{of_keys}: expected shape {expected}, got {list(keys.shape)}")
    check_floating(of_queries, queries)
    if negatives is not None or "negatives" in required:
        check_matrix("negatives", negatives, columns=queries.shape[-1])
        assert negatives is not None
        check_same("negatives", negatives, of_queries, queries)
    return queries.shape[0], 2


def check_some(name: str, x: Tensor) -> None:
    """Check that there is a row."""
    if x.shape[0] == 0:
        raise ArgumentError(f"{name}: expected at least one row, got none")


def check_ids(name: str, ids: Tensor, rows: Tensor, number: int | None = None, of: str = "centers") -> None:
    """Ids [n] of rows [n, ...], of any integer dtype: -1 <= ids < number (None: however large)."""
    check_vector(name, ids, rows.shape[0])
    check_integers(name, ids, rows)
    check_id_range(name, ids, number, of)


def check_integers(name: str, x: Tensor, rows: Tensor) -> None:
    """Of any integer dtype, where the rows are."""
    if x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
        raise ArgumentError(f"{name}: expected integers, got {x.dtype}")
    check_same(name, x, "the embeddings", rows, dtype=False)


def check_rows(name: str, x: Tensor, rows: Tensor) -> None:
    """Check integers that are numbers of rows; on a GPU the assertion of torch's own indexing tells."""
    check_integers(name, x, rows)
    if host_knows(x) and x.numel():
        low, high = (int(y) for y in x.long().aminmax())
        if low < 0 or high >= rows.shape[0]:
            raise IndexError(f"{name}: expected rows 0 to {rows.shape[0] - 1}, got {low} to {high}")


def check_id_range(name: str, ids: Tensor, number: int | None, of: str = "centers") -> None:
    """-1 <= ids < number: an IndexError on a CPU; on a GPU an assertion on the device, as torch's own indexing."""
    expected = "at least -1" if number is None else f"from -1 to {number - 1} (there are {number} {of})"
    ids = ids.long()
    if not host_knows(ids):
        inside = ids >= -1 if number is None else (ids >= -1) & (ids < number)
        assert_on_device(inside.all(), f"{name}: expected ids {expected}")
    elif ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < -1 or (number is not None and high >= number):
            raise IndexError(f"{name}: expected ids {expected}, got {low} to {high}")

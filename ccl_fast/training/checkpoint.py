"""Checkpoints that survive what happens while they are written."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ccl_fast.errors import first_line
from ccl_fast.files import write_atomically

# The folder of a run's checkpoints, in the run's own, and their names.
CHECKPOINTS, LAST, PREVIOUS = "checkpoints", "last.ckpt", "previous.ckpt"
Which = Literal["last", "previous"]


class CheckpointError(Exception):
    """A checkpoint that is not there, or cannot be read: its path and what is wrong."""


def save(folder: Path, state: dict) -> Path:
    """Write ``state`` to folder/last.ckpt; what was there becomes folder/previous.ckpt. Returns the path.

    At every moment last.ckpt is complete, the old one or the new one, also if the process is killed or the disk fills.

    Raises:
        OSError: it could not be written; the checkpoints are as before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / LAST
    if last.exists():
        with last.open("rb") as old:
            write_atomically(folder / PREVIOUS, lambda file: shutil.copyfileobj(old, file))
    write_atomically(last, lambda file: torch.save(state, file))
    return last


def load(folder: Path, which: Which = "last") -> dict:
    """Load folder/<which>.ckpt, on the CPU; it may hold tensors and plain values and nothing else.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = folder / {"last": LAST, "previous": PREVIOUS}[which]
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        state = read_tensors(path)
    except Exception as error:  # whatever a damaged file makes zipfile and torch say
        reason = f"({first_line(error)}){_advice(folder, which)}"
        raise CheckpointError(f"the checkpoint {path} cannot be read {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"the checkpoint {path} is none of a training run{_advice(folder, which)}")
    return state


def read_tensors(path: Path) -> Any:
    """Read a file of torch.save's that holds tensors and plain values and nothing else, onto the CPU.

    Raises:
        ValueError: a part of it does not have its check sum.
        Exception: whatever else a damaged or foreign file makes zipfile and torch say.
    """
    with zipfile.ZipFile(path) as archive:  # torch does not check the sums that its archives carry
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"damaged in {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_finite(state: object) -> None:
    """Check that no tensor of a state has a NaN or an infinity.

    Raises:
        ValueError: one has.
    """
    if isinstance(state, dict | list | tuple):
        for value in state.values() if isinstance(state, dict) else state:
            check_finite(value)
    elif isinstance(state, Tensor) and state.is_floating_point() and not state.isfinite().all():
        raise ValueError("values that are not finite")


def _advice(folder: Path, which: Which) -> str:
    if which == "last" and (folder / PREVIOUS).exists():
        return f"; the one before it is {folder / PREVIOUS}: resume_from=previous"
    return ""

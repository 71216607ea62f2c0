"""The folder of a run: what is in it, whether it is ours to write to, and what is dropped where it is overwritten."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path

import yaml

from ccl_fast.errors import ArgumentError
from ccl_fast.training.checkpoint import CHECKPOINTS, LAST, PREVIOUS
from ccl_fast.training.config import FIELDS
from ccl_fast.training.objectives import OBJECTIVES
from ccl_fast.training.progress import EVENTS, METRICS

CONFIG, EVALUATION = "config.yaml", "evaluation"
# All that a run writes, but for TensorBoard's names; results first, so that none is ever beside a later configuration.
FILES = (
    *(f"{name}.{kind}" for name in ("report", f"{EVALUATION}/evaluation") for kind in ("json", "html")),
    *(f"{objective}.pt" for objective in OBJECTIVES),
    *(f"{CHECKPOINTS}/{name}" for name in (LAST, PREVIOUS)),
    METRICS,
    CONFIG,
)


def default_folder(what: str) -> Path:
    """Return a folder under ``runs`` that does not exist."""
    name = datetime.now().strftime(f"runs/{what}-%Y%m%d-%H%M%S")
    number, folder = 1, Path(name)
    while folder.exists():
        number += 1
        folder = Path(f"{name}-{number}")
    return folder


def check_free(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Check that a run may have the folder: nobody has it, or it is a run's and to be overwritten or resumed.

    Raises:
        FileExistsError: it is there, and neither is asked for.
        ArgumentError: it is no folder, or not one of a run's.
    """
    if not folder.exists() or is_empty(folder):
        return
    if not folder.is_dir():
        raise ArgumentError(f"output: expected a folder, got the file {str(folder)!r}")
    if not (overwrite or resume):
        expected = "a folder that does not exist yet, or overwrite or resume"
        raise FileExistsError(f"output: expected {expected}, got {str(folder)!r}")
    if overwrite and not _is_ours(folder):
        expected = f"the folder of a run to overwrite, with its {CONFIG}"
        raise ArgumentError(f"output: expected {expected}, got {str(folder)!r}")


def claim(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Make the folder for a new run, or take over one that is there; of two runs that try, one gets it."""
    if overwrite:
        clear(folder)
    folder.mkdir(parents=True, exist_ok=overwrite or resume or is_empty(folder))


def clear(folder: Path) -> None:
    """Drop what a run has written into the folder, and nothing else."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for events in folder.glob(f"{EVENTS}/*/events.out.tfevents.*"):
        events.unlink()
    for inside in (*folder.glob(f"{EVENTS}/*"), *(folder / name for name in (EVENTS, CHECKPOINTS, EVALUATION))):
        with suppress(OSError):  # not there, or something else is in it
            inside.rmdir()


def is_empty(folder: Path) -> bool:
    """Tell whether a path is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


def _is_ours(folder: Path) -> bool:
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and FIELDS.keys() <= config.keys()

"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ccl_fast.errors import first_line

# How the name of a file ends that is being written; one that is still there is of a process that was killed.
UNFINISHED = ".unfinished"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file of which readers see the old one or the whole new one, never a part; after a crash too.

    What a symbolic link leads to is replaced, and the link stays.

    Raises:
        OSError: it could not be written, or is a pipe, a device or a folder; the old file is as it was.
    """
    check_replaceable(path)
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's word for a full disk
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise OSError(f"{path} could not be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Check that a path is free or that of a regular file.

    Raises:
        OSError: it is something else: a pipe, a device, a folder.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} could not be written: expected a regular file, got something else of that name")


def is_unfinished(path: Path) -> bool:
    """Tell whether a file is a part that `write_atomically` left when its process was killed."""
    return path.name.startswith(".") and path.name.endswith(UNFINISHED)

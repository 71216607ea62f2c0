"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Readers see the old file or the whole new one, never a part; after a crash too.

    Raises:
        OSError: it could not be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's word for a full disk
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise OSError(f"{path} could not be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)

"""The folder of a run: what is in it, whether it is ours to write to, and what is dropped where it is overwritten."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from ccl_fast.commands.plain_yaml import read_yaml
from ccl_fast.errors import ArgumentError
from ccl_fast.files import is_unfinished
from ccl_fast.training.checkpoint import CHECKPOINTS, LAST, PREVIOUS
from ccl_fast.training.config import FIELDS
from ccl_fast.training.loggers import EVENTS, TABLES
from ccl_fast.training.objectives import OBJECTIVES
from ccl_fast.training.progress import METRICS

CONFIG, REPORT, EVALUATION, LOCK = "config.yaml", "report", "evaluation", ".lock"
# Of every objective.
WEIGHTS, DETECTORS = "{}.safetensors", "{}.detectors.safetensors"
# Where runs are by default; and of each command that can be resumed, which file says that there is something to resume,
# and which one has its arguments.
RUNS = Path("runs")
RESUMED = {"train": (f"{CHECKPOINTS}/{LAST}", CONFIG), "compare": ("comparison.yaml", "comparison.yaml")}
# All that a run writes, but for TensorBoard's names; results first, so that none is ever beside a later configuration.
FILES = (
    *(f"{name}.{kind}" for name in (REPORT, f"{EVALUATION}/evaluation") for kind in ("json", "html")),
    *(name.format(objective) for objective in OBJECTIVES for name in (DETECTORS, WEIGHTS)),
    *(f"{CHECKPOINTS}/{name}" for name in (LAST, PREVIOUS)),
    METRICS,
    CONFIG,
)


def default_folder(what: str) -> Path:
    """Return a folder under ``runs`` that does not exist."""
    name = datetime.now().strftime(f"{what}-%Y%m%d-%H%M%S")
    number, folder = 1, RUNS / name
    while folder.exists():
        number += 1
        folder = RUNS / f"{name}-{number}"
    return folder


def resumed_folder(command: str, output: str | Path | None) -> Path:
    """Return the folder that is gone on with: the newest in the given one, or by default in ``runs``.

    Raises:
        ArgumentError: no folder is given, and there is none.
    """
    found = newest(RUNS if output is None else Path(output), RESUMED[command][0])
    if found is None and output is None:
        raise ArgumentError(
            f"output: expected the folder to resume, got none, and there is nothing to resume in {RUNS}"
        )
    return Path(output or RUNS) if found is None else found


def newest(folder: Path, mark: str) -> Path | None:
    """Return the folder itself if it has the marked file, else that of its folders whose is the newest; None: none."""
    if (folder / mark).exists():
        return folder
    marked = [inside for inside in folder.glob("*") if (inside / mark).exists()]
    return max(marked, key=lambda inside: (inside / mark).stat().st_mtime_ns, default=None)


def command_to_go_on(command: str, folder: Path, processes: int = 1) -> str:
    """Return what to type to go on with what is in the folder."""
    program = "ccl-fast" if processes == 1 else f"torchrun --nproc-per-node {processes} -m ccl_fast"
    return f"{program} {command} --output {shlex.quote(str(folder))} --resume"


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
    if overwrite and not _is_config(folder / CONFIG):
        expected = f"the folder of a run to overwrite, with its {CONFIG}"
        raise ArgumentError(f"output: expected {expected}, got {str(folder)!r}")


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check that a file may be written.

    Raises:
        ArgumentError: there is something else than a regular file.
        FileExistsError: there is a file, and it is not to be overwritten.
    """
    if path.exists() and not path.is_file():
        raise ArgumentError(f"output: expected a regular file, got something else, {str(path)!r}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"output: expected a file that does not exist yet, or overwrite, got {str(path)!r}")


class RunFolder:
    """The folder that a run writes to, in a ``with``: held against every other run from when it is there.

    Args:
        path: the folder; None: a fresh one under ``runs``.
        overwrite: a run that is in it is to be dropped.
        resume: a run that is in it is to be gone on with.
    """

    def __init__(self, path: str | Path | None, *, overwrite: bool, resume: bool):
        self.path = None if path is None else Path(path)
        self.overwrite, self.resume = overwrite, resume
        self._holding = ExitStack()
        self._is_held = False

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_) -> None:
        self._holding.close()

    def reserve(self) -> Path:
        """Return the path, which the run may have; nothing is written but the lock in a folder that is there.

        Raises: as `check_free` and `held`.
        """
        self.path = self.path or default_folder("train")
        self._check()
        if self.path.exists():
            self._hold()
        return self.path

    @property
    def reserved(self) -> Path:
        """The path, once the run has one."""
        assert self.path is not None
        return self.path

    def claim(self) -> None:
        """Make the folder, or drop from it what the run does not go on with; raises as `reserve`."""
        if not self._is_held:
            self._hold()
        if self.resume:
            drop_unfinished(self.reserved)
        else:
            clear(self.reserved)

    def _check(self) -> None:
        check_free(self.reserved, overwrite=self.overwrite, resume=self.resume)

    def _hold(self) -> None:
        self._holding.enter_context(held(self.reserved))
        self._is_held = True
        self._check()  # another run may just have been in it


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder, made if need be, against every other run; a folder that is left empty is removed.

    The system lets go of it when the process ends, however that ends.

    Raises:
        FileExistsError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        expected = "a folder that no other run is writing to"
        raise FileExistsError(f"output: expected {expected}, got {str(folder)!r}") from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):  # something is in it
            folder.rmdir()


def clear(folder: Path) -> None:
    """Drop what a run has written into the folder, and nothing else."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    drop_unfinished(folder)
    logged_files = (f"{EVENTS}/*/events.out.tfevents.*", f"{TABLES}/*/metrics.csv", f"{TABLES}/*/hparams.yaml")
    for logged in (path for name in logged_files for path in folder.glob(name)):
        logged.unlink()
    of_stages = (*folder.glob(f"{EVENTS}/*"), *folder.glob(f"{TABLES}/*"))
    for inside in (*of_stages, *(folder / name for name in (EVENTS, TABLES, CHECKPOINTS, EVALUATION))):
        with suppress(OSError):  # not there, or something else is in it
            inside.rmdir()


def drop_unfinished(folder: Path) -> None:
    """Drop what killed runs were writing."""
    for place in (folder, *(folder / name for name in (CHECKPOINTS, EVALUATION))):
        for path in [path for path in place.glob(".*") if is_unfinished(path)]:
            path.unlink(missing_ok=True)


def is_empty(folder: Path) -> bool:
    """Tell whether nothing is in the folder, or only what a run leaves that was killed before its first checkpoint."""

    def is_nothing(path: Path) -> bool:
        if path.name == CHECKPOINTS:
            return path.is_dir() and all(map(is_unfinished, path.iterdir()))
        return is_unfinished(path) or path.name == LOCK or (path.name == CONFIG and _is_config(path))

    return folder.is_dir() and all(map(is_nothing, folder.iterdir()))


def _is_config(path: Path) -> bool:
    """Tell whether the file has the arguments of a run."""
    try:
        config = read_yaml(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and FIELDS.keys() <= config.keys()

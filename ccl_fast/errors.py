"""Errors that several parts speak of in the same way."""

from collections.abc import Iterator
from contextlib import contextmanager


class ArgumentError(ValueError):
    """A wrong argument: its name, what was expected and what came."""


class MissingPackages(ModuleNotFoundError):
    """A package that only some of the library needs is not installed; says what to install."""


@contextmanager
def packages_of_training() -> Iterator[None]:
    """Around imports that need the extra packages of ``ccl-fast[train]``: where one is missing, says so in a line."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if isinstance(missing, MissingPackages) or (missing.name or "").startswith("ccl_fast"):
            raise
        raise MissingPackages(f'{missing}; try: pip install "ccl-fast[train]"', name=missing.name) from missing

"""Names that a package imports when they are used, so that what does not use them need not wait for them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module


def imported_later(package: str, modules: Mapping[str, str], name: str) -> object:
    """Return a name of a package from the module that has it: the package's ``__getattr__``.

    Args:
        package: its ``__name__``.
        modules: by name, the module of the package that has it.
        name: what is asked for.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(f"{package}.{modules[name]}"), name)

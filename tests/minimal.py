"""Imports fail as if only what `pip install ccl-fast` brings were installed: no extras.

    python -m pytest -p tests.minimal tests/losses/test_ccl.py  # as `make test-minimal` does

What the tests themselves are made of stays: pytest, hypothesis, what builds the emulation.
"""

import contextlib
import importlib.metadata
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import ROOT

TOOLS = ("pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "pybind11", "cmake", "ninja")


def required(names) -> set[str]:
    """These distributions and all that they require, without extras."""
    found, todo = set(), list(names)
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            todo += importlib.metadata.requires(name) or []
    return found


class Absent:
    """A finder of modules that does not find these: they are as if not installed, also for who looks first."""

    def __init__(self, finder, names: set[str]):
        self.finder, self.names = finder, names

    def __getattr__(self, name: str):
        return getattr(self.finder, name)

    def find_spec(self, name: str, path=None, target=None):
        return None if name.partition(".")[0] in self.names else self.finder.find_spec(name, path, target)


def install(tools=()) -> None:
    """Of what is imported from now on."""
    project = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
    allowed = required([*project["dependencies"], *tools])
    names = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if name != "ccl_fast" and allowed.isdisjoint(map(canonicalize_name, distributions))
    }
    sys.meta_path[:] = [Absent(finder, names) for finder in sys.meta_path]


def pytest_configure() -> None:
    install(TOOLS)

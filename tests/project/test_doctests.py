"""The examples in the docstrings run, and say what comes out; every public loss and measure has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import ccl_fast.losses
import ccl_fast.metrics

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGES = (
    "ccl_fast.losses",
    "ccl_fast.metrics",
    "ccl_fast.clustering",
    "ccl_fast.ood",
    "ccl_fast.ops",
    "ccl_fast.distributed",
)


def modules_with_examples() -> list[str]:
    found = []
    for package in map(importlib.import_module, PACKAGES):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            source = importlib.util.find_spec(module.name).loader.get_source(module.name)
            found += [module.name] if ">>> " in source else []
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run(name):
    failed, attempted = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert attempted and not failed


@pytest.mark.parametrize("package", (ccl_fast.losses, ccl_fast.metrics), ids=lambda package: package.__name__)
def test_what_is_public_says_how_it_is_used(package):
    public = [getattr(package, name) for name in package.__all__]
    for item in public:
        if inspect.isclass(item) and issubclass(item, tuple):
            continue  # what a function returns
        text = inspect.getdoc(item)
        assert all(part in text for part in ("Args:", "Raises:", "Example:", ">>> ")), item.__name__
        calls = inspect.getdoc(item.forward) if inspect.isclass(item) and "forward" in vars(item) else text
        assert "Returns:" in calls or item is ccl_fast.losses.Loss, item.__name__

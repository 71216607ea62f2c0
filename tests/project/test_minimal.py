"""With only what `pip install ccl-fast` brings: all but the training command imports, and that says what to install."""

import subprocess
import sys

import pytest

from tests import ROOT

HINT = 'try: pip install "ccl-fast[train]"'


def without_extras(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs code in a new process, which finds no package of the extras."""
    code = f"import sys; from tests import minimal; minimal.install()\n{code}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_everything_public_imports_and_the_metrics_work_without_extras():
    done = without_extras("""
import importlib
for name in ("jsonargparse", "kornia", "lightning", "matplotlib", "PIL", "torchmetrics", "torchvision"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} can be imported: nothing is tested")

import ccl_fast
for folder in ("clustering", "distributed", "losses", "metrics", "models", "ood", "ops", "training"):
    module = importlib.import_module(f"ccl_fast.{folder}")
    for name in module.__all__:
        getattr(module, name)
for name in ccl_fast.__all__:
    getattr(ccl_fast, name)

import torch
from ccl_fast.ood import ood_metrics
metrics = ood_metrics(torch.arange(40.0), torch.arange(40) > 30)
assert metrics == {"auroc": 1, "aupr_ood": 1, "aupr_id": 1, "fpr95_ood": 0, "fpr95_id": 0}, metrics
""")
    assert done.returncode == 0, done.stderr


def test_what_needs_an_extra_says_what_to_install_in_one_line():
    done = without_extras("""
import importlib
from ccl_fast.models import build_backbone
for use in (
    lambda: importlib.import_module("ccl_fast.data").load_split,
    lambda: importlib.import_module("ccl_fast.evaluation"),
    lambda: importlib.import_module("ccl_fast").train,
    lambda: build_backbone("resnet8", (3, 32, 32)),
    lambda: build_backbone("resnet18", (3, 32, 32)),
):
    try:
        use()
    except ModuleNotFoundError as missing:
        print(missing)
""")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line.startswith("No module named ") and line.endswith(HINT) and line.count("try:") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["train"]])
def test_the_command_says_what_to_install_in_one_line(arguments):
    done = without_extras("from ccl_fast.__main__ import command; sys.exit(command())", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ccl-fast: No module named ") and line.endswith(HINT)


@pytest.mark.slow
def test_a_package_that_only_training_needs_is_told_in_one_line_too():
    code = """
import sys
sys.modules["lightning"] = None
from ccl_fast.__main__ import command
sys.argv[1:] = ["train"]
sys.exit(command())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ccl-fast: ") and "lightning" in line and line.endswith(HINT)


def test_the_installed_command_is_the_one_that_says_so():
    assert 'ccl-fast = "ccl_fast.__main__:command"' in (ROOT / "pyproject.toml").read_text()

"""Calls go one way: commands -> training -> evaluation -> ood, models, data; training, evaluation, ood -> metrics,
clustering -> losses, ops -> kernels, distributed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ccl_fast

PACKAGE = Path(ccl_fast.__file__).parent
COMMON = {"checks", "errors", "files", "later", "version"}
# What each layer may import of the package, besides itself and what is common.
MAY_IMPORT = {
    "kernels": set(),
    "distributed": set(),
    "ops": {"kernels", "distributed"},
    "losses": {"ops", "distributed"},
    "metrics": {"losses", "ops"},
    "clustering": {"ops", "distributed"},
    "ood": {"losses", "clustering", "ops"},
    "data": set(),
    "models": {"data"},
    "evaluation": {"data", "models", "ood", "metrics", "clustering", "ops"},
    "training": {"data", "models", "evaluation", "metrics", "losses", "clustering", "ops", "distributed"},
    "commands": {"training", "distributed", "data", "models", "evaluation", "metrics", "ood"},
}


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_layers_import_only_what_lies_below(layer):
    files = sorted((PACKAGE / layer).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            for name in imported(node):
                if name.startswith("ccl_fast."):
                    target = name.split(".")[1]
                    assert target in MAY_IMPORT[layer] | COMMON | {layer}, f"{file.name} imports {name}"


def imported(node):
    """The modules that a statement imports; of ``from ccl_fast import a, b`` these are ccl_fast.a and ccl_fast.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module == "ccl_fast":
        return [f"ccl_fast.{alias.name}" for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_every_folder_is_a_known_layer():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(MAY_IMPORT)


def test_importing_the_library_needs_no_extra():
    code = """
import sys, torch
of_torch = set(sys.modules)
import ccl_fast, ccl_fast.metrics
late = {"sklearn", "scipy"}
found = late & (sys.modules.keys() - of_torch)
import ccl_fast.clustering, ccl_fast.ood
extras = {"torchvision", "torchmetrics", "mlxtend", "matplotlib", "tqdm", "jsonargparse", "triton"}
found |= extras & (sys.modules.keys() - of_torch)
sys.exit(f"imported {found}" if found else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_needs_no_extra_is_reached_from_the_package():
    code = "import ccl_fast; ccl_fast.ood.Mahalanobis, ccl_fast.metrics.uniformity, ccl_fast.clustering.KMeans"
    subprocess.run([sys.executable, "-c", code], check=True)

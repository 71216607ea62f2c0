# ruff: noqa: E402 (the extra must be there)
"""Images of two sets as one, in memory and read on demand, and a training on generated images beside real ones."""

import pytest
import torch

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from torchvision.utils import save_image

from ccl_fast.commands import evaluate, load_run, train
from ccl_fast.commands.command_line import main
from ccl_fast.data import Views, load_folder
from ccl_fast.data.images import InMemory
from ccl_fast.data.joined import Joined
from ccl_fast.errors import ArgumentError
from ccl_fast.training.loop import Run

TINY = {"epochs": 2, "warmup_epochs": 1, "clusters": 2, "batch_size": 20, "limit": 60, "in_classes": [0, 7]}
TINY |= {"far_ood": [], "baseline": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extra")
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for i, image in enumerate(images):
        save_image(image, folder / f"{i:02}.png")
    return folder


@pytest.mark.parametrize("memory", [1, 0])
def test_two_sets_are_one(folder, memory):
    random = torch.Generator().manual_seed(1)
    first = InMemory(torch.randint(256, (30, 1, 28, 28), dtype=torch.uint8, generator=random), torch.arange(30))
    second, _ = load_folder(folder, (1, 28, 28), memory=memory)
    joined = Joined([first, second], [3, 1])
    expected = torch.cat([first[torch.arange(30)], second[torch.arange(40)]])
    assert len(joined) == 70 and joined.shape == (1, 28, 28) and joined.classes is None
    assert joined[torch.arange(70)].equal(expected)
    order = torch.randperm(70, generator=random)
    for batch, rows in zip(joined.batches(16, order), order.split(16), strict=True):
        assert batch.equal(expected[rows])
    assert torch.cat(list(joined.batches(16))).equal(expected)  # batches of one set alone among them
    assert joined.epoch.bincount().tolist() == [3] * 30 + [1] * 40
    some = joined.subset(order[:25])
    assert some[torch.arange(25)].equal(expected[order[:25]])
    assert some.epoch.bincount(minlength=25).tolist() == [3 if row < 30 else 1 for row in order[:25].tolist()]
    assert joined.to("cpu")[torch.tensor([69, 0])].equal(expected[[69, 0]])


def test_generated_images_are_trained_on_and_nothing_else(folder, tmp_path, monkeypatch, no_page, capsys):
    seen = []

    def step(run, rows, images, original=Run._step):
        seen.append(rows)
        return original(run, rows, images)

    monkeypatch.setattr(Run, "_step", step)
    arguments = [f"--{name}={value}" for name, value in TINY.items() if name != "baseline"]
    arguments += ["--no-baseline", f"--output={tmp_path / 'run'}", f"--extra-images={folder}", "--real-weight=3"]
    assert main(["train", *arguments]) == 0
    out = capsys.readouterr().out
    assert "40 extra images; an epoch has each of the others 3 times" in out
    assert len(seen) == 2 * ((3 * 60 + 40) // 20)  # epochs x steps
    for rows in torch.cat(seen).split(220):
        assert rows.bincount().tolist() == [3] * 60 + [1] * 40
    report = evaluate(tmp_path / "run")
    assert report["images"]["train"] == 60 and report["arguments"]["extra_images"] == str(folder)
    tensors = load_run(tmp_path / "run", detector="encoder/nearest_neighbor").detector.state_dict()
    assert len(tensors["features"]) == 60
    lines = [line for line in report["log"]["ccl"] if line["stage"] == "ccl"]
    assert "nmi" not in lines[0] and "encoder_knn" in lines[0]


def test_wrong_arguments(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match=r"^real_weight: expected 1 without extra_images, got 10"):
        train(tmp_path / "run", **TINY, real_weight=10)

    def read(*_):
        raise AssertionError("images are read before what is not there is told")

    monkeypatch.setattr("ccl_fast.commands.train_models.load_image_sets", read)
    with pytest.raises(FileNotFoundError, match="extra_images"):
        train(tmp_path / "run", **TINY, extra_images=tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match=r"^warmup_from: expected the folder of a run"):
        train(tmp_path / "run", **TINY, warmup_from=tmp_path / "nowhere")
    assert not (tmp_path / "run").exists()


def test_weak_views_change_half_as_many_colours():
    images = torch.rand(2000, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    changed = []
    for recipe in ("simclr", "weak"):
        torch.manual_seed(0)
        views = Views(recipe, (3, 8, 8)).transform[1](images)  # behind crop and flip
        changed.append(((views - images).abs().amax((1, 2, 3)) > 1e-4).double().mean().item())
    # Of those that are not jittered a fifth has no colour any more.
    assert changed == pytest.approx([1 - 0.2 * 0.8, 1 - 0.6 * 0.8], abs=0.03)

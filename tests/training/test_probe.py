# ruff: noqa: E402 (the extra must be there)
"""Looks at a run on its way: what they see, when, and that they leave no trace in the training."""

import json

import pytest
import torch
from torch import nn

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from lightning.fabric import Fabric

from ccl_fast.commands import train
from ccl_fast.data.images import InMemory
from ccl_fast.evaluation import knn_accuracy
from ccl_fast.training import probe as probe_module
from ccl_fast.training.config import Config
from ccl_fast.training.loop import Run
from ccl_fast.training.probe import Probe

pytestmark = pytest.mark.xdist_group("test_probe")

TINY = {"epochs": 5, "warmup_epochs": 2, "clusters": [4, 3], "in_classes": [0, 7], "batch_size": 50, "limit": 100}
TINY |= {"far_ood": [], "objective": "ccl"}


def make_images(n, seed, classes=3):
    generator = torch.Generator().manual_seed(seed)
    of_images = torch.randint(classes, (n,), generator=generator)
    pixels = torch.randint(60, (n, 1, 8, 8), generator=generator) + 70 * of_images[:, None, None, None]
    return InMemory(pixels.to(torch.uint8), of_images)


def make_run(images, **given):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
    small = {"backbone": backbone, "embedding_dim": 6, "batch_size": 8, "clusters": [3], "warmup_epochs": 0}
    return Run(Config(**small | given), images, Fabric(accelerator="cpu", devices=1))


@pytest.mark.parametrize("ema", [None, 0.9])
def test_the_accuracies_are_those_of_features_in_evaluation_mode(ema, monkeypatch):
    train_set, test_set = make_images(40, 0), make_images(30, 1)
    run = make_run(train_set, ema=ema)
    run.advance(2)
    found, model = Probe(1, train_set, test_set).look(run), run.result
    training = model.training
    with torch.no_grad():
        encoded = [model.eval().encoder(images.pixels / 255) for images in (train_set, test_set)]
        heads = [model.head(x) for x in encoded]
    model.train(training)
    for level, (train_features, test) in {"encoder": encoded, "head": heads}.items():
        expected = knn_accuracy(train_features, train_set.classes, test, test_set.classes)
        assert found[f"{level}_knn"] == pytest.approx(expected)
    assert found["encoder_knn"] > 0.5  # the images' brightness tells their classes
    monkeypatch.setattr(probe_module, "MAX_TRAIN", 7)
    monkeypatch.setattr(probe_module, "MAX_TEST", 4)
    rows, few = torch.arange(0, 40, 6.5).long(), torch.tensor([0, 9, 19, 29])
    expected = knn_accuracy(encoded[0][rows], train_set.classes[rows], encoded[1][few], test_set.classes[few])
    assert Probe(1, train_set, test_set).look(run)["encoder_knn"] == pytest.approx(expected)


def test_views_agree_where_they_lie_nearest_to_the_same_center():
    images = make_images(200, 0)
    same = make_run(images, augmentation="none", clusters=[9, 5])
    same.advance(1)
    found = Probe(1, images, images).look(same)
    assert (found["view_agreement/9"], found["view_agreement/5"]) == (1, 1)

    run = make_run(images, augmentation="digits", clusters=[9])
    run.advance(1)
    centers, seen = run.pseudo_labels.found[0]["centers"], []
    hook = run.model.head.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    found = Probe(1, images, images).look(run)
    hook.remove()
    assert len(seen) == 4  # train and test for the accuracies, and two views
    first, second = (nn.functional.normalize(x) @ centers.T for x in seen[2:])
    agree = (first.argmax(1) == second.argmax(1)).double().mean().item()
    assert found["view_agreement"] == pytest.approx(agree) and 0.2 < agree < 1


@pytest.mark.parametrize(("objective", "keys"), [("simclr", set()), ("swav", {"view_agreement"})])
def test_without_clusters_there_is_no_agreement_of_views_and_without_classes_no_accuracy(objective, keys):
    images = make_images(40, 0)
    run = make_run(images, objective=objective)
    assert Probe(1, images, images).look(run).keys() == keys | {"encoder_knn", "head_knn"}
    unknown = InMemory(images.pixels)
    assert Probe(1, images, unknown).look(run).keys() == Probe(1, unknown, images).look(run).keys() == keys


def test_a_look_changes_nothing():
    images = make_images(40, 0)
    run, looked_at = (make_run(images, epochs=4, warmup_epochs=1, ema=0.9) for _ in range(2))
    run.advance(4)
    probe = Probe(1, images, images)
    state = torch.get_rng_state()
    looks = []
    looked_at.advance(4, after_step=lambda: looks.append(probe.look(looked_at)))
    assert torch.get_rng_state().equal(state)
    assert len(looks) == 20 and looks[4].keys() < looks[5].keys()
    for ours, theirs in zip(looked_at.model.state_dict().values(), run.model.state_dict().values(), strict=True):
        assert ours.equal(theirs)
    assert looked_at.losses == run.losses and looked_at.log == run.log
    assert probe.look(looked_at) == looks[-1]


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (0, []),
        pytest.param(1, [1, 2, 3, 4, 5], marks=pytest.mark.slow),
        (3, [2, 3, 5]),
        pytest.param(10, [2, 5], marks=pytest.mark.slow),
    ],
)
def test_looks_are_in_every_log_when_they_are_due(every, due, tmp_path, no_page):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = train(tmp_path / "run", **TINY, probe_every=every)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for stages in (("warm-up", "simclr"), ("warm-up", "ccl")):
        assert [line["epoch"] for line in lines if line["stage"] in stages and "head_knn" in line] == due
    views = {"view_agreement/4", "view_agreement/3"}
    for line in lines:
        assert (views <= line.keys()) == (line["stage"] == "ccl" and line["epoch"] in due)
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / line["stage"])).Reload()
        for name in line.keys() - {"stage", "objective", "epoch", "step"}:
            assert {event.step: event.value for event in events.Scalars(name)}[line["epoch"]] == pytest.approx(
                line[name]
            )
    assert report["log"]["ccl"] == [line for line in lines if line["stage"] in ("warm-up", "ccl")]
    # So few images are all looked at: the last look is the evaluation.
    for objective, of_levels in report["knn"].items():
        assert of_levels.keys() == {"encoder", "head"}
        last = report["log"][objective][-1]
        assert not due or [last[f"{level}_knn"] for level in of_levels] == pytest.approx(list(of_levels.values()))

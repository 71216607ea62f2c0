# ruff: noqa: E402 (the extra must be there)
"""The training command end to end on a tiny run, and the parts whose errors it would not show."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "matplotlib", "lightning"):
    pytest.importorskip(extra)  # the extra "train"

from lightning.fabric import Fabric

from ccl_fast.ood import NearestNeighbor, auroc
from ccl_fast.training import train
from ccl_fast.training.command import main
from ccl_fast.training.data import augment, load_digits
from ccl_fast.training.loop import Plan, Run
from ccl_fast.training.model import Model, embed

# Two of ten classes: 800 images, a few seconds.
TINY = {"epochs": 2, "warmup_epochs": 1, "clusters": 4, "in_classes": [0, 7], "batch_size": 200}
OPTIONS = [f"--{name}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of one run through the command."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    state = torch.get_rng_state()
    assert main(["train", f"--output={folder}", *OPTIONS]) == 0
    assert torch.get_rng_state().equal(state)
    return folder


def test_writes_report_picture_and_weights(tiny):
    files = ["ccl.pt", "checkpoints", "metrics.jsonl", "report.json", "scores.png", "simclr.pt"]
    assert sorted(path.name for path in tiny.iterdir()) == files
    assert (tiny / "scores.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tiny / "report.json").read_text())
    assert TINY.items() <= report["arguments"].items()
    assert report["images"] == {"train": 800, "test": 200, "ood": 4000}
    assert report["results"].keys() == report["losses"].keys() == {"simclr", "ccl"}
    for method in report["results"].values():
        assert len(method) == 6
        assert all(0 <= value <= 1 for metrics in method.values() for value in metrics.values())
    simclr, ccl = report["losses"]["simclr"], report["losses"]["ccl"]
    assert simclr[0] == ccl[0]  # the warm-up
    assert simclr[1] != ccl[1]


def test_the_weights_give_the_reported_numbers(tiny):
    report = json.loads((tiny / "report.json").read_text())
    features, detector = report["default"].split("/")
    assert detector == "nearest_neighbor"
    digits = load_digits(TINY["in_classes"], seed=0)
    for method, results in report["results"].items():
        model = Model(seed=1)
        model.load_state_dict(torch.load(tiny / f"{method}.pt", weights_only=True))
        train_features, test, ood = (embed(model, images)[features] for images in digits)
        scores = NearestNeighbor().fit_features(train_features).predict_features(torch.cat([test, ood]))
        is_ood = torch.arange(len(scores)) >= len(test)
        assert auroc(scores, is_ood) == pytest.approx(results[report["default"]]["auroc"], abs=1e-4)


def test_same_seed_same_numbers_and_each_method_alone_equals_its_half(tiny, tmp_path, capsys):
    both = json.loads((tiny / "report.json").read_text())
    for method in ("simclr", "ccl"):
        report = train(str(tmp_path / method), method, **TINY)
        assert report["results"] == {method: both["results"][method]}
        assert report["losses"] == {method: both["losses"][method]}
        assert f"{both['results'][method][both['default']]['auroc']:.3f}" in capsys.readouterr().out


def test_another_seed_other_numbers(tmp_path):
    first, second = (train(str(tmp_path / str(s)), "simclr", **TINY | {"epochs": 1}, seed=s) for s in (1, 2))
    assert first["losses"] != second["losses"]


def test_an_existing_folder_is_refused_and_overwritten_on_demand(tiny, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    for name in ("ccl.pt", "simclr.pt", "report.json", "scores.png"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    command = ["train", f"--output={folder}", "--method=simclr", *OPTIONS, "--epochs=1", "--warmup_epochs=1"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "output: expected" in error
    assert str(folder) in error
    assert (folder / "ccl.pt").exists()
    assert main([*command, "--overwrite"]) == 0
    assert not (folder / "ccl.pt").exists()  # not of this run
    assert json.loads((folder / "report.json").read_text())["results"].keys() == {"simclr"}


@pytest.mark.parametrize(
    "option",
    [
        "epochs=0",
        "warmup_epochs=41",
        "clusters=0",
        "clusters=2401",
        "batch_size=1",
        "batch_size=2401",
        "temperature=0",
        "temperature=.inf",
        "center_weight=-1",
        "learning_rate=-1",
        "in_classes=[]",
        "in_classes=[3,3]",
        "in_classes=[3,10]",
        "in_classes=[0,1,2,3,4,5,6,7,8,9]",
        "seed=-1",
        "device=abacus",
        "micro_batch=0",
    ],
)
def test_wrong_arguments_are_named_without_a_traceback(option, tmp_path, capsys):
    assert main(["train", f"--output={tmp_path / 'new'}", f"--{option}"]) == 2
    error = capsys.readouterr().err
    assert f"error: {option.split('=')[0]}: expected" in error
    assert "got" in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments", [[], ["train", "--epochs=many"], ["train", "--method=magic"], ["tarin"]])
def test_unreadable_commands_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "error" in capsys.readouterr().err


def test_help_explains_every_argument(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["train", "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "number of k-means clusters." in text
    assert "replace the results in an existing output folder." in text


def test_a_diverging_loss_stops_with_its_step_and_leaves_no_folder(tmp_path, capsys):
    assert main(["train", f"--output={tmp_path / 'new'}", *OPTIONS, "--learning_rate=1e30"]) == 1
    assert "at step 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_split_is_stratified_disjoint_and_seeded():
    digits = load_digits([1, 8], seed=0)
    assert [len(images) for images in digits] == [800, 200, 4000]
    assert digits.train.dtype == torch.float32
    assert digits.train.aminmax() == (0, 1)
    assert len(torch.cat(digits).flatten(1).unique(dim=0)) == 5000  # every digit is somewhere, once
    one, _, _ = load_digits([1], seed=0)
    assert one.equal(digits.train[:400])  # a class's split depends on the seed alone
    assert not load_digits([1], seed=1).train.equal(one)


def test_augmentation_differs_per_image_and_view_and_keeps_the_digit():
    images = load_digits([3], seed=0).train[:1].expand(64, -1, -1, -1)
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    views = torch.cat([augment(images, generator), augment(images, generator)])
    assert torch.get_rng_state().equal(state)
    assert len(views.flatten(1).unique(dim=0)) == 128
    similar = F.cosine_similarity(F.avg_pool2d(views, 7).flatten(1), F.avg_pool2d(images[:1], 7).flatten(1))
    assert similar.mean() > 0.75  # still ink in the same places, roughly
    again = augment(images, torch.Generator().manual_seed(0))
    assert again.equal(views[:64])


def test_the_state_is_all_that_the_rest_of_a_run_depends_on():
    images, fabric = load_digits([2], seed=0).train, Fabric(accelerator="cpu", devices=1)
    plan = Plan(images, 4, 3, 100, 0.1, 1.0, 1e-3, 0)
    origin = Run(plan, fabric)
    states = []
    origin.advance(3, clustered=True, name="origin", after_step=lambda: states.append(origin.state_dict()))
    assert len(states) == 12
    end = origin.state_dict()
    for at in (0, 3, 4, 9, 11):  # also in the middle and at the end of an epoch
        fork = Run(plan, fabric)
        fork.load_state_dict(states[at])
        fork.advance(3, clustered=True, name="fork")
        assert_equal(fork.state_dict(), end)
    assert_equal(origin.state_dict(), end)  # untouched by its forks


def assert_equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        assert ours.equal(theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_equal(ours[key], value)
    elif isinstance(theirs, list):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert ours == theirs


def test_micro_batches_train_and_a_whole_one_changes_nothing(tiny, tmp_path):
    both = json.loads((tiny / "report.json").read_text())
    whole = train(str(tmp_path / "whole"), "ccl", **TINY, micro_batch=200)
    assert whole["losses"]["ccl"] == both["losses"]["ccl"]
    small = train(str(tmp_path / "small"), "ccl", **TINY, micro_batch=64)
    assert small["losses"]["ccl"] != both["losses"]["ccl"]  # BatchNorm sees micro-batches
    assert small["losses"]["ccl"] == pytest.approx(both["losses"]["ccl"], rel=0.05)


def test_bfloat16_trains_almost_alike(tiny, tmp_path):
    both = json.loads((tiny / "report.json").read_text())
    report = train(str(tmp_path / "bf16"), "ccl", **TINY, precision="bf16-mixed")
    assert report["losses"]["ccl"] != both["losses"]["ccl"]
    assert report["losses"]["ccl"] == pytest.approx(both["losses"]["ccl"], rel=0.02)


def test_embeddings_are_those_of_evaluation_mode():
    images = load_digits([2], seed=0).train[:50]
    model = Model()
    before = copy.deepcopy(model.state_dict())
    features = embed(model, images)
    assert model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert {name: list(value.shape) for name, value in features.items()} == {"encoder": [50, 128], "head": [50, 64]}
    torch.testing.assert_close(features["head"], model.head(features["encoder"]))
    torch.testing.assert_close(embed(model, images[:1])["head"], features["head"][:1])  # no batch statistics

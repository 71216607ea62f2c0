# ruff: noqa: E402 (the extra must be there)
"""The training command end to end on a tiny run, and the parts whose errors it would not show."""

import copy
import functools
import inspect
import json
import shutil
from datetime import datetime

import numpy as np
import pytest
import torch
import yaml

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from lightning.fabric import Fabric
from safetensors.torch import load_file

import ccl_fast
from ccl_fast.commands import evaluate, train
from ccl_fast.commands.command_line import main
from ccl_fast.data import load_split
from ccl_fast.models import Model, embed
from ccl_fast.ood import NearestNeighbor, auroc
from ccl_fast.training.config import FIELDS, Config
from ccl_fast.training.loop import Run
from tests import ROOT
from tests.data.noise import Noise

pytestmark = pytest.mark.xdist_group("test_training")  # one process has the runs that all tests share

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
# 200 images of two classes, a few seconds.
TINY = {"epochs": 2, "warmup_epochs": 1, "clusters": 4, "in_classes": [0, 7], "batch_size": 50, "limit": 200}
OPTIONS = [f"--{name}={value}" for name, value in TINY.items()]
SMALL = TINY | {"epochs": 3, "limit": 100, "baseline": False, "far_ood": []}


@pytest.fixture(autouse=True)
def no_page(tiny, monkeypatch):
    """Only the run of the fixture ``tiny`` draws pictures, which take seconds."""
    monkeypatch.setattr("ccl_fast.commands.report.write_page", lambda path, *_: path.touch() or [])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of one run through the command."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    state = torch.get_rng_state()
    assert main(["train", f"--output={folder}", *OPTIONS]) == 0
    assert torch.get_rng_state().equal(state)
    return folder


def trained(**given) -> Run:
    """A run through all its epochs, without what `train` does around it."""
    plan = Config(**SMALL | given).resolved()
    digits = load_split("digits", in_classes=plan.in_classes, seed=0, limit=plan.limit)
    run = Run(plan, digits.train, Fabric(accelerator="cpu", devices=1))
    run.advance(plan.epochs)
    return run


plain = functools.cache(trained)  # for who compares with it, trained once


def test_writes_report_picture_and_weights(tiny):
    files = ["ccl.detectors.safetensors", "ccl.safetensors", "checkpoints", "config.yaml", "metrics.jsonl"]
    files += ["report.html", "report.json", "simclr.detectors.safetensors", "simclr.safetensors", "tensorboard"]
    assert sorted(path.name for path in tiny.iterdir()) == files
    assert (tiny / "report.html").read_text().lower().startswith("<!doctype html>")
    report = json.loads((tiny / "report.json").read_text())
    assert TINY.items() <= report["arguments"].items()
    made = {"letters": 200, "textures": 200, "blobs": 200, "noise": 200}
    assert report["images"] == {"train": 200, "test": 200, "ood": {"held-out": 200} | made}
    assert report["near"] == ["held-out"]
    assert set(report["far"]) == made.keys()
    assert report["results"].keys() == report["losses"].keys() == {"simclr", "ccl"}
    for objective in report["results"].values():
        assert len(objective) == 13
        for by_set in objective.values():
            assert by_set.keys() == {"near", "far", "held-out"} | made.keys()
            assert by_set["near"] == by_set["held-out"]
            assert by_set["far"]["auroc"] == pytest.approx(sum(by_set[name]["auroc"] for name in made) / len(made))
            assert all(0 <= value <= 1 for metrics in by_set.values() for value in metrics.values())
    simclr, ccl = report["losses"]["simclr"], report["losses"]["ccl"]
    assert simclr[0] == ccl[0]  # the warm-up
    assert simclr[1] != ccl[1]


def test_results_are_written_before_the_page_and_whatever_becomes_of_it(tmp_path, monkeypatch, capsys):
    def fail(path, *_):
        there.extend(sorted(p.name for p in path.parent.iterdir()))
        raise ZeroDivisionError("no page today")

    there = []
    monkeypatch.setattr("ccl_fast.commands.report.write_page", fail)
    small = TINY | {"limit": 100, "batch_size": 50, "far_ood": []}
    report = train(tmp_path / "run", **small)
    assert {"ccl.safetensors", "simclr.safetensors", "report.json"} <= set(there)
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    said = capsys.readouterr()
    assert "report: could not make" in said.err and "(ZeroDivisionError: no page today)" in said.err
    assert "all/ensemble *" in said.out and f"written to {tmp_path / 'run'}\n" in said.out
    monkeypatch.setattr("ccl_fast.commands.report.write_page", lambda path, *_: path.touch() or [])
    again = evaluate(tmp_path / "run")  # what is missing, the page, and nothing beside it
    assert (tmp_path / "run" / "report.html").exists() and not (tmp_path / "run" / "evaluation").exists()
    assert {**again, "seconds": 0, "environment": 0} == {**report, "seconds": 0, "environment": 0}


def test_the_weights_give_the_reported_numbers(tiny):
    report = json.loads((tiny / "report.json").read_text())
    level, name = "encoder", "encoder/nearest_neighbor"
    digits = load_split("digits", in_classes=TINY["in_classes"], seed=0, limit=TINY["limit"])
    for objective, results in report["results"].items():
        model = Model(seed=1)
        model.load_state_dict(load_file(tiny / f"{objective}.safetensors"))
        parts = (digits.train, digits.test, digits.held_out)
        train_features, test, ood = (embed(model, images)[level] for images in parts)
        scores = NearestNeighbor().fit_features(train_features).predict_features(torch.cat([test, ood]))
        is_ood = torch.arange(len(scores)) >= len(test)
        assert auroc(scores, is_ood) == pytest.approx(results[name]["held-out"]["auroc"], abs=1e-4)


def test_the_log_has_a_line_and_tensorboard_an_event_for_every_epoch(tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in (tiny / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"], line["step"]) for line in lines] == [
        ("warm-up", 1, 4),
        ("simclr", 2, 8),
        ("ccl", 2, 8),
    ]
    clustering = {"smallest_cluster", "largest_cluster", "nmi", "accuracy"}
    assert clustering <= lines[2].keys()
    assert not clustering & lines[1].keys()
    for line in lines:
        events = EventAccumulator(str(tiny / "tensorboard" / line["stage"])).Reload()
        (event,) = events.Scalars("loss")
        assert (event.step, event.value) == (line["epoch"], pytest.approx(line["loss"]))
    report = json.loads((tiny / "report.json").read_text())
    assert report["log"] == {"simclr": lines[:2], "ccl": [lines[0], lines[2]]}


def test_the_configuration_that_is_written_repeats_the_run(tiny, tmp_path):
    again = tmp_path / "again"
    assert main(["train", f"--config={tiny / 'config.yaml'}", "--output", str(again), "--objective=simclr"]) == 0
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (again, tiny))
    assert ours["results"]["simclr"] == theirs["results"]["simclr"]


def test_same_seed_same_numbers_and_each_objective_alone_equals_its_half(tiny, tmp_path, capsys):
    both = json.loads((tiny / "report.json").read_text())
    for objective in ("simclr", "ccl"):
        report = train(str(tmp_path / objective), objective, baseline=False, **TINY)
        assert report["results"] == {objective: both["results"][objective]}
        assert report["losses"] == {objective: both["losses"][objective]}
        assert f"{both['results'][objective][both['default']]['near']['auroc']:.3f}" in capsys.readouterr().out


def test_another_seed_other_numbers():
    first, second = (trained(objective="simclr", epochs=1, seed=seed) for seed in (1, 2))
    assert first.losses != second.losses


def test_an_existing_folder_is_refused_and_overwritten_on_demand(tiny, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "checkpoints").mkdir()
    (folder / "mine.txt").write_text("mine")
    (folder / "checkpoints" / "mine.ckpt").write_text("mine")
    for name in ("ccl.safetensors", "simclr.safetensors", "report.json", "report.html", "config.yaml"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    command = ["train", f"--output={folder}", "--objective=simclr", *OPTIONS, "--epochs=1", "--warmup_epochs=1"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "output: expected" in error
    assert str(folder) in error
    assert (folder / "ccl.safetensors").exists()
    assert main([*command, "--overwrite"]) == 0
    assert not (folder / "ccl.safetensors").exists()  # not of this run
    assert (folder / "mine.txt").exists() and (folder / "checkpoints" / "mine.ckpt").exists()
    assert json.loads((folder / "report.json").read_text())["results"].keys() == {"simclr"}


def test_a_folder_of_somebody_else_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("name: another tool\n")
    assert main(["train", f"--output={tmp_path}", *OPTIONS, "--overwrite"]) == 2
    assert "output: expected the folder of a run to overwrite" in capsys.readouterr().err
    assert (tmp_path / "checkpoints").exists() and (tmp_path / "config.yaml").exists()
    (tmp_path / "file").write_text("")
    assert main(["train", f"--output={tmp_path / 'file'}", *OPTIONS, "--overwrite"]) == 2
    assert "output: expected a folder" in capsys.readouterr().err


def test_a_run_that_overwrites_leaves_no_result_of_the_old_one_beside_its_arguments(tiny, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(tiny, folder)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text("{}")
    with pytest.raises(FloatingPointError):
        train(folder, **TINY | {"learning_rate": 1e30}, overwrite=True)
    assert not folder.exists()


def test_of_two_runs_one_gets_the_folder(tmp_path, monkeypatch):
    from ccl_fast.commands import run_folder

    class Noon(datetime):  # both within one second
        @classmethod
        def now(cls):
            return cls(2026, 1, 1, 12)

    monkeypatch.setattr(run_folder, "datetime", Noon)
    monkeypatch.chdir(tmp_path)
    first, second = (run_folder.RunFolder(None, overwrite=False, resume=False) for _ in range(2))
    assert first.reserve() == second.reserve()
    with first, second:
        first.claim()
        with pytest.raises(FileExistsError, match=r"^output: expected a folder that no other run is writing to"):
            second.claim()
        (first.path / "config.yaml").write_text("")
    with pytest.raises(FileExistsError, match=r"^output: expected a folder that does not exist yet"):
        second.claim()
    assert run_folder.default_folder("train") != first.path


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
        "instance_weight=1.5",
        "believe=1.01",
        "learning_rate=-1",
        "in_classes=[]",
        "in_classes=[3,3]",
        "in_classes=[3,10]",
        "seed=-1",
        "seed=18446744073709551616",
        "device=meta",
        "embedding_dim=100000000000",
        "device=abacus",
        "micro_batch=0",
        "clusters=[]",
        "clusters=[4,4]",
        "recluster_every=0",
        "center_ramp_epochs=-1",
        "ema=1",
        "embedding_dim=0",
        "limit=0",
        "image_size=0",
        "weight_decay=-1",
        "timeout=0",
        "timeout=.inf",
        "backbone=resnet19",
        "data=digitz",
        "near_ood=[held-in]",
        "far_ood=[held-out]",
        "far_ood=[Held_Out, noise]",
    ],
)
def test_wrong_arguments_are_named_without_a_traceback(option, tmp_path, capsys):
    assert main(["train", f"--output={tmp_path / 'new'}", f"--{option}"]) == 2
    error = capsys.readouterr().err
    assert f"error: {option.split('=')[0]}: expected" in error
    assert "got" in error
    assert not (tmp_path / "new").exists()


def test_the_function_shows_its_arguments_with_types_and_help():
    parameters = inspect.signature(ccl_fast.train).parameters
    assert list(parameters) == list(FIELDS) and list(parameters)[:2] == ["output", "objective"]
    assert parameters["epochs"].annotation is int and parameters["epochs"].default == 40
    assert inspect.signature(ccl_fast.train).return_annotation == dict | None
    text = " ".join(inspect.getdoc(ccl_fast.train).split())
    for name, field in FIELDS.items():
        assert f"{name}: {field.metadata['help']}" in text
    assert text.index("Args: output:") < text.index("Returns:") < text.index("Raises:")
    with pytest.raises(TypeError, match="epoch"):
        ccl_fast.train(epoch=3)


def test_a_diverging_loss_stops_with_its_step_and_leaves_no_folder(tmp_path, capsys):
    assert main(["train", f"--output={tmp_path / 'new'}", *OPTIONS, "--learning_rate=1e30"]) == 1
    assert "at step 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "extra", [slow({}), {"ema": 0.9, "concentration": True, "clusters": [4, 3], "recluster_every": 2}]
)
def test_the_state_is_all_that_the_rest_of_a_run_depends_on(extra):
    digits, fabric = load_split("digits", in_classes=[2], seed=0), Fabric(accelerator="cpu", devices=1)
    plan = Config(**{"epochs": 3, "clusters": [4], "warmup_epochs": 0, "batch_size": 100} | extra)
    origin = Run(plan, digits.train, fabric)
    states = []
    origin.advance(3, after_step=lambda: states.append(origin.state_dict()))
    assert len(states) == 12
    end = origin.state_dict()
    for at in (0, 3, 4, 9, 11):  # also in the middle and at the end of an epoch
        fork = Run(plan, digits.train, fabric)
        torch.manual_seed(at)  # whatever was drawn before
        fork.load_state_dict(states[at])
        fork.advance(3)
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


def test_micro_batches_train_and_a_whole_one_changes_nothing(tiny):
    both = json.loads((tiny / "report.json").read_text())
    assert trained(**TINY, micro_batch=100).losses == both["losses"]["ccl"]
    small = trained(**TINY, micro_batch=32)
    assert small.losses != both["losses"]["ccl"]  # BatchNorm sees micro-batches
    assert small.losses == pytest.approx(both["losses"]["ccl"], rel=0.05)


def test_bfloat16_trains_almost_alike(tiny, tmp_path):
    both = json.loads((tiny / "report.json").read_text())
    report = train(str(tmp_path / "bf16"), baseline=False, **TINY, precision="bf16-mixed")
    assert report["losses"]["ccl"] != both["losses"]["ccl"]
    assert report["losses"]["ccl"] == pytest.approx(both["losses"]["ccl"], rel=0.02)


def test_embeddings_are_those_of_evaluation_mode():
    images = load_split("digits", in_classes=[2], seed=0).train.subset(torch.arange(50))
    model = Model()
    before = copy.deepcopy(model.state_dict())
    features = embed(model, images)
    assert all(module.training for module in model.modules())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert {name: list(value.shape) for name, value in features.items()} == {"encoder": [50, 128], "head": [50, 64]}
    torch.testing.assert_close(features["head"], model.head(features["encoder"]))
    alone = embed(model, images.subset(torch.tensor([0])))
    torch.testing.assert_close(alone["head"], features["head"][:1])  # no batch statistics


@pytest.mark.parametrize(
    "switch",
    [
        {"center_ramp_epochs": 2},
        {"augmentation": "none"},
        slow({"weight_decay": 1.0}),
        slow({"embedding_dim": 32}),
        # That the state is all has these too.
        slow({"clusters": [4, 7]}),
        slow({"concentration": True}),
        slow({"ema": 0.5}),
        slow({"recluster_every": 2}),
        slow({"backbone": "shufflenet_v2_x0_5", "limit": 64, "batch_size": 32, "epochs": 2, "warmup_epochs": 0}),
    ],
    ids=str,
)
def test_every_switch_changes_what_is_learned_and_is_repeatable(switch):
    first, again = trained(**switch), trained(**switch)
    assert_equal(first.state_dict(), again.state_dict())
    without = plain(**{n: switch[n] for n in ("limit", "batch_size", "epochs", "warmup_epochs") if n in switch})
    assert not embed(first.result, first.images)["head"].equal(embed(without.result, without.images)["head"])
    assert first.config.plain()[next(iter(switch))] == next(iter(switch.values()))


@pytest.mark.parametrize("switch", ["channels_last", "fused_optimizer"])
def test_switches_of_speed_change_nothing_but_rounding(switch):
    assert trained(epochs=2, **{switch: True}).losses == pytest.approx(plain(epochs=2).losses, rel=2e-3)


def test_a_compiled_network_trains_the_same_and_leaves_ordinary_weights(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler))
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 20), torch.nn.BatchNorm1d(20))
    base = {"epochs": 2, "backbone": backbone}
    compiled = train(tmp_path / "run", **SMALL | base, compile_model=True)
    assert compiled["losses"]["ccl"] == pytest.approx(trained(**base).losses, rel=2e-3)
    Model(backbone).load_state_dict(load_file(tmp_path / "run" / "ccl.safetensors"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("near_ood", 5),
        ("output", 5),
        ("strict", "no"),
        ("download", 1),
        ("epochs", 2.5),
        ("device", 3),
        ("clusters", "4"),
    ],
)
def test_wrong_types_from_python_are_named(argument, value, tmp_path):
    given = TINY | {"output": tmp_path / "run", argument: value}
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        train(**given)
    assert not (tmp_path / "run").exists()


def test_numbers_of_numpy_are_numbers(tmp_path):
    base = TINY | {"limit": 100, "objective": "simclr", "far_ood": [], "batch_size": 50}
    numpy = {"epochs": np.int64(2), "seed": np.int32(0), "learning_rate": np.float64(1e-3), "clusters": np.int64(4)}
    plain, same = train(tmp_path / "plain", **base), train(tmp_path / "same", **base | numpy)
    assert same["losses"] == plain["losses"]
    assert main(["train", f"--config={tmp_path / 'same' / 'config.yaml'}", f"--output={tmp_path / 'again'}"]) == 0


def test_concentration_needs_a_cluster_of_two(tmp_path, capsys):
    command = ["train", f"--output={tmp_path / 'run'}", *OPTIONS, "--limit=100", "--clusters=100", "--concentration"]
    assert main(command) == 2
    assert "clusters: expected fewer than the 100 training images" in capsys.readouterr().err


def test_few_images_and_labels_of_any_number(tmp_path):
    labels = torch.tensor([10**12, -1, 7]).repeat(4)
    images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(images, labels)
    report = train(
        tmp_path / "run", data=(data, data), near_ood=["noise"], far_ood=[], batch_size=4, epochs=2, clusters=2
    )
    assert 0 <= report["clustering"]["ccl"]["accuracy"] <= 1


def test_the_weight_of_the_center_grows_from_nothing():
    plan = Config(epochs=6, warmup_epochs=2, center_ramp_epochs=2, center_weight=0.5, clusters=[2], batch_size=100)
    run = Run(plan, load_split("digits", in_classes=[2]).train, Fabric(accelerator="cpu", devices=1))
    weights = []
    for run.step in range(8, 20):
        weights.append(run.center_weight)
    assert weights[0] == 0
    assert weights[8:] == [0.5] * 4
    assert weights[:9] == pytest.approx([0.5 * i / 8 for i in range(9)])


def test_datasets_and_modules_from_python(tmp_path):
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(192, 16))
    sets = {"data": (Noise(64, 0), Noise(20, 1)), "near_ood": {"other noise": Noise(9, 2)}, "far_ood": {}}
    report = ccl_fast.train(tmp_path / "run", epochs=2, batch_size=32, clusters=3, backbone=backbone, **sets)
    assert report["images"] == {"train": 64, "test": 20, "ood": {"other noise": 9}}
    assert report["near"] == ["other noise"] and report["far"] == []
    assert "clustering" not in report  # without labels
    assert "Sequential" in report["arguments"]["backbone"]
    assert "Noise" in report["arguments"]["data"][0]


def test_the_command_line_undoes_a_flag_of_the_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text("channels_last: true\nfused_optimizer: true\n")
    command = [
        "train",
        f"--config={tmp_path / 'c.yaml'}",
        "--no-channels-last",
        f"--output={tmp_path / 'run'}",
        *OPTIONS,
    ]
    assert main([*command, "--objective=simclr"]) == 0
    arguments = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (arguments["channels_last"], arguments["fused_optimizer"], arguments["strict"]) == (False, True, False)


@pytest.mark.parametrize("sets", [{"near": Noise(9, 2)}, {"test": Noise(9, 2)}, {}])
def test_ood_sets_need_names_of_their_own(sets, tmp_path):
    with pytest.raises(ValueError, match=r"^near_ood: expected"):
        train(tmp_path / "run", data=Noise(64, 0), near_ood=sets, far_ood=[])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["cifar10", "imagenet"])
def test_recipes_are_arguments_of_train(recipe, tmp_path, capsys):
    data = {"data": (Noise(48, 0), Noise(20, 1)), "near_ood": {"noise": Noise(9, 2)}, "far_ood": []}
    file = ROOT / "recipes" / f"{recipe}.yaml"
    text = yaml.safe_load(file.read_text())
    assert text["backbone"].startswith("resnet")
    small = {"epochs": 1, "warmup_epochs": 0, "batch_size": 16, "clusters": [3, 4], "compile_model": False}
    small |= {"image_size": 16, "workers": 0, "micro_batch": 8 if "micro_batch" in text else None, "backbone": "small"}
    report = train(tmp_path / "run", **text | small | data)
    assert report["results"]["ccl"]["head/nearest_neighbor"].keys() == {"near", "noise"}
    # As the documentation has it, two of them are only for CCL.
    assert "--center-ramp-epochs 0 --no-concentration" in (ROOT / "docs" / "training.md").read_text()
    command = ["train", f"--config={file}", "--objective=swav", f"--output={tmp_path / 'new'}", "--data=digitz"]
    assert main(command) == 2
    assert "concentration: expected False with objective 'swav', got True" in capsys.readouterr().err
    assert main([*command, "--center-ramp-epochs", "0", "--no-concentration"]) == 2
    assert "error: data: expected" in capsys.readouterr().err

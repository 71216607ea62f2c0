# ruff: noqa: E402 (the extra must be there)
"""One warm-up, many continuations: a run that begins with another's warm-up ends as one that did it all by itself."""

import json
import shutil
import signal

import pytest
import torch

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from safetensors.torch import load_file

from ccl_fast.commands import train
from ccl_fast.commands.command_line import main
from ccl_fast.errors import ArgumentError
from ccl_fast.training.checkpoint import CheckpointError
from ccl_fast.training.interruption import Interrupted
from ccl_fast.training.loop import Run

pytestmark = pytest.mark.xdist_group("test_warm_up")  # one process has the runs that all tests share

TINY = {"epochs": 4, "warmup_epochs": 2, "clusters": 4, "in_classes": [0, 7], "batch_size": 50, "limit": 100}
TINY |= {"far_ood": [], "ema": 0.9}
# What begins with the warm-up of the fixture ``origin``, a run of CCL with its baseline.
CONTINUATIONS = {
    "ccl": {"clusters": [5, 3], "recluster_every": 2, "center_ramp_epochs": 1, "near_ood": ["noise"]},
    "swav": {},
    "simclr": {},
    "protonce": {"concentration": True, "warmup_epochs": None},  # by default the same two
    "ccl alone": {"baseline": False, "center_weight": 0.5},
}


@pytest.fixture(scope="module")
def origin(tmp_path_factory, no_page, one_thread):
    folder = tmp_path_factory.mktemp("runs") / "origin"
    train(folder, **TINY)
    return folder


@pytest.fixture
def steps(monkeypatch):
    """How often a step was taken in every epoch, by objective, except of warm-ups."""
    steps, step = {}, Run._step

    def spy(run, *given):
        name = "warm-up" if run.is_warming_up else run.config.objective
        steps[name] = steps.get(name, 0) + 1
        return step(run, *given)

    monkeypatch.setattr(Run, "_step", spy)
    return steps


def stop_after(monkeypatch, objective, step):
    """SIGTERM after a step of an objective's run."""
    original = Run._step

    def stopping(run, *given):
        if (run.config.objective, run.step) == (objective, step - 1):
            signal.raise_signal(signal.SIGTERM)
        return original(run, *given)

    monkeypatch.setattr(Run, "_step", stopping)


def assert_same_end(folder, whole, objectives):
    for objective in objectives:
        ours, theirs = (load_file(f / f"{objective}.safetensors") for f in (folder, whole))
        assert ours.keys() == theirs.keys() and all(ours[name].equal(value) for name, value in theirs.items())
    ours, theirs = (json.loads((f / "report.json").read_text()) for f in (folder, whole))
    for part in ("results", "clustering", "losses", "log"):
        assert ours[part] == theirs[part], part
    assert ours["results"].keys() == set(objectives)
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


# The others go the same way: SwAV's below too, from a stop and in a comparison, SimCLR's as the baseline's.
FIRST = {"ccl", "ccl alone"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=() if x in FIRST else pytest.mark.slow) for x in CONTINUATIONS])
def test_a_continuation_ends_as_a_run_that_did_it_all(name, origin, tmp_path, steps, capsys):
    given = TINY | {"objective": name.split()[0]} | CONTINUATIONS[name]
    objectives = list(dict.fromkeys(["simclr"] * given.get("baseline", True) + [given["objective"]]))
    train(tmp_path / "whole", **given)
    assert steps == {"warm-up": 4} | dict.fromkeys(objectives, 4)
    steps.clear()
    capsys.readouterr()
    train(tmp_path / "continued", **given, warmup_from=origin)
    assert steps == {given["objective"]: 4}
    said = f"taken over from {origin}: {' and '.join(['warm-up', *objectives[:-1]])}\n"
    assert said in capsys.readouterr().out
    assert_same_end(tmp_path / "continued", tmp_path / "whole", objectives)


def test_tensorboard_has_what_was_taken_over(origin, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", **TINY | {"objective": "swav"}, warmup_from=origin)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["warm-up"] * 2 + ["simclr"] * 2 + ["swav"] * 2
    for stage in ("warm-up", "simclr", "swav"):
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / stage)).Reload().Scalars("loss")
        assert [event.step for event in events] == [line["epoch"] for line in lines if line["stage"] == stage]
        assert [event.value for event in events] == pytest.approx(
            [line["loss"] for line in lines if line["stage"] == stage]
        )


def test_a_run_begun_with_a_warm_up_goes_on_without_the_other_one(origin, tmp_path, monkeypatch, steps):
    gone = tmp_path / "gone"
    shutil.copytree(origin, gone)
    given = TINY | {"objective": "swav"}
    train(tmp_path / "whole", **given)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, "swav", 6)
        train(tmp_path / "run", **given, warmup_from=gone)
    shutil.rmtree(gone)
    steps.clear()
    train(tmp_path / "run", **given, warmup_from=gone, resume=True)
    assert steps == {"swav": 2}
    assert_same_end(tmp_path / "run", tmp_path / "whole", ["simclr", "swav"])


@pytest.mark.parametrize(
    ("stopped_after", "trained"),
    [
        pytest.param(("simclr", 5), {"simclr", "ccl"}, marks=pytest.mark.slow),
        (("simclr", 7), {"simclr", "ccl"}),
        pytest.param(("ccl", 5), {"ccl"}, marks=pytest.mark.slow),
    ],
    ids=["after the warm-up", "in the middle of SimCLR", "after SimCLR"],
)
def test_what_another_run_has_not_finished_is_trained(origin, tmp_path, monkeypatch, steps, stopped_after, trained):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, *stopped_after)
        train(tmp_path / "stopped", **TINY | {"clusters": 3})
    steps.clear()
    train(tmp_path / "run", **TINY, warmup_from=tmp_path / "stopped")
    assert steps.keys() == trained
    assert_same_end(tmp_path / "run", origin, ["simclr", "ccl"])


def test_a_baseline_that_was_a_run_of_its_own_is_taken_over(origin, tmp_path, steps):
    train(tmp_path / "simclr", **TINY | {"objective": "simclr"})
    steps.clear()
    train(tmp_path / "run", **TINY, warmup_from=tmp_path / "simclr")
    assert steps == {"ccl": 4}
    assert_same_end(tmp_path / "run", origin, ["simclr", "ccl"])


def test_a_warm_up_that_is_not_done_is_not_taken(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, "simclr", 3)
        train(tmp_path / "stopped", **TINY)
    with pytest.raises(ArgumentError, match=r"^warmup_from: expected a run that has done its warm-up of 2 epochs, got"):
        train(tmp_path / "run", **TINY, warmup_from=tmp_path / "stopped")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 25),
        ("seed", 1),
        ("temperature", 0.2),
        ("epochs", 5),
        ("warmup_epochs", 1),
        ("ema", None),
        ("augmentation", "none"),
        ("limit", 90),
        ("embedding_dim", 32),
    ],
)
def test_a_difference_that_matters_in_the_warm_up_is_named(name, value, origin, tmp_path):
    with pytest.raises(ArgumentError, match=rf"^{name}: expected .*, as the run to warm up from has it"):
        train(tmp_path / "run", **TINY | {name: value}, warmup_from=origin)
    assert not (tmp_path / "run").exists()


def test_other_images_and_other_folders_are_refused(origin, tmp_path, capsys):
    from ccl_fast.data import load_split

    options = [f"--{name}={value}" for name, value in TINY.items()]
    data = [torch.utils.data.TensorDataset(torch.rand(400, 1, 28, 28), torch.arange(400) % 10) for _ in range(2)]
    assert load_split("digits", in_classes=[0, 7], limit=100).train.shape == (1, 28, 28)
    with pytest.raises(ArgumentError, match=r"^data: expected the training images of the run to warm up from"):
        train(tmp_path / "run", **TINY, data=tuple(data), warmup_from=origin)

    def fails_with(text, *arguments):
        assert main(["train", *options, *arguments]) == 2
        assert text in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    new = f"--output={tmp_path / 'run'}"
    fails_with("warmup_from: expected the folder of a run", new, f"--warmup-from={tmp_path / 'nowhere'}")
    fails_with("warmup_from: expected another folder", f"--output={origin}", f"--warmup-from={origin}", "--overwrite")
    damaged = tmp_path / "damaged"
    shutil.copytree(origin, damaged)
    (damaged / "checkpoints" / "last.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(tmp_path / "run", **TINY, warmup_from=damaged)


@pytest.mark.slow  # eight models
def test_a_comparison_begins_with_the_warm_ups_of_another(tmp_path, no_page, steps):
    options = [f"--{name}={value}" for name, value in (TINY | {"epochs": 2, "warmup_epochs": 1}).items()]

    def compare(name, *more):
        assert main(["compare", f"--output={tmp_path / name}", "--seeds=[3,5]", *options, *more]) == 0
        return json.loads((tmp_path / name / "comparison.json").read_text())

    compare("first")
    steps.clear()
    continued = compare("second", "--objective=swav", f"--warmup-from={tmp_path / 'first'}")
    assert steps == {"swav": 4}
    whole = compare("whole", "--objective=swav")
    assert continued["results"] == whole["results"] and continued["arguments"] == whole["arguments"]
    with pytest.raises(ArgumentError, match=r"^warmup_from: expected the folder of a comparison with seeds .*seed4"):
        from ccl_fast.commands.compare_objectives import compare as compare_function

        compare_function(tmp_path / "third", [3, 4], warmup_from=tmp_path / "first")
    assert not (tmp_path / "third").exists()

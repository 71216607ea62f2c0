# ruff: noqa: E402 (the extra must be there)
"""What loggers are given, that a run that goes on goes on in them too, and that none of them costs the training."""

import csv
import io
import json
import signal
import sys
import types
from typing import ClassVar

import pytest
import yaml

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ccl_fast.commands import train
from ccl_fast.commands.command_line import main
from ccl_fast.errors import ArgumentError
from ccl_fast.evaluation import write_page
from ccl_fast.training import loggers
from ccl_fast.training.config import Config
from ccl_fast.training.interruption import Interrupted
from ccl_fast.training.loop import Run

pytestmark = [pytest.mark.xdist_group("test_loggers"), pytest.mark.usefixtures("no_page", "one_thread")]

TINY = {"epochs": 3, "warmup_epochs": 1, "clusters": 4, "in_classes": [0, 7], "batch_size": 50, "limit": 100}
TINY |= {"far_ood": [], "baseline": False}


@pytest.fixture
def told(monkeypatch):
    """What a logger that stands for wandb is told, in order; one that may be asked to fail."""
    told = []

    class Recorder:
        def __init__(self, stage):
            self.id = stage.id or f"id{len(told)}"
            told.append(("begin", stage.name, self.id, stage.epoch, list(stage.lines)))
            if "refuse" in told:
                raise ConnectionError("no server")

        def log(self, values, epoch):
            told.append(("log", epoch, dict(values)))
            if "fail" in told:
                raise ConnectionError("gone")

        def finish(self, results, epoch):
            told.append(("finish", epoch, dict(results.values)))

        def close(self):
            told.append(("close",))

    monkeypatch.setitem(loggers._KINDS, "wandb", Recorder)
    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    return told


def write_no_page(path, *_):
    path.write_text("<!doctype html>")
    return []


def stop_after(monkeypatch, step):
    """SIGTERM in a step."""
    original = Run._step

    def stopping(run, *given):
        if run.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return original(run, *given)

    monkeypatch.setattr(Run, "_step", stopping)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows_of(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def numbers(line):
    return {name: value for name, value in line.items() if name not in ("stage", "objective", "epoch", "step")}


def measures(report, objective="ccl"):
    of_detectors = report["results"][objective].items()
    aurocs = {f"auroc/{s}/{d}": metrics["auroc"] for d, by_set in of_detectors for s, metrics in by_set.items()}
    knn = {f"knn/{level}": value for level, value in report["knn"][objective].items()}
    return aurocs | knn | {"linear/encoder": report["linear"][objective]}


def test_a_logger_is_told_every_epoch_and_the_results(told, tmp_path):
    report = train(tmp_path / "run", **TINY, loggers="wandb")
    warm_up, *own = lines_of(tmp_path / "run")
    assert told == [
        ("begin", "warm-up", "id0", 1, []),
        ("log", 1, numbers(warm_up)),
        ("close",),
        ("begin", "ccl", "id3", 2, []),
        *(("log", line["epoch"], numbers(line)) for line in own),
        ("close",),
        ("begin", "ccl", "id3", 4, [2, 3]),
        ("finish", 3, measures(report)),
        ("close",),
    ]
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_run_that_goes_on_goes_on_in_its_loggers(told, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 5)
        train(tmp_path / "run", **TINY, loggers=["wandb", "csv", "tensorboard"])
    before = len(told)
    assert told[before - 1] == ("close",)
    train(tmp_path / "run", **TINY, loggers=["wandb", "csv", "tensorboard"], resume=True)
    assert told[before] == ("begin", "ccl", "id3", 3, [2])
    assert [entry[1] for entry in told if entry[0] == "log"] == [1, 2, 3]
    lines = lines_of(tmp_path / "run")
    for stage in ("warm-up", "ccl"):
        of_stage = [line for line in lines if line["stage"] == stage]
        rows = rows_of(tmp_path / "run" / "csv" / stage)
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / stage)).Reload()
        assert len(rows) == len(of_stage) + (stage == "ccl")  # the results
        assert [event.step for event in events.Scalars("loss")] == [line["epoch"] for line in of_stage]
        for line, row in zip(of_stage, rows, strict=False):
            assert int(row["step"]) == line["epoch"]
            assert {name: float(row[name]) for name in numbers(line)} == numbers(line)


def test_csv_and_tensorboard_have_the_results_and_the_arguments(tmp_path):
    report = train(tmp_path / "run", **TINY | {"epochs": 2}, loggers=["csv", "tensorboard"])
    last = rows_of(tmp_path / "run" / "csv" / "ccl")[-1]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "ccl")).Reload()
    assert yaml.safe_load((tmp_path / "run" / "csv" / "ccl" / "hparams.yaml").read_text()) == report["arguments"]
    for name, value in measures(report).items():
        assert float(last[name]) == value
        (event,) = events.Scalars(name)
        assert (event.step, event.value) == (2, pytest.approx(value))
    assert "_hparams_/session_start_info" in events.summary_metadata
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"batch_size" in content and b"exclude_bias_and_norm" in content


def test_tensorboard_has_the_pictures_of_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr("ccl_fast.commands.report.write_page", write_page)
    train(tmp_path / "run", **TINY | {"epochs": 2, "baseline": True})
    drawn = {}
    for stage in ("simclr", "ccl"):
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / stage)).Reload()
        names = [name for name in events.Tags()["images"] if not name.startswith("training/")]
        assert sorted(names) == [
            "clusters/map", "clusters/sizes", "overview/Near OOD", "scores/histograms", "scores/roc",
        ]  # fmt: skip
        assert "training/Loss" in events.Tags()["images"]
        (event,) = events.Images("scores/roc")
        assert (event.step, event.width, event.height) == (2, 840, 1140)
        assert len(Image.open(io.BytesIO(event.encoded_image_string)).getcolors(2**20)) > 20
        drawn[stage] = events.Images("scores/histograms")[0].encoded_image_string
    assert drawn["simclr"] != drawn["ccl"]


class Recorded:
    """Stands for one of Lightning's loggers: notes what is called, and with what."""

    calls: ClassVar[list] = []
    version = run_id = "the-run"

    def __init__(self, *args, **options):
        self.calls.append(("made", args, options))
        self.experiment = types.SimpleNamespace(
            log=lambda values: self.calls.append(("experiment.log", values)),
            finish=lambda: self.calls.append(("experiment.finish",)),
            log_artifact=lambda *given: self.calls.append(("artifact", *given)),
        )

    def __getattr__(self, name):
        return lambda *given: self.calls.append((name, *given))


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(Recorded, "calls", [])
    monkeypatch.setattr("lightning.pytorch.loggers.WandbLogger", Recorded)
    monkeypatch.setattr("lightning.pytorch.loggers.MLFlowLogger", Recorded)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Html=lambda path: ("page", path)))
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(get_tracking_uri=lambda: "file:somewhere"))
    monkeypatch.setattr(loggers, "find_spec", lambda name: True)
    monkeypatch.setattr("ccl_fast.commands.report.write_page", write_no_page)
    return Recorded.calls


def test_what_wandb_is_given(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_DIR", "here")
    report = train(tmp_path / "run", **TINY, loggers="wandb")
    common = {"group": str(tmp_path / "run"), "project": "mine", "save_dir": "here"}
    made = [call[2] for call in recorded if call[0] == "made"]
    assert made == [
        {"name": "run warm-up", "version": None, **common},
        {"name": "run ccl", "version": None, **common},
        {"name": "run ccl", "version": "the-run", **common},  # the same run again, for the results
    ]
    arguments = [call[1] for call in recorded if call[0] == "log_hyperparams"]
    assert arguments == [report["arguments"]] * 3
    logged = [(call[2], dict(call[1])) for call in recorded if call[0] == "log_metrics"]
    of_epochs = [(line["epoch"], numbers(line)) for line in lines_of(tmp_path / "run")]
    assert logged == [*of_epochs, (3, measures(report))]
    assert ("experiment.log", {"report": ("page", str(tmp_path / "run" / "report.html"))}) in recorded
    assert sum(call[0] == "experiment.finish" for call in recorded) == 3


def test_what_mlflow_is_given(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    report = train(tmp_path / "run", **TINY, loggers="mlflow")
    made = [call[1:] for call in recorded if call[0] == "made"]
    of_run = {"run_name": "run ccl", "tracking_uri": "file:somewhere"}
    assert made[1:] == [(("mine",), {**of_run, "run_id": None}), (("mine",), {**of_run, "run_id": "the-run"})]
    arguments = [call[1] for call in recorded if call[0] == "log_hyperparams"]
    assert arguments == [report["arguments"]] * 2  # it takes them once a run
    assert ("log_metrics", measures(report), 3) in recorded
    assert ("artifact", "the-run", str(tmp_path / "run" / "report.html")) in recorded
    assert sum(call == ("finalize", "success") for call in recorded) == 3


def test_a_logger_that_fails_costs_a_line(told, tmp_path, capsys):
    told.append("fail")
    report = train(tmp_path / "run", **TINY, loggers="wandb")
    error = capsys.readouterr().err
    assert "loggers: wandb could not take epoch 1 of warm-up (ConnectionError: gone)" in error
    assert "loggers: wandb could not take epoch 3 of ccl" in error
    assert len(report["losses"]["ccl"]) == 3


def test_a_logger_that_cannot_begin_is_told_before_anything_is_trained(told, tmp_path, capsys, monkeypatch):
    told.append("refuse")
    monkeypatch.setattr(Run, "_step", lambda *_: pytest.fail("trained"))
    options = [f"--{name}={value}" for name, value in TINY.items() if name != "baseline"]
    assert main(["train", f"--output={tmp_path / 'run'}", *options, "--loggers=[csv,wandb]"]) == 2
    assert "error: loggers: expected wandb to begin or go on with a run, got ConnectionError" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None if name == "mlflow" else object())
    Config(loggers=["wandb", "csv"]).check()
    with pytest.raises(ArgumentError, match=r"^loggers: expected the package of 'mlflow' .* \(pip install mlflow\)"):
        Config(loggers=["csv", "mlflow"]).check()
    for wrong in ("comet", ["csv", "neptune"], 3, None):
        with pytest.raises(ArgumentError, match=r"^loggers: expected"):
            Config(loggers=wrong).check()
    Config(loggers=[]).check()


@pytest.mark.slow
def test_tables_are_dropped_with_the_run_that_is_overwritten(tmp_path):
    small = TINY | {"epochs": 1, "warmup_epochs": 0}
    train(tmp_path / "run", **small, loggers="csv")
    (tmp_path / "run" / "csv" / "mine.txt").write_text("mine")
    train(tmp_path / "run", **small, loggers=[], overwrite=True)
    assert [path.name for path in (tmp_path / "run" / "csv").iterdir()] == ["mine.txt"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs
def test_mlflow_has_one_run_for_each_stage(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr("ccl_fast.commands.report.write_page", write_no_page)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    try:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            stop_after(patch, 5)
            train(tmp_path / "run", **TINY, loggers="mlflow")
        report = train(tmp_path / "run", **TINY, loggers="mlflow", device="cpu", resume=True)
        client = mlflow.MlflowClient()
        (experiment,) = (e for e in client.search_experiments() if e.name == "ccl-fast")
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert runs.keys() == {"run warm-up", "run ccl"}
        run = runs["run ccl"]
        assert (run.data.params["batch_size"], run.info.status) == ("50", "FINISHED")
        losses = client.get_metric_history(run.info.run_id, "loss")
        assert [(m.step, m.value) for m in losses] == [(e, report["losses"]["ccl"][e - 1]) for e in (2, 3)]
        assert measures(report).items() <= run.data.metrics.items()
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # theirs
def test_wandb_has_one_run_for_each_stage(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ccl_fast.commands.report.write_page", write_no_page)
    train(tmp_path / "run", **TINY, loggers="wandb")
    folders = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 3 and len(set(folders)) == 2  # one for the warm-up, two of the same run
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/html/report*.html"))

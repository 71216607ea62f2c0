# ruff: noqa: E402 (the extra must be there)
"""No work is lost: whatever stops a run, it goes on from its last checkpoint as if nothing had been."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import yaml

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from safetensors.torch import load_file

from ccl_fast.commands import train
from ccl_fast.commands.command_line import main
from ccl_fast.errors import ArgumentError
from ccl_fast.training import checkpoint
from ccl_fast.training.checkpoint import CheckpointError
from ccl_fast.training.interruption import Interrupted, Interruption
from ccl_fast.training.loop import Run
from tests.data.noise import Noise

pytestmark = pytest.mark.xdist_group("test_resume")  # one process has the runs that all tests share

TINY = {"epochs": 4, "warmup_epochs": 2, "clusters": 4, "in_classes": [0, 7], "batch_size": 25, "baseline": False}
TINY |= {"far_ood": [], "limit": 100}
OPTIONS = ["--no-baseline", *(f"--{name}={value}" for name, value in TINY.items() if name != "baseline")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, no_page):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(str(folder), **TINY)
    return folder


def assert_same_end(folder, whole):
    ours, theirs = (load_file(f / "ccl.safetensors") for f in (folder, whole))
    assert all(ours[name].equal(value) for name, value in theirs.items())
    results = [json.loads((f / "report.json").read_text())["results"] for f in (folder, whole)]
    assert results[0] == results[1]
    assert (folder / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def start(folder, *options):
    command = [
        sys.executable,
        "-m",
        "ccl_fast",
        "train",
        f"--output={folder}",
        *OPTIONS,
        *options,
    ]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_epoch(folder, epoch, process):
    lines = folder / "metrics.jsonl"
    for _ in range(30_000):
        if lines.exists() and lines.read_text().count("\n") >= epoch:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("no epoch in five minutes")


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 3])
def test_killed_in_the_middle_of_an_epoch(tmp_path, whole, epoch):
    folder = tmp_path / "run"
    process = start(folder)
    wait_for_epoch(folder, epoch, process)
    process.kill()
    process.communicate()
    assert not (folder / "report.json").exists()
    assert main(["train", f"--output={folder}", *OPTIONS, "--resume"]) == 0
    assert_same_end(folder, whole)


def test_asked_to_stop_it_saves_and_goes_on(tmp_path, whole, monkeypatch, capsys):
    folder, arguments = tmp_path / "run", [f"--output={tmp_path / 'run'}", *OPTIONS]

    def step(run, *batch, original=Run._step):
        if run.step == 6:  # in the middle of the second epoch
            signal.raise_signal(signal.SIGTERM)
        return original(run, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", step)
        assert main(["train", *arguments]) == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM; saved to {folder}" in capsys.readouterr().err
    assert checkpoint.load(folder / "checkpoints")["run"]["step"] == 7
    assert main(["train", *arguments, "--resume"]) == 0
    assert_same_end(folder, whole)


def test_a_finished_run_can_be_lengthened_as_if_it_had_been_planned_so(tmp_path, monkeypatch, no_page, capsys):
    both = TINY | {"baseline": True, "probe_every": 3, "epochs": 6, "optimizer": "sgd", "learning_rate": 0.05}
    train(tmp_path / "planned", **both, restarts=[4])
    planned = [json.loads(line) for line in (tmp_path / "planned" / "metrics.jsonl").read_text().splitlines()]
    rates = {line["epoch"]: line["learning_rate"] for line in planned}
    # Of an epoch's last step, of 4 epochs of 4 steps, and of 2.
    assert rates[4] == pytest.approx(0.05 * (1 + math.cos(math.pi * 15 / 16)) / 2)
    assert rates[5] == pytest.approx(0.05 * (1 + math.cos(math.pi * 3 / 8)) / 2)
    assert rates[6] == pytest.approx(0.05 * (1 + math.cos(math.pi * 7 / 8)) / 2)

    folder = tmp_path / "run"
    train(folder, **both | {"epochs": 4, "warmup_epochs": None})
    assert main(["train", f"--output={folder}", "--resume", "--epochs=3"]) == 2  # shorter is another run

    def step(run, *batch, original=Run._step):
        if run.config.objective == "ccl" and run.step == 18:  # in the fifth epoch, SimCLR's sixth is done
            signal.raise_signal(signal.SIGTERM)
        return original(run, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", step)
        assert main(["train", f"--output={folder}", "--resume", "--epochs=6"]) == 128 + signal.SIGTERM
    assert "simclr 2, ccl 2" in capsys.readouterr().out
    train(folder, resume=True)
    for name in ("ccl", "simclr"):
        ours, theirs = (load_file(f / f"{name}.safetensors") for f in (folder, tmp_path / "planned"))
        assert all(ours[key].equal(value) for key, value in theirs.items())
    reports = [json.loads((f / "report.json").read_text()) for f in (folder, tmp_path / "planned")]
    assert reports[0]["results"] == reports[1]["results"] and reports[0]["log"] == reports[1]["log"]
    own = {"output": "", "resume": False}
    assert reports[0]["arguments"] | own == reports[1]["arguments"] | own
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted(lines, key=str) == sorted(planned, key=str)


def test_what_is_not_finished_is_not_lengthened(tmp_path, monkeypatch):
    def step(run, *batch, original=Run._step):
        if run.step == 9:
            signal.raise_signal(signal.SIGTERM)
        return original(run, *batch)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Run, "_step", step)
        train(tmp_path / "run", **TINY)
    with pytest.raises(ArgumentError, match=r"^epochs: expected 4, as the run .* that is finished can be lengthened"):
        train(tmp_path / "run", resume=True, epochs=9)
    with pytest.raises(ArgumentError, match=r"^restarts: expected epochs from 2 on"):
        train(tmp_path / "other", **TINY, restarts=[1])
    with pytest.raises(ArgumentError, match=r"^restarts: expected fewer than epochs=4"):
        train(tmp_path / "other", **TINY, restarts=[4])
    with pytest.raises(ArgumentError, match=r"^restarts: expected ascending positive integers"):
        train(tmp_path / "other", **TINY, restarts=[3, 3])


def test_from_python_what_is_not_given_is_as_in_the_run(tmp_path, whole, monkeypatch):
    def step(run, *batch, original=Run._step):
        if run.step == 6:
            signal.raise_signal(signal.SIGTERM)
        return original(run, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", step)
        with pytest.raises(Interrupted):
            train(tmp_path / "runs" / "a", **TINY)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"^clusters: expected 4, as the run to resume has it .*, got 5"):
        train(resume=True, clusters=5)
    with pytest.raises(ArgumentError, match=r"^overwrite: expected False when resuming"):
        train("runs/a", resume=True, overwrite=True)
    train(resume=True, device="cpu")
    assert_same_end(tmp_path / "runs" / "a", whole)


def test_from_python_what_no_file_can_keep_is_asked_for(tmp_path):
    options = {"baseline": False, "epochs": 1, "warmup_epochs": 0, "batch_size": 16, "clusters": 2, "far_ood": []}
    data = Noise(40, 0), Noise(9, 1)
    train(tmp_path / "run", data=data, near_ood={"mine": Noise(9, 2)}, **options)
    for missing, given in (("data", {}), ("near_ood", {"data": data})):
        with pytest.raises(ArgumentError, match=f"^{missing}: expected the one that the run was trained with, as no"):
            train(tmp_path / "run", resume=True, **given)
    assert train(tmp_path / "run", resume=True, data=data, near_ood={"mine": Noise(9, 2)})


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_says_how_to_go_on_and_exits_with_the_signals_code(tmp_path, whole, number):
    folder = tmp_path / "my run's"
    process = start(folder)
    wait_for_epoch(folder, 1, process)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; saved to {folder}" in error
    assert "Traceback" not in error
    assert checkpoint.load(folder / "checkpoints")["run"]["step"] > 4
    program, *advised = shlex.split(error.splitlines()[-1])  # as it can be pasted
    assert program == "ccl-fast"
    assert main(advised) == 0
    assert_same_end(folder, whole)


def test_a_finished_run_can_be_resumed_and_gives_the_same_report(tmp_path, whole, capsys):
    before = (whole / "report.json").read_text()
    train(str(whole), **TINY, resume=True)
    assert "images: none is left (--epochs above 4 lengthens the run)" in capsys.readouterr().out
    first, again = json.loads(before), json.loads((whole / "report.json").read_text())
    assert first["results"] == again["results"]


def test_resuming_from_the_previous_checkpoint_is_not_for_ever(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    train(folder, **TINY, resume=True, resume_from="previous")
    assert yaml.safe_load((folder / "config.yaml").read_text())["resume_from"] == "last"
    assert_same_end(folder, whole)


def test_other_images_are_not_gone_on_with(tmp_path):
    options = {"baseline": False, "epochs": 2, "batch_size": 16, "clusters": 2, "near_ood": ["noise"], "far_ood": []}
    train(tmp_path / "run", data=(Noise(40, 0), Noise(9, 1)), **options)
    for n, seed in ((39, 0), (41, 0), (40, 2)):
        with pytest.raises(ArgumentError, match=r"^data: expected the training images of the run to resume"):
            train(tmp_path / "run", data=(Noise(n, seed), Noise(9, 1)), **options, resume=True)
    train(tmp_path / "run", data=(Noise(40, 0), Noise(9, 1)), **options, resume=True)


def test_a_checkpoint_of_something_else_is_named(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    torch.save(load_file(whole / "ccl.safetensors"), folder / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match="none of a training run"):
        train(folder, **TINY, resume=True)


def test_only_the_same_run_can_be_resumed(whole, tmp_path, capsys, monkeypatch):
    with pytest.raises(ArgumentError, match=r"^clusters: expected 4, as the run to resume has it .*, got 5"):
        train(str(whole), **TINY | {"clusters": 5}, resume=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        train(str(tmp_path / "nothing"), **TINY, resume=True)
    assert not (tmp_path / "nothing").exists()
    monkeypatch.chdir(tmp_path)
    assert main(["train", *OPTIONS, "--resume"]) == 2
    assert "there is nothing to resume in runs" in capsys.readouterr().err
    assert main(["train", f"--output={whole}", "--resume", "--epochs=3"]) == 2
    assert "epochs: expected 4, as the run to resume has it" in (said := capsys.readouterr().err)
    assert "half a cosine that ends at 0" in said
    assert main(["train", f"--output={whole}", *OPTIONS, "--resume", "--overwrite"]) == 2
    assert "overwrite: expected False when resuming" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", *(pytest.param(d, marks=pytest.mark.slow) for d in ("empty", "foreign"))]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_can_be_used(tmp_path, whole, damage, capsys):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / "checkpoints" / name).write_bytes((whole / "checkpoints" / name).read_bytes())
    last = folder / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        for i in range(len(content) // 2, len(content) // 2 + 256):  # more than the padding between an archive's parts
            content[i] ^= 0xFF
    elif damage == "empty":
        content = b""
    else:
        content = b"not a checkpoint" * 100
    last.write_bytes(content)
    assert main(["train", f"--output={folder}", *OPTIONS, "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"the checkpoint {last} " in error
    assert "resume_from=previous" in error
    assert "Traceback" not in error
    assert main(["train", f"--output={folder}", *OPTIONS, "--resume", "--resume_from=previous"]) == 0
    assert_same_end(folder, whole)


def test_a_checkpoint_holds_no_code(tmp_path):
    (tmp_path / "last.ckpt").parent.mkdir(exist_ok=True)
    torch.save({"state": threading.Event}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path)


def test_a_disk_that_fills_leaves_the_last_checkpoint_as_it_was(tmp_path):
    # A limit on the size of files stands in for a full disk: writing fails half-way.
    script = """
import resource, signal, sys, torch
from pathlib import Path
from ccl_fast.training import checkpoint
folder = Path(sys.argv[1])
checkpoint.save(folder, {"value": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(folder, {"value": torch.zeros(100_000)})
except OSError as error:
    print("OSError", error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.startswith("OSError"), done.stderr
    assert checkpoint.load(tmp_path) == {"value": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_the_log_has_a_line_for_every_epoch(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"], line["step"]) for line in lines] == [
        ("warm-up", 1, 4),
        ("warm-up", 2, 8),
        ("ccl", 3, 12),
        ("ccl", 4, 16),
    ]
    losses = json.loads((whole / "report.json").read_text())["losses"]["ccl"]
    assert [line["loss"] for line in lines] == losses
    assert "changed_labels" not in lines[2]
    assert 0 <= lines[3]["changed_labels"] < 0.9
    assert 0 < lines[3]["smallest_cluster"] <= 25 <= lines[3]["largest_cluster"] <= 100


def test_a_second_signal_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.received is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before
    with Interruption() as interruption:
        assert interruption.received is None


def test_a_run_in_a_thread_leaves_signals_alone():
    seen = []

    def run():
        with Interruption():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]

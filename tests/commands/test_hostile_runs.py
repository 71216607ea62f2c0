# ruff: noqa: E402 (the extra must be there)
"""Run folders that are damaged, forged or fought for, and terminals that go away: a line each, and no result lost."""

import csv
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from torchvision.utils import save_image

from ccl_fast.commands import evaluate, score, train
from ccl_fast.commands.command_line import main
from ccl_fast.commands.output import lasting_output
from ccl_fast.commands.plain_yaml import read_yaml
from ccl_fast.commands.run_folder import held
from ccl_fast.commands.tensor_files import read_tensors, write_tensors
from ccl_fast.errors import ArgumentError
from ccl_fast.files import UNFINISHED, write_atomically
from ccl_fast.training.checkpoint import CheckpointError
from tests.data.noise import Noise

pytestmark = pytest.mark.xdist_group("test_hostile_runs")  # one process has the run that all tests share

TINY = {"epochs": 2, "warmup_epochs": 1, "clusters": 2, "batch_size": 32, "limit": 64, "baseline": False}
TINY |= {"in_classes": [0, 7], "far_ood": [], "probe_every": 0}
OPTIONS = ["--no-baseline", *(f"--{name}={value}" for name, value in TINY.items() if name != "baseline")]
LETTERS = "abcdefghijkl"
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in itertools.pairwise(LETTERS))


@pytest.fixture(scope="module")
def run(tmp_path_factory, no_page):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, **TINY)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def flip(path, at):
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_one_flipped_bit_of_the_weights_is_noticed(copy, tmp_path, capsys):
    flip(copy / "ccl.safetensors", (copy / "ccl.safetensors").stat().st_size // 2)
    with pytest.raises(ArgumentError, match=r"^run: expected weights of this run, got .*ccl\.safetensors"):
        evaluate(copy, tmp_path / "out")
    save_image(torch.rand(3, 8, 8), tmp_path / "image.png")
    assert main(["score", f"--run={copy}", f"--images={tmp_path}", f"--output={tmp_path / 'scores.csv'}"]) == 2
    assert "ccl.safetensors" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_named(copy, tmp_path):
    weights, description, _ = read_tensors(copy / "ccl.safetensors", "weights")
    next(iter(weights.values()))[0] = float("nan")
    write_tensors(copy / "ccl.safetensors", weights, description)
    with pytest.raises(ArgumentError, match=r"ccl\.safetensors \(values that are not finite\)"):
        evaluate(copy, tmp_path / "out")


@pytest.mark.parametrize("key", ["run", "lines", "images", "finished", "stage", "arguments", "model", "nan"])
def test_forged_checkpoints_are_one_line(copy, key):
    last = copy / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    if key == "model":
        state["run"]["model"] = {"weight": torch.ones(3)}
    elif key == "nan":
        next(iter(state["run"]["model"].values())).fill_(float("nan"))
    else:
        state[key] = 7
    state["finished"] = state["finished"] if key == "finished" else {}
    torch.save(state, last)
    with pytest.raises(CheckpointError, match="the checkpoint in") as error:
        train(copy, **TINY, resume=True)
    assert "\n" not in str(error.value)


def test_a_kill_before_the_first_checkpoint_leaves_a_folder_for_the_same_command(run, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / f".config.yaml.1{UNFINISHED}").write_text("output")
    (folder / "checkpoints" / f".last.ckpt.1{UNFINISHED}").write_bytes(b"PK")
    shutil.copy(run / "config.yaml", folder)
    (folder / ".lock").touch()
    train(folder, **TINY)
    assert not list(folder.rglob(f"*{UNFINISHED}"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in run.iterdir())


def test_somebody_elses_config_is_not_taken_for_a_run_that_was_killed(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(FileExistsError, match=r"^output: "):
        train(tmp_path, **TINY)
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"


def test_an_error_before_the_first_checkpoint_leaves_nothing(tmp_path, monkeypatch):
    data = (Noise(40, 0), Noise(9, 1))
    options = TINY | {"in_classes": None, "near_ood": ["noise"], "data": data, "batch_size": 16}
    with monkeypatch.context() as patch:
        patch.setattr("ccl_fast.training.progress.checkpoint.save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", **options)


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_a_folder_that_another_run_writes_to_is_not_touched(copy, how):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()",
            str(copy / ".lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline()
        with pytest.raises(FileExistsError, match=r"^output: expected a folder that no other run is writing to"):
            train(copy, **TINY, **{how: True})
    finally:
        holder.communicate(b"\n")
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"} == before
    train(copy, **TINY, **{how: True})  # once the other has gone, however it went


def test_a_comparison_is_held_too(tmp_path):
    folder = tmp_path / "two"
    with held(folder):
        assert main(["compare", f"--output={folder}", "--overwrite", *OPTIONS[1:]]) == 2
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"arguments": 3}'])
def test_a_damaged_report_of_a_comparison_is_named(tmp_path, content, capsys):
    (tmp_path / "seed1").mkdir()
    (tmp_path / "seed1" / "report.json").write_bytes(content)
    assert main(["compare", f"--output={tmp_path}", "--seeds=[1,2]", "--resume", *OPTIONS[1:]]) == 2
    error = capsys.readouterr().err
    assert "output: expected the report of a run in" in error
    assert len(error.splitlines()) == 1


def test_aliases_of_yaml_are_refused_at_once(copy, tmp_path, capsys):
    assert len(BOMB) < 500
    with pytest.raises(ValueError, match="alias"):
        read_yaml(BOMB)
    (copy / "config.yaml").write_text(BOMB)
    start = time.monotonic()
    with pytest.raises(ArgumentError, match="alias"):
        evaluate(copy)
    with pytest.raises(ArgumentError, match="with its config"):
        train(copy, **TINY, overwrite=True)
    (tmp_path / "bomb.yaml").write_text(BOMB)
    assert main(["train", f"--config={tmp_path / 'bomb.yaml'}"]) == 2
    assert "alias" in capsys.readouterr().err
    assert time.monotonic() - start < 20


def test_no_cell_of_the_table_is_a_formula(copy, tmp_path, monkeypatch):
    names = ["=1+1.png", "+a.png", "-a.png", "@a.png", "\ta.png", "a.png"]
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate(names):
        save_image(torch.full((3, 8, 8), i / 8), folder / name)
    monkeypatch.chdir(folder)
    score(copy, ".", tmp_path / "scores.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "scores.csv").read_text())))
    assert sorted(row["image"] for row in rows) == sorted(["./" + name for name in names[:-1]] + ["a.png"])
    assert all(os.path.exists(row["image"]) for row in rows)


def test_a_file_is_written_through_a_link_and_never_over_what_is_no_file(tmp_path):
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="expected a regular file"):
        write_atomically(tmp_path / "pipe", lambda file: file.write(b"new"))


def test_the_output_of_score_is_a_regular_file(copy, tmp_path):
    save_image(torch.rand(3, 8, 8), tmp_path / "image.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArgumentError, match=r"^output: expected a regular file"):
        score(copy, tmp_path, tmp_path / "pipe", overwrite=True)


def test_nul_in_a_path_is_named(tmp_path, capsys):
    (tmp_path / "nul.yaml").write_text('output: "a\\0b"\n')
    assert main(["train", f"--config={tmp_path / 'nul.yaml'}"]) == 2
    assert "output: expected text without NUL" in capsys.readouterr().err


def test_a_stream_that_fails_is_given_up_with_a_line(monkeypatch, capsys):
    class Full(io.StringIO):
        name = "<full>"

        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with lasting_output():
        print("one")
        print("two")
    error = capsys.readouterr().err
    assert error == "<full> cannot be written to any more ([Errno 28] No space left on device); the work goes on\n"
    assert isinstance(sys.stdout, Full)


@pytest.mark.slow
@pytest.mark.parametrize("redirected", ["2>&-", ">&-", "2>/dev/full", ">/dev/full", "| true"])
def test_training_goes_on_when_nobody_listens(redirected, tmp_path):
    out = tmp_path / "run"
    command = " ".join([sys.executable, "-m", "ccl_fast", "train", f"--output={out}", *map(repr, OPTIONS), redirected])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "report.json").read_text())["results"]
    assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_an_ascii_terminal_gets_escapes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ccl_fast", "score", "--run=nö", "--images=x"],
        capture_output=True,
        timeout=120,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert done.returncode == 2
    assert b"run: expected the folder of a run" in done.stderr
    assert b"Traceback" not in done.stderr

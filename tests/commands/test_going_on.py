# ruff: noqa: E402 (the extra must be there)
"""What is resumed where nothing but --resume is given, and how a run says so."""

import os

import pytest
import yaml

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from ccl_fast.commands import command_line
from ccl_fast.commands.command_line import main
from ccl_fast.commands.run_folder import command_to_go_on, resumed_folder
from ccl_fast.data import located
from ccl_fast.errors import ArgumentError
from ccl_fast.training.config import Config


def begun(folder, age, **options):
    """A folder like that of a run, with its arguments and a checkpoint of that age in seconds."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    os.utime(checkpoint, ns=(0, int(1e18) - age * 10**9))
    (folder / "config.yaml").write_text(yaml.safe_dump(Config(output=folder, **options).plain()))
    return folder


def test_the_newest_run_with_a_checkpoint_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "without").mkdir()
    with pytest.raises(ArgumentError, match=r"^output: .* there is nothing to resume in runs"):
        resumed_folder("train", None)
    begun(tmp_path / "runs" / "old", 9)
    new = begun(tmp_path / "runs" / "new", 1)
    begun(tmp_path / "runs" / "z", 5)
    assert resumed_folder("train", None).resolve() == new
    assert resumed_folder("train", tmp_path / "runs") == new
    assert resumed_folder("train", tmp_path / "runs" / "old") == tmp_path / "runs" / "old"
    assert resumed_folder("train", tmp_path / "typo") == tmp_path / "typo"  # which is told later


def test_resume_alone_has_the_arguments_of_the_run_and_what_is_typed_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = begun(tmp_path / "runs" / "my run", 1, clusters=[3, 5], data="photos/", device="cpu", baseline=False)
    seen = {}
    monkeypatch.setattr(command_line, "_call", lambda name, options: seen.update(options) or 0)
    assert main(["train", "--resume", "--device", "cuda", "--epochs", "41"]) == 0
    assert (tmp_path / seen["output"]).samefile(run) and seen["resume"]
    assert (seen["clusters"], seen["baseline"]) == ([3, 5], False)
    assert (seen["device"], seen["epochs"]) == ("cuda", 41)
    assert seen["data"] == str(tmp_path / "photos")


def test_the_command_to_go_on_can_be_pasted(tmp_path):
    assert command_to_go_on("train", tmp_path / "it's mine") == (
        f"ccl-fast train --output '{tmp_path}/it'\"'\"'s mine' --resume"
    )
    assert command_to_go_on("train", tmp_path, 4) == (
        f"torchrun --nproc-per-node 4 -m ccl_fast train --output {tmp_path} --resume"
    )


def test_folders_are_kept_with_their_whole_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "noise").mkdir()
    kept = Config(
        data="photos", near_ood=["photos/", "held-out", "cifar10"], far_ood={"mine": "photos", "made": "noise"}
    ).plain()
    photos = str(tmp_path / "photos")
    assert kept["data"] == photos
    assert kept["near_ood"] == [photos, "held-out", "cifar10"]
    assert kept["far_ood"] == {"mine": photos, "made": "noise"}
    assert kept["data_root"] == str(tmp_path / "data")
    assert located("noise", is_ood=False) == str(tmp_path / "noise")
    assert Config().plain()["data"] == "digits"

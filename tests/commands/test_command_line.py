# ruff: noqa: E402 (the extra must be there)
"""What is typed: lists without brackets, dashes or underscores, and a line for what is typed wrong."""

import subprocess
import sys

import pytest

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from ccl_fast.commands import command_line
from ccl_fast.commands.command_line import COMMANDS, main
from ccl_fast.training.config import FIELDS, GROUPS
from ccl_fast.version import __version__


@pytest.fixture
def given(monkeypatch):
    """The options that a command gets, which is not run."""
    seen = {}
    monkeypatch.setattr(command_line, "_call", lambda name, options: seen.update(options) or 0)

    def parse(*arguments):
        seen.clear()
        assert main(arguments) == 0
        return dict(seen)

    return parse


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        (["--batch-size", "64"], "batch_size", 64),
        (["--batch_size=64"], "batch_size", 64),
        (["--far-ood", "textures", "noise", "my photos/"], "far_ood", ["textures", "noise", "my photos/"]),
        (["--far_ood", "[textures, photos/]"], "far_ood", ["textures", "photos/"]),
        (["--far-ood=noise"], "far_ood", ["noise"]),
        (["--near-ood", "a, b: c", "[d"], "near_ood", ["a, b: c", "[d"]),
        (["--near-ood", "1", "null"], "near_ood", ["1", "null"]),
        (["--far-ood", "[]"], "far_ood", []),
        (["--in-classes", "cat", "3", "yes", "007"], "in_classes", ["cat", 3, "yes", "007"]),
        (["--clusters", "4"], "clusters", 4),
        (["--clusters", "4", "8", "--epochs", "3"], "clusters", [4, 8]),
        (["--clusters", "[4,8]"], "clusters", [4, 8]),
        (["--no_baseline"], "baseline", False),
        (["--believe", "0.5"], "believe", 0.5),
        ([], "far_ood", None),
    ],
)
def test_what_is_typed_is_what_the_command_gets(given, typed, name, value):
    assert given("train", *typed)[name] == value


def test_what_is_typed_wins_over_a_file(given, tmp_path):
    (tmp_path / "c.yaml").write_text("far_ood: [noise]\nepochs: 3\n")
    options = given("train", "--config", str(tmp_path / "c.yaml"), "--far-ood", "blobs", "letters")
    assert (options["far_ood"], options["epochs"]) == (["blobs", "letters"], 3)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["train", "--lim", "3"], "--lim: expected an option of train (did you mean --limit?)"),
        (
            ["train", "--bach_size", "3"],
            "--bach-size: expected an option of train (did you mean --batch-size or --image-size?)",
        ),
        (["train", "--accumulate", "4"], "--accumulate: expected an option of train (gradients that are added up"),
        (["train", "--accumulate_grad_batches=4"], "--micro-batch has the loss of the whole batch in the memory of a"),
        (["train", "--qqq"], "--qqq: expected an option of train (ccl-fast train --help lists them)"),
        (["train", "--batch-size", "many"], "batch_size: expected an integer, got 'many'"),
        (["train", "--batch-size"], "argument --batch-size: expected one argument"),
        (["train", "--objective=swave"], "got 'swave' (did you mean swav?)"),
        (["train", "--objective=MCR2"], "got 'MCR2' (did you mean coding-rate?)"),
        (["train", "--mcr2", "1"], "--mcr2: expected an option of train (ccl-fast train --help lists them)"),
        (
            ["train", "--augmentation", "x"],
            "augmentation: expected one of 'auto', 'digits', 'simclr', 'weak', 'none', got 'x'",
        ),
        (["train", "--instance-weight", "x"], "instance_weight: expected a number or 'agreement', got 'x'"),
        (["train", "--clusters", "4", "x"], "clusters: expected an integer or a list (of integers), got [4, 'x']"),
        (["train", "photos"], "photos: expected after the name of an option, as in --data photos"),
        (["train", "--config", "/no/such.yaml"], "config: File does not exist: '/no/such.yaml'"),
        (
            ["trian"],
            "expected a command, train, compare, evaluate, score, embed, export, got 'trian' (did you mean train?)",
        ),
        (["--epochs", "3"], "expected a command"),
    ],
)
def test_what_is_typed_wrong_is_a_line(typed, said, capsys):
    assert main(typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ccl-fast") and ": error: " in line
    assert said in line


def test_an_unknown_option_in_a_file_is_named(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("epoch: 3\n")
    assert main(["train", f"--config={tmp_path / 'c.yaml'}"]) == 2
    assert "config: expected options alone, got 'epoch' (did you mean epochs?)" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("gradient_accumulation_steps: 3\n")
    assert main(["train", f"--config={tmp_path / 'c.yaml'}"]) == 2
    assert "got 'gradient_accumulation_steps' (gradients that are added up" in capsys.readouterr().err


def test_missing_options_are_named(capsys):
    assert main(["score"]) == 2
    assert capsys.readouterr().err == "ccl-fast score: error: required: run, images\n"


def test_the_help_has_every_option_under_its_title(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    places = [text.index(f"\n{title}:\n") for title in GROUPS.values()]
    assert places == sorted(places)
    assert {field.metadata["group"] for field in FIELDS.values()} == set(GROUPS)
    words = " ".join(text.split())
    for name, field in FIELDS.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.metadata["help"].replace("``", "") in words
    assert "--far-ood FAR_OOD ..." in text and "--batch-size BATCH_SIZE" in text
    assert "_size" not in text and "Sequence" not in text and "``" not in text


def test_the_overview_has_the_first_lines_of_the_commands(capsys):
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, command in COMMANDS.items():
        assert command_line._function(name).__doc__.partition("\n")[0] == command.summary
        assert f"{name} {command.summary}" in text
    assert main([]) == 2
    assert capsys.readouterr().err.split() == text.split()


def test_help_and_version_wait_for_nothing_that_only_training_needs():
    code = """
import sys
from ccl_fast.__main__ import command
for arguments in (["--version"], ["--help"], ["train", "--help"], ["train", "--lim"]):
    sys.argv[1:] = arguments
    try:
        command()
    except SystemExit:
        pass
slow = {"torchvision", "lightning", "kornia", "torchmetrics", "matplotlib", "sklearn", "tensorboard", "mlxtend"}
sys.exit(f"imported {slow & sys.modules.keys()}" if slow & sys.modules.keys() else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"ccl-fast {__version__}\n")

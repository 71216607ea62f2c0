# ruff: noqa: E402 (the extra must be there)
"""What reports say of their run: the command that repeats it, what its arguments came to, where it was run."""

import shlex
from types import SimpleNamespace

import pytest
import torch

for extra in ("torchmetrics", "matplotlib", "jinja2", "kornia", "jsonargparse"):
    pytest.importorskip(extra)  # the extra "train"

from ccl_fast.commands import environment
from ccl_fast.commands.command_line import _parsed
from ccl_fast.commands.environment import describe_environment, find_commit
from ccl_fast.commands.reproduction import command_line, resolved
from ccl_fast.training.config import Config

GIVEN = [
    {},
    {"data": "it's $HOME/a b", "data_root": "/x", "in_classes": [4, 5], "near_ood": ["held-out", "photos, old/"]},
    {"far_ood": [], "clusters": [10, 20], "baseline": False, "strict": True, "limit": 50, "image_size": 96},
    {"learning_rate": 1e-5, "weight_decay": 0.0, "ema": 0.99, "believe": 1.0, "instance_weight": 0.25, "seed": 7},
    {"objective": "swav", "precision": "bf16-mixed", "warmup_epochs": 0, "warmup_from": "runs/ä", "device": "cuda:1"},
]


@pytest.mark.parametrize("given", GIVEN)
def test_the_command_line_gives_the_arguments_again(given):
    once = {"output": "runs/a", "overwrite": True, "resume": True, "resume_from": "previous"}
    arguments = Config(**given).plain()
    words = shlex.split(command_line(arguments | once))
    assert words[:2] == ["ccl-fast", "train"] and len(words) <= 2 + 2 * len(given)
    assert Config(**_parsed("train", words[2:])).plain() == arguments


@pytest.mark.parametrize("name", ["backbone", "data", "near_ood"])
def test_no_command_line_gives_objects(name):
    objects = {"backbone": torch.nn.Linear(2, 2), "data": (object(), object()), "near_ood": {"mine": object()}}
    assert command_line(Config(**{name: objects[name]}).plain()) is None


def test_resolved_arguments_are_those_used():
    sets = SimpleNamespace(train=SimpleNamespace(shape=(3, 32, 32)), near={"held-out": 0}, far={"noise": 0, "blobs": 0})
    arguments = Config(epochs=10, clusters=9).plain()
    used = resolved(arguments, sets, torch.device("cpu"))
    assert used.keys() == arguments.keys()
    different = {name: value for name, value in used.items() if value != arguments[name]}
    assert different == {
        "near_ood": ["held-out"],
        "far_ood": ["noise", "blobs"],
        "image_size": 32,
        "augmentation": "simclr",
        "warmup_epochs": 5,
        "device": "cpu",
    }


def test_environment_has_versions_and_the_commit_if_it_is_known(monkeypatch):
    found = describe_environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__ and found["numpy"] and found["threads"] == torch.get_num_threads()
    assert None not in found.values() and "cuda" not in found
    monkeypatch.setattr(environment, "find_commit", lambda: None)
    assert "commit" not in describe_environment(torch.device("cpu"))
    monkeypatch.setattr(environment, "_git", lambda *_: None)
    monkeypatch.setattr(environment.metadata, "distribution", lambda _: SimpleNamespace(read_text=lambda _: None))
    assert find_commit() is None
    of_pip = '{"vcs_info": {"commit_id": "abc", "vcs": "git"}}'
    monkeypatch.setattr(environment.metadata, "distribution", lambda _: SimpleNamespace(read_text=lambda _: of_pip))
    assert find_commit() == "abc"
    answers = {"ls-files": "environment.py", "rev-parse": "123", "status": " M ccl_fast/files.py"}
    monkeypatch.setattr(environment, "_git", lambda _, command, *__: answers[command])
    assert find_commit() == "123+"
    answers["status"] = ""
    assert find_commit() == "123"

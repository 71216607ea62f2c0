# ruff: noqa: E402 (the extra must be there)
"""Training on several processes: the same run, each process its part of it, and together in what goes wrong."""

import contextlib
import copy
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils.data import Dataset, TensorDataset

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from safetensors.torch import load_file

from ccl_fast import CCLLoss
from ccl_fast.commands import train
from ccl_fast.commands.command_line import main
from ccl_fast.data.images import InMemory
from ccl_fast.training import cached_backward, checkpoint
from ccl_fast.training.config import Config
from ccl_fast.training.launch import launched
from ccl_fast.training.loop import Run
from tests.processes import run as run_in_processes

pytestmark = pytest.mark.xdist_group("test_distributed")

# Uneven: of 75 images one process has 37 and the other 38, which are two micro-batches.
TINY = {"epochs": 4, "warmup_epochs": 2, "clusters": 4, "in_classes": [0, 7], "batch_size": 75, "limit": 300}
TINY |= {"far_ood": [], "micro_batch": 37, "concentration": True, "ema": 0.5}
OPTIONS = [f"--{name}" if value is True else f"--{name}={value}" for name, value in TINY.items()]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


# ---- the command in processes of its own ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    report, nothing = run_in_processes(attempt, 2, {**TINY, "output": folder}, timeout=240)
    assert isinstance(report, dict), report
    assert nothing is None
    return folder


def start(folder, *options, processes=2):
    """The processes as torchrun starts them, without torchrun: it hides exit codes."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", "ccl_fast", "train", f"--output={folder}", *OPTIONS, *options]
    return [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]


def wait_for_epoch(folder, epoch, started):
    lines = folder / "metrics.jsonl"
    for _ in range(6000):
        if lines.exists() and lines.read_text().count("\n") >= epoch:
            return
        for process in started:
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError("no epoch in a minute")


def ends(started):
    """What the processes wrote to stderr, and their exit codes."""
    errors = [process.communicate(timeout=60)[1] for process in started]
    return errors, [process.returncode for process in started]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_end(folder, whole):
    assert lines_of(folder) == lines_of(whole)  # first: it tells from where on they differ
    for objective in ("simclr", "ccl"):
        ours, theirs = (load_file(f / f"{objective}.safetensors") for f in (folder, whole))
        assert ours.keys() == theirs.keys()
        distances = {name: (ours[name] - value).abs().max() for name, value in theirs.items()}
        assert not any(distances.values()), distances


def test_two_processes_train_both_objectives(whole):
    assert (whole / "tensorboard" / "ccl").is_dir()
    report = json.loads((whole / "report.json").read_text())
    assert report["results"].keys() == report["losses"].keys() == {"simclr", "ccl"}
    lines = lines_of(whole)
    assert [(line["stage"], line["epoch"], line["step"]) for line in lines] == [
        ("warm-up", 1, 4),
        ("warm-up", 2, 8),
        ("simclr", 3, 12),
        ("simclr", 4, 16),
        ("ccl", 3, 12),
        ("ccl", 4, 16),
    ]
    assert 0 < lines[5]["smallest_cluster"] <= 75 <= lines[5]["largest_cluster"] <= 300
    assert 0 <= lines[5]["changed_labels"] <= 1
    assert lines[0]["loss"] > lines[3]["loss"]


@pytest.mark.slow
def test_torchrun_trains_the_same_and_writes_once(whole, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "ccl_fast", "train", f"--output={folder}", *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert (folder / "report.html").exists()
    assert_same_end(folder, whole)


@pytest.mark.slow
def test_stopped_and_killed_it_goes_on_as_if_nothing_had_been(whole, tmp_path, no_page):
    folder = tmp_path / "run"
    started = start(folder)
    wait_for_epoch(folder, 1, started)
    started[1].send_signal(signal.SIGTERM)  # one of them is enough
    errors, codes = ends(started)
    assert codes == [128 + signal.SIGTERM] * 2
    assert f"stopped by SIGTERM; saved to {folder}" in errors[0]
    assert "Traceback" not in "".join(errors)
    stopped = checkpoint.load(folder / "checkpoints")
    assert stopped["run"]["step"] > 4
    shutil.copytree(folder, tmp_path / "alone")

    started = start(folder, "--resume", "--timeout=20")
    wait_for_epoch(folder, 3, started)
    started[1].kill()
    errors, codes = ends(started)
    # Seldom, on a busy machine, gloo aborts the process in a thread of its own (docs/scaling.md).
    assert codes in ([1, -signal.SIGKILL], [-signal.SIGABRT, -signal.SIGKILL])
    if codes[0] == 1:
        assert "process 0 of 2 has lost another one" in errors[0]
        assert f"the last good checkpoint is {folder}" in errors[0]
        assert "Traceback" not in errors[0]

    results = run_in_processes(attempt, 2, {**TINY, "output": folder, "resume": True}, timeout=120)
    assert [type(result) for result in results] == [dict, type(None)]
    assert_same_end(folder, whole)

    # Another number of processes goes on too, with other random numbers.
    report = train(tmp_path / "alone", **TINY, resume=True)
    assert len(report["losses"]["ccl"]) == 4
    assert report["losses"]["ccl"][0] == json.loads((folder / "report.json").read_text())["losses"]["ccl"][0]
    assert report["losses"]["ccl"] == pytest.approx(results[0]["losses"]["ccl"], rel=0.2)


@pytest.mark.slow
def test_stopped_at_any_step_it_ends_with_the_same_bits(tmp_path):
    given = {**TINY, "output": tmp_path / "whole"}
    run_in_processes(attempt, 2, given, timeout=120)
    for stop in (6, 12, 22):  # within the warm-up, at the end of an epoch of SimCLR, within CCL
        given = {**TINY, "output": tmp_path / str(stop)}
        for name, words in run_in_processes(attempt, 2, given, stop, timeout=120):
            assert name == "Interrupted" and "stopped by SIGTERM" in words
        run_in_processes(attempt, 2, given | {"resume": True}, timeout=120)
        assert_same_end(tmp_path / str(stop), tmp_path / "whole")


def test_what_several_processes_cannot_do_is_said(monkeypatch, tmp_path, capsys):
    def fails_with(text, *command):
        assert main(command) == 2
        assert text in capsys.readouterr().err

    monkeypatch.setenv("WORLD_SIZE", "2")
    fails_with("compare: expected one process, as only train runs on several, got 2", "compare")
    fails_with("evaluate: expected one process", "evaluate", "--run=x")
    fails_with("score: expected one process", "score", "--run=x", "--images=y")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    fails_with("torchrun: expected RANK and LOCAL_RANK beside WORLD_SIZE=2", "train", f"--output={tmp_path / 'run'}")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("ccl_fast.training.launch._met", True)
    fails_with("torchrun: expected one run in each process", "train", f"--output={tmp_path / 'run'}")


# ---- functions in processes that the tests share ----


@contextlib.contextmanager
def torchrun():
    """Within ``with``, the environment that torchrun would give to the processes of the default group."""
    ours = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ours.items():
            patch.setenv(name, str(value))
        patch.setattr("ccl_fast.commands.report.write_page", lambda path, *_: path.touch() or [])
        yield


def attempt(arguments, stop=None):
    """What ``train`` returns, or the name of its error and its words; one process gets SIGTERM in that step of all."""
    steps = itertools.count(1)

    def step(run, *batch, original=Run._step):
        if next(steps) == stop and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return original(run, *batch)

    with torchrun(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_step", step)
        patch.setattr("ccl_fast.commands.report.write_page", lambda path, *_: path.touch() or [])  # it takes seconds
        try:
            return train(**arguments)
        except Exception as error:
            return type(error).__name__, str(error)


class Unreadable(Dataset):
    """Noise; on one process one of the images cannot be read when it is needed."""

    def __init__(self, rank):
        self.rank, self.reads = rank, 0

    def __len__(self):
        return 40

    def __getitem__(self, i):
        self.reads += i == 0
        if i == 0 and self.reads > 1 and dist.get_rank() == self.rank:
            raise OSError("the disk is on fire")
        return torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(i)), i % 2


class Different(Dataset):
    """Other images on every process."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return torch.full((1, 8, 8), dist.get_rank() / 2), i % 2


def test_an_error_of_one_is_an_error_of_all(whole, tmp_path):
    def fails_with(name, text, **given):
        base = TINY | {"output": tmp_path / "new"}
        for result in run_in_processes(attempt, 2, base | given):
            assert result[0] == name, result
            assert text in result[1], result
        assert not (tmp_path / "new").exists()

    fails_with("FileExistsError", "output: expected a folder that does not exist yet", output=whole)
    fails_with("CheckpointError", "there is no checkpoint", resume=True)
    fails_with("ArgumentError", "clusters: expected 4, as the run to", output=whole, resume=True, clusters=5)
    fails_with("ArgumentError", "batch_size: expected at most 300", batch_size=301)
    fails_with("ArgumentError", "device: expected", device="abacus")
    fails_with("FloatingPointError", "at step 1", learning_rate=1e30)
    few = {"in_classes": None, "limit": None, "batch_size": 20, "near_ood": ["noise"]}
    fails_with("ArgumentError", "data: expected the same training images on every process", data=Different(), **few)
    # Read when they are needed, image 0 for the second time in training; where it is, the others know only by hearsay.
    for rank in (0, 1):
        data = (Unreadable(rank), TensorDataset(torch.rand(9, 1, 8, 8), torch.arange(9) % 2))
        fails_with("ArgumentError", "the disk is on fire", data=data, image_memory=0.0, **few)


def smooth():
    """Without BatchNorm or dropout, every image passes by itself."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh())


PLAIN = {"augmentation": "none", "batch_size": 13, "clusters": [4, 3], "embedding_dim": 6, "concentration": True}
PLAIN |= {"epochs": 3, "warmup_epochs": 1}


def go_through(given, state=None):
    """Three epochs of 3 steps, one of them warm-up: the states after every step."""
    config = Config(**PLAIN | {"backbone": smooth()} | given)
    images = InMemory(torch.randint(256, (41, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8))
    states = []
    place = torchrun() if dist.is_initialized() else contextlib.nullcontext()
    with place, launched("cpu", config.precision, 60) as (fabric, group):
        run = Run(config, images, fabric, group)
        if state is not None:
            run.load_state_dict(state)
        run.advance(3, after_step=lambda: states.append(run.state_dict()))
    return states


def assert_identical(ours, theirs):
    assert_close(ours, theirs, rtol=0, atol=0)


def assert_same_numbers(ours, theirs):
    """Up to the order in which float32 numbers are added."""
    for name in ("step", "losses", "step_losses", "log"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    for (k, mine), (_, other) in zip(*(enumerate(s["pseudo_labels"]) for s in (ours, theirs)), strict=True):
        assert mine["ids"].equal(other["ids"]), k
        assert_close(mine, other, rtol=1e-4, atol=1e-5)
    for (_, mine), (i, other) in zip(*(s["optimizer"]["state"].items() for s in (ours, theirs)), strict=True):
        distance = (mine["exp_avg"] - other["exp_avg"]).norm()  # of the gradients
        assert distance <= 1e-4 * other["exp_avg"].norm(), i
    for name in ("model", "prototypes"):
        assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("micro_batch", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_every_step_is_that_of_a_single_process(micro_batch):
    # Of a batch of 13 two processes have 6 and 7, three have 4, 4 and 5: with 4 at a time one of them needs two.
    single = go_through({})
    assert len(single) == 9
    middle = single[4]  # of the first epoch with clusters
    for n in (2, 3):
        everyone = run_in_processes(go_through, n, {"micro_batch": micro_batch})
        for states in everyone:
            assert_identical(states, everyone[0])
        for ours, theirs in zip(everyone[0], single, strict=True):
            assert_same_numbers(ours, theirs)
        # A state is that of any number of processes.
        for resumed in run_in_processes(go_through, n, {"micro_batch": micro_batch}, middle):
            assert_same_numbers(resumed[-1], single[-1])
        assert_same_numbers(go_through({}, everyone[0][4])[-1], single[-1])


@pytest.mark.parametrize(
    "objective",
    [
        *("supcon", "protonce", "coding-rate", "swav"),
        # The losses of these are held to it in tests/losses/test_family_distributed.py too.
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("deepcluster-v2", "pamc", "meow")),
    ],
)
def test_every_step_of_other_objectives_is_that_of_a_single_process(objective):
    given = {"objective": objective, "micro_batch": 4}
    single = go_through(given)
    everyone = run_in_processes(go_through, 2, given)
    assert_identical(everyone[1], everyone[0])
    for ours, theirs in zip(everyone[0], single, strict=True):
        assert_same_numbers(ours, theirs)
    for resumed in run_in_processes(go_through, 2, given, single[4]):
        assert_same_numbers(resumed[-1], single[-1])


class Counting(nn.Sequential):
    """With BatchNorm and dropout; ``seen`` counts the images of training."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        if self.training:
            self.seen += len(images)
        return super().forward(images)


def test_all_have_the_same_state_and_running_statistics_are_means():
    given = {"backbone": Counting(), "augmentation": "digits", "ema": 0.9, "learning_rate": 1e-9}
    first, second = run_in_processes(go_through, 2, given)
    assert_identical(first, second)
    last = first[-1]
    assert last["model"]["encoder.seen"] == 9 * 12  # the first process's, 6 images of two views
    assert last["model"]["encoder.2.num_batches_tracked"] == 9
    # Almost without learning, the batch means of the parts average to that of the whole.
    given["augmentation"] = "none"
    name, whole = "encoder.2.running_mean", go_through(given)[-1]
    (parts, _) = run_in_processes(go_through, 2, given)
    assert_close(parts[-1]["model"][name], whole["model"][name], rtol=0, atol=0.01)
    assert whole["model"][name].abs().max() > 0.05


def test_each_process_draws_its_own_views():
    sets = run_in_processes(views_of_a_step, 2)
    views = torch.cat(sets)
    assert len(views) == 28
    assert len(views.unique(dim=0)) == 28


def views_of_a_step():
    config = Config(**PLAIN | {"backbone": smooth(), "augmentation": "digits", "batch_size": 14})
    images = InMemory(torch.randint(256, (1, 1, 8, 8)).to(torch.uint8).expand(14, -1, -1, -1).clone())
    seen = []
    with torchrun(), launched("cpu", "32-true", 60) as (fabric, group):
        run = Run(config, images, fabric, group)
        run.model.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
        run.advance(1)
    return seen[0]


@pytest.mark.parametrize("micro_batches", [(3, 3), (100, 4), (5, 100)], ids=str)
def test_cached_gradients_of_a_plain_ddp_model_are_those_of_the_whole_batch(micro_batches):
    model, inputs, ids = cached_problem()
    expected = []
    for step in range(3):
        model.zero_grad()
        loss = CCLLoss(0.2)(model(inputs + step).unflatten(0, (-1, 2)), ids, torch.eye(5, 8))
        loss.backward()
        expected.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    for found in run_in_processes(cached_steps, 2, micro_batches):
        assert_close(found, expected, rtol=1e-4, atol=1e-6)


class TimesCalls(nn.Module):
    """Multiplies by the number of its calls."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x * self.calls


def buffers_of_cached_steps(micro_batches):
    model = DistributedDataParallel(nn.Sequential(nn.Linear(12, 8), TimesCalls()))
    before, inputs = [], torch.randn(10, 12)
    for _ in range(3):
        cached_backward(model, inputs, lambda z: z.sum(), micro_batches[dist.get_rank()])
        before.append(model.module[1].calls.item())
    return before


def test_buffers_that_another_process_sends_are_those_of_both_passes():
    """DistributedDataParallel sends those of the first process at the start of a step."""
    assert run_in_processes(buffers_of_cached_steps, 2, (5, 2)) == [[2, 4, 6], [5, 7, 9]]


def cached_problem():
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 8))
    model.register_buffer("constant", torch.ones(1))  # DistributedDataParallel sends buffers, unless told not to
    return model, torch.randn(26, 12, generator=generator), torch.arange(13) % 5


def cached_steps(micro_batches):
    """Loss and gradients of three steps: DistributedDataParallel rearranges its buckets after the first."""
    model, inputs, ids = cached_problem()
    rank, model = dist.get_rank(), DistributedDataParallel(model)
    rows, samples = (slice(0, 10), slice(0, 5)) if rank == 0 else (slice(10, 26), slice(5, 13))
    loss_fn, found = CCLLoss(0.2, process_group="world"), []

    def loss_of(embeddings):
        return loss_fn(embeddings.unflatten(0, (-1, 2)), ids[samples], torch.eye(5, 8))

    for step in range(3):
        model.zero_grad()
        loss = cached_backward(model, inputs[rows] + step, loss_of, micro_batches[rank])
        found.append((loss, [p.grad.clone() for p in model.parameters()]))
    return copy.deepcopy(found)

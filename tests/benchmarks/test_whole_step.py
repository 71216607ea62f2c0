# ruff: noqa: E402 (the extra must be there)
"""The benchmark of a training step: who is timed computes the right gradient, and every row says what it must."""

import json
from dataclasses import replace

import pytest
import torch

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "matplotlib", "lightning", "kornia"):
    pytest.importorskip(extra)  # gradient caching needs the extra "train"


from benchmarks.harness.timing import host_clock
from benchmarks.training import whole_step as training
from benchmarks.training.whole_step import (
    CONTENDERS,
    CPU,
    DRY,
    ON_CPU,
    ON_GPU,
    TOLERANCE,
    VIEWS,
    Training,
    relative_error,
)


def encoder_gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.double().flatten() for parameter in model.encoder.parameters()])


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found - truth).norm() / truth.norm()).item()


def gradient_of(name: str, *, micro_batch: int = 16, evaluating: bool = False) -> torch.Tensor:
    workload = replace(ON_CPU, micro_batch=micro_batch)
    run = Training(workload, CONTENDERS[name], workload.batch(64, CPU))
    run.model.train(not evaluating)
    run.backward()
    return encoder_gradient(run.model)


@pytest.mark.parametrize("workload", [ON_CPU, DRY], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_agree_with_float64_before_they_are_timed(name, workload):
    assert relative_error(CONTENDERS[name], workload, CPU) <= TOLERANCE[workload.dtype]


@pytest.mark.parametrize("name", ["ours", "dense"])
def test_a_step_agrees_with_one_that_is_in_float64_from_end_to_end(name):
    batch, model = ON_CPU.batch(64, CPU), ON_CPU.model(CPU).double()
    embeddings = model(batch.views.double()).unflatten(0, (-1, VIEWS))
    loss = training.CASE.loss("reference")(embeddings, batch.inputs.cluster_ids, batch.inputs.centers.double())
    loss.backward()
    # A ReLU that float32 decides otherwise moves the gradient by 1e-3.
    assert distance(gradient_of(name), encoder_gradient(model)) <= 5e-3


@pytest.mark.parametrize("name", ["ours", "dense"])
def test_cached_gradients_are_those_of_the_whole_batch(name):
    """In evaluation mode, where BatchNorm does not look at the batch."""
    whole, cached = (gradient_of(which, evaluating=True) for which in (name, f"{name} cached"))
    assert distance(cached, whole) <= 1e-5


@pytest.mark.parametrize("name", ["ours", "ours cached"])
def test_ours_and_dense_take_the_same_gradient(name):
    assert distance(gradient_of(name), gradient_of(name.replace("ours", "dense"))) <= 1e-4


@pytest.mark.parametrize("name", CONTENDERS)
def test_a_wrong_loss_is_found_out_and_not_timed(name, monkeypatch):
    wrong = replace(CONTENDERS[name], build=lambda case: lambda x: case.loss()(*x) * 1.01)
    monkeypatch.setattr(training, "CONTENDERS", {name: wrong})
    (row,) = training.measure(ON_CPU, 256, CPU, host_clock, 0.0, {})
    assert row.note.startswith("wrong: relative error") and row.error == pytest.approx(0.01, rel=0.01)
    assert row.p50 is None and row.images_per_second is None


def test_a_wrong_gradient_cache_is_found_out(monkeypatch):
    def last_block_forgotten(model, views, loss_of, micro_batch):
        embeddings = [model(block) for block in views.split(micro_batch)]
        loss_of(torch.cat([*embeddings[:-1], embeddings[-1].detach()])).backward()

    monkeypatch.setattr("ccl_fast.training.cached_backward", last_block_forgotten)
    for workload in (ON_CPU, DRY):
        error = relative_error.__wrapped__(CONTENDERS["ours cached"], workload, CPU)
        assert error > TOLERANCE[workload.dtype]


def test_a_step_trains_and_leaves_no_gradients():
    run = Training(ON_CPU, CONTENDERS["ours"], ON_CPU.batch(32, CPU))
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.step()
    for old, parameter in zip(before, run.model.parameters(), strict=True):
        assert not old.equal(parameter) and parameter.grad is None


@pytest.mark.parametrize("workload", [ON_CPU, ON_GPU, DRY], ids=["cpu", "gpu", "dry run"])
def test_the_bytes_of_the_activations_are_as_stated(workload):
    """Counted per view, from 16 to 32 of them, so that what is kept once does not count."""

    def kept(n: int) -> int:
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        views, model = workload.batch(n, CPU).views, workload.model(CPU)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            embeddings = model(views)
        assert embeddings.dtype == workload.dtype
        given = {tensor.untyped_storage().data_ptr() for tensor in (views, *model.parameters())}
        return sum(storage.nbytes() for at, storage in storages.items() if at not in given)

    assert (kept(16) - kept(8)) / 16 == pytest.approx(workload.activation_bytes, rel=0.15)


@pytest.mark.slow
def test_the_quick_run_fills_every_row(tmp_path):
    report = training.run_cpu(True, tmp_path)
    (file,) = tmp_path.glob("*-cpu-training.jsonl")
    rows = {(r["n"], r["contender"]): r for r in map(json.loads, file.read_text().splitlines())}
    assert set(rows) == {(n, name) for n in training.QUICK_SIZES for name in CONTENDERS}
    for (n, name), row in rows.items():
        assert row["case"] == "training step" and row["dtype"] == "float32" and not row["note"]
        assert (row["d"], row["centers"]) == (ON_CPU.d, ON_CPU.clusters)
        assert row["micro_batch"] == (ON_CPU.micro_batch if name.endswith("cached") else None)
        assert 0 < row["p20"] <= row["p50"] <= row["p80"] and row["repetitions"] >= 3
        assert row["images_per_second"] == pytest.approx(n / row["p50"])
        assert row["loss_p50"] > 0 and row["loss_share"] > 0 and row["to_ours"] > 0
        assert row["error"] <= TOLERANCE[torch.float32]
        assert "given views" in row["network"] and row["setting"]
        assert name in report


def test_what_does_not_fit_is_not_started():
    n = 2**22
    rows = training.measure(replace(DRY, activation_bytes=2**40), 16, CPU, host_clock, 0.0, {})
    assert all(row.note.startswith("not started: its arrays would take") and row.p50 is None for row in rows)
    whole, cached, dense = (ON_GPU.arrays(CONTENDERS[name], n) for name in ("ours", "ours cached", "dense cached"))
    assert cached == ON_GPU.arrays(CONTENDERS["ours cached"], 2 * n) < whole and dense > (VIEWS * n) ** 2


@pytest.mark.slow
def test_caching_keeps_the_memory_of_a_micro_batch():
    """In a process of its own: the activations of the whole batch would be 180 MiB."""
    n = 1024
    run = Training(ON_CPU, CONTENDERS["ours cached"], ON_CPU.batch(n, CPU))
    # The allocator may hold more than is in use, by a third or so: the least of some processes tells.
    peak = min(training._peak_on_cpu(run, "step") for _ in range(3))
    assert 0 < peak < VIEWS * n * ON_CPU.activation_bytes / 2, f"{peak} bytes"


def test_the_gpu_run_walks_its_path_without_a_gpu(tmp_path):
    report = training.run_gpu(True, tmp_path)
    (file,) = tmp_path.glob("*-gpu-training-dry-run.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(CONTENDERS) * len(training.DRY_SIZES)
    for row in rows:
        if row["contender"].endswith("cached") and row["n"] <= DRY.micro_batch:
            assert row["note"] == "a micro-batch holds the whole batch"
        else:
            assert row["images_per_second"] > 0 and row["dtype"] == "bfloat16" and not row["note"]
    assert "65,536 images: ours cached, arrays of 4.5 GiB" in report


def test_the_gpu_run_stops_when_its_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "GPU_SECONDS", -1.0)
    training.run_gpu(True, tmp_path)
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == len(CONTENDERS) * len(training.DRY_SIZES)
    assert all(row["note"].startswith("not started: about") and row["p50"] is None for row in rows)


def test_the_time_of_larger_batches_is_foreseen(tmp_path):
    run = training._GpuRun("gpu-training", CPU, tmp_path)
    row = training.TrainingRow("training step", "ours", 8, 16, "bfloat16", p50=5.0, loss_p50=1.0)
    run._foresee(row, (16, 32))
    assert run.pace == {("ours", 16): 2 * 4.0 + 4 * 1.0, ("ours", 32): 4 * 4.0 + 16 * 1.0}

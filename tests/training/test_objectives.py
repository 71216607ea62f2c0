# ruff: noqa: E402 (the extra must be there)
"""Every objective of the table: what it computes, that it trains in every way that CCL does, and what it leaves."""

import functools
import json
import shutil
from typing import get_args

import pytest
import torch
import yaml
from torch import nn
from torch.testing import assert_close

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from lightning.fabric import Fabric
from safetensors.torch import load_file

from ccl_fast import losses
from ccl_fast.commands import evaluate, train
from ccl_fast.commands.command_line import main
from ccl_fast.commands.compare_objectives import compare, format_comparison, summarize
from ccl_fast.commands.trained_run import TrainedRun
from ccl_fast.data.images import InMemory
from ccl_fast.errors import ArgumentError
from ccl_fast.models import Model
from ccl_fast.training import checkpoint
from ccl_fast.training.checkpoint import CheckpointError
from ccl_fast.training.config import FIELDS, Config
from ccl_fast.training.cooperation import Clustering, CooperativeCCL
from ccl_fast.training.loop import Run
from ccl_fast.training.objectives import OBJECTIVES, OPTIONS, ObjectiveName

pytestmark = pytest.mark.xdist_group("test_objectives")  # one process has the run that all tests share

SHARED = {"simclr", "ccl", "supcon", "protonce", "deepcluster-v2", "pamc", "meow", "coding-rate", "swav"}  # by several
CHANGED = {"recluster_every": 2, "center_weight": 0.25, "center_ramp_epochs": 2, "concentration": True}
CHANGED |= {"instance_weight": 0.0, "instance_negatives": "all", "believe": 1.0, "labels_from": "random"}


def kinds(each=12, k=4):
    """Images of k kinds: a pattern with some noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(40, 216, (k, 1, 8, 8), generator=generator).repeat_interleave(each, 0)
    return InMemory((patterns + torch.randint(-40, 40, patterns.shape, generator=generator)).to(torch.uint8))


def make_run(objective, precision="32-true", **given):
    """Three steps an epoch; the backbone has dropout and BatchNorm, and the same weights every time."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1))
    small = {"backbone": backbone, "embedding_dim": 6, "batch_size": 16, "clusters": [4, 3], "warmup_epochs": 0}
    small |= {"objective": objective, "precision": precision, "epochs": 4}
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    return Run(Config(**small | given), kinds(), fabric)


def go(run, epochs=4, **callbacks):
    run.advance(epochs, **callbacks)
    return run


# ---- what is computed ----


def expected_values(z, found, prototypes):
    """By name, with the losses written out."""
    (a, mu, t, all_a, share_a), (b, nu, u, all_b, share_b) = found
    first, second = z[:, 0], z[:, 1]

    def mean(loss, *arguments):
        return sum(loss(*of) for of in arguments) / len(arguments)

    return {
        "simclr": losses.InfoNCELoss(0.2)(z),
        "hard-contrastive": losses.HardContrastiveLoss(temperature=0.2)(z),
        "cacr": losses.CACRLoss(negatives_of="all views")(z),
        "cmim": losses.CMIMLoss(0.2)(z),
        "groco": losses.GroCoLoss()(z),
        "ccl": (
            share_a * losses.CCLLoss(0.2)(z, a, mu, center_temperature=t)
            + (1 - share_a) * losses.CenterNegativesLoss(0.2)(z, all_a, mu)
            + share_b * losses.CCLLoss(0.2)(z, b, nu, center_temperature=u)
            + (1 - share_b) * losses.CenterNegativesLoss(0.2)(z, all_b, nu)
        )
        / 2,
        "supcon": mean(losses.SupConLoss(0.2), (z, a), (z, b)),
        "protonce": losses.ProtoNCELoss(0.2)(z, [a, b], [mu, nu], center_temperature=[t, u]),
        "deepcluster-v2": losses.DeepClusterV2Loss(0.2)(z, [a, b], [mu, nu]),
        "pamc": mean(
            losses.PamCLoss(0.2, form="node"),
            *[(*of, ids) for of in ((first, second), (second, first)) for ids in (a, b)],
        ),
        "meow": mean(losses.MEOWLoss(0.2, weigh_positive=False), (z, a), (z, b)),
        "coding-rate": mean(losses.CodingRateLoss(), (z, a), (z, b)),
        "swav": mean(losses.SwAVLoss(0.2), *[(z, matrix) for matrix in prototypes]),
        "protogcd": mean(
            losses.ProtoGCDLoss(0.2, teacher_temperature=0.1, supervised_weight=0.0),
            *[(z, matrix) for matrix in prototypes],
        ),
    }


def test_the_value_is_that_of_the_loss_over_all_numbers_of_clusters():
    z, prototypes = torch.randn(9, 2, 6, dtype=torch.float64), [torch.randn(k, 6) for k in (4, 3)]
    found = []
    for k, believed in ((4, 0.25), (3, 1.0)):
        ids = torch.randint(k, (9,))
        is_believed = torch.rand(9) < believed
        centers, temperatures = torch.randn(k, 6), torch.rand(k) + 0.1
        found.append(Clustering(torch.where(is_believed, ids, -1), centers, temperatures, ids, believed))
    expected = expected_values(z, found, prototypes)
    assert expected.keys() == OBJECTIVES.keys() == set(get_args(ObjectiveName))
    for name, objective in OBJECTIVES.items():
        targets = prototypes if objective.needs == "prototypes" else found
        value = objective.value(objective.make_loss(0.2, None), z, targets)
        assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


# Of those with clusters and of those with prototypes one each is enough to begin with.
a_few = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("ccl", "swav") else pytest.mark.slow) for n in OBJECTIVES]
)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_instances_and_clusters_have_their_shares(share):
    z = torch.randn(9, 2, 6, dtype=torch.float64)
    ids, centers = torch.randint(4, (9,)), torch.randn(4, 6)
    believed = torch.where(torch.arange(9) < 5, ids, -1)
    of = Clustering(believed, centers, None, ids, 5 / 9)
    loss = CooperativeCCL(0.2)
    loss.instance_weight, loss.center_weight = share, 0.7
    of_clusters = losses.CCLLoss(0.2, center_weight=0.7)(z, believed, centers)
    with_centers = losses.CenterNegativesLoss(0.2)(z, ids, centers)
    assert_close(loss(z, of), share * with_centers + (1 - share) * of_clusters)
    loss.instance_negatives = "other-clusters"
    assert_close(loss(z, of), share * losses.MEOWLoss(0.2, weigh_positive=False)(z, ids) + (1 - share) * of_clusters)
    loss.instance_negatives = "all"
    assert_close(loss(z, of), share * losses.InfoNCELoss(0.2)(z) + (1 - share) * of_clusters)


def test_processes_share_what_they_can():
    assert {name for name, objective in OBJECTIVES.items() if objective.is_distributed} == SHARED
    for name in SHARED:
        modules = OBJECTIVES[name].make_loss(0.2, "world").modules()
        groups = [module.process_group for module in modules if isinstance(module, losses.Loss)]
        assert groups
        assert set(groups) == {"world"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_warm_up_is_simclr_and_then_it_is_not(name):
    simclr, run = go(make_run("simclr")), go(make_run(name, warmup_epochs=2))
    assert run.losses[:2] == simclr.losses[:2]
    assert (run.losses[2] == simclr.losses[2]) == (name == "simclr")


# ---- that it trains ----


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_falls_and_the_weights_move(name):
    given = {"epochs": 30, "learning_rate": 0.01, "augmentation": "none"}
    run = make_run(name, **given | ({"recluster_every": 30} if OBJECTIVES[name].needs == "clusters" else {}))
    before = run.state_dict()["model"]
    go(run, 30)
    # Swaps are so soft that what is in order costs GroCo almost as much.
    assert sum(run.losses[-3:]) < (0.98 if name == "groco" else 0.95) * sum(run.losses[:3])
    assert not run.model.head[0].weight.equal(before["head.0.weight"])


@a_few
def test_a_state_in_the_middle_is_gone_on_from_bit_for_bit(name):
    given = {"warmup_epochs": 1, "ema": 0.9, "micro_batch": 5, "precision": "bf16-mixed", "learning_rate": 0.01}
    given |= {option: CHANGED[option] for option in OBJECTIVES[name].options}
    states, whole = [], make_run(name, **given)
    go(whole, after_step=lambda: states.append(whole.state_dict()))
    end = whole.state_dict()
    assert len(states) == 12 and end["step"] == 12
    for at in (1, 4, 7):  # in the warm-up, in the objective's first epoch and later
        again = make_run(name, **given)
        again.load_state_dict(states[at])
        assert_close(go(again).state_dict(), end, rtol=0, atol=0)


@a_few
def test_micro_batches_and_bfloat16_change_little(name):
    given = {"learning_rate": 1e-4, "backbone": nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())}
    plain = go(make_run(name, **given), 2)
    assert go(make_run(name, **given, micro_batch=5), 2).losses == pytest.approx(plain.losses, rel=1e-5, abs=1e-6)
    half = go(make_run(name, **given, precision="bf16-mixed"), 2).losses
    assert half != plain.losses
    assert half == pytest.approx(plain.losses, rel=0.02, abs=1e-3)  # of CACR, a difference, it is about 0


@pytest.mark.parametrize(("name", "option"), [(name, o) for name, of in OBJECTIVES.items() for o in of.options])
def test_every_option_of_an_objective_changes_it(name, option):
    assert go(make_run(name, **{option: CHANGED[option]})).losses != losses_without_options(name)


@functools.cache
def losses_without_options(name):
    return go(make_run(name)).losses


def test_only_what_needs_clusters_is_clustered(monkeypatch):
    clustered = []
    monkeypatch.setattr(Run, "_cluster", lambda run: clustered.append(run.config.objective))
    for name in ("simclr", "swav"):
        go(make_run(name, clusters=[3]), 1)
    assert not clustered


# ---- prototypes ----


def test_prototypes_wait_for_an_epoch_then_learn_and_keep_their_length():
    run, seen = make_run("swav", warmup_epochs=1, learning_rate=0.01, weight_decay=1.0), []
    seen.append([matrix.detach().clone() for matrix in run.prototypes])
    go(run, after_step=lambda: seen.append([matrix.detach().clone() for matrix in run.prototypes]))
    assert [list(matrix.shape) for matrix in seen[0]] == [[4, 6], [3, 6]]
    for step, matrices in enumerate(seen):
        for matrix, first in zip(matrices, seen[0], strict=True):
            assert_close(matrix.norm(dim=1), torch.ones(len(matrix)))
            # Three steps of warm-up, three in which they are held.
            assert torch.allclose(matrix, first, atol=1e-6) == (step <= 6), step
    assert not make_run("swav", seed=1).prototypes[0].equal(seen[0][0])
    assert not run.prototypes.state_dict().keys() & run.result.state_dict().keys()
    assert not make_run("ccl").prototypes.state_dict()


def test_the_share_of_hard_labels_grows_in_half_of_the_steps_after_the_warm_up():
    run, shares = make_run("protogcd", warmup_epochs=2, epochs=6), []
    go(run, 6, after_step=lambda: shares.append(run.loss_fn.hard_share))
    assert shares[:6] == [1.0] * 6  # not in use yet
    assert shares[6:] == pytest.approx([min(0.2 + 0.8 * i / 6, 1.0) for i in range(12)])


def test_prototypes_that_are_not_finite_stop_the_run():
    run = make_run("swav", clusters=[3])
    run.prototypes[0].data[0, 0] = torch.nan
    run._step = lambda *_: 1.0
    with pytest.raises(FloatingPointError, match="weights are not finite"):
        go(run, 1)


# ---- the command ----

TINY = {"epochs": 4, "warmup_epochs": 1, "clusters": [4, 3], "in_classes": [0, 7], "batch_size": 25, "limit": 100}
TINY |= {"far_ood": [], "objective": "swav"}
COMMAND = [f"--{name}={value}" for name, value in TINY.items()]


@pytest.fixture(scope="module")
def swav(tmp_path_factory):
    """The folder of a run with its baseline."""
    folder = tmp_path_factory.mktemp("runs") / "swav"
    assert main(["train", f"--output={folder}", *COMMAND]) == 0
    return folder


def test_files_stages_and_titles_have_the_objectives_name(swav):
    names = {path.name.removesuffix(".safetensors") for path in swav.glob("*.safetensors")}
    assert names == {"simclr", "swav", "simclr.detectors", "swav.detectors"}
    assert {path.name for path in (swav / "tensorboard").iterdir()} == {"warm-up", "simclr", "swav"}
    report = json.loads((swav / "report.json").read_text())
    for part in ("results", "losses", "log", "clustering"):
        assert list(report[part]) == ["simclr", "swav"], part
    assert report["losses"]["simclr"][0] == report["losses"]["swav"][0]
    assert report["losses"]["simclr"][1] != report["losses"]["swav"][1]
    assert report["titles"] == {"simclr": "SimCLR", "swav": "SwAV"}
    lines = [json.loads(line) for line in (swav / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["warm-up"] + ["simclr"] * 3 + ["swav"] * 3
    assert [line["objective"] for line in lines] == ["simclr"] * 4 + ["swav"] * 3  # whose loss it is
    page = (swav / "report.html").read_text()
    own = report["losses"]["swav"][1:]
    assert f"SwAV from {own[0]:.3g} to {own[-1]:.3g}" in page
    assert "<title>Out-of-distribution detection: SimCLR and SwAV</title>" in page
    assert "With the default detector, SwAV reaches" in page and "CCL" not in page


def test_weights_are_those_of_the_model_and_can_be_evaluated_again(swav, no_page, capsys):
    for name in ("simclr", "swav"):
        Model().load_state_dict(load_file(swav / f"{name}.safetensors"))
    trained = TrainedRun.open(swav)
    assert trained.objectives == ["simclr", "swav"]
    report = json.loads((swav / "report.json").read_text())
    assert evaluate(swav, overwrite=True)["results"] == report["results"]
    assert "SwAV, near" in capsys.readouterr().out


def test_resumed_with_prototypes_bit_for_bit(swav, tmp_path, no_page):
    folder = tmp_path / "run"
    shutil.copytree(swav, folder)
    for name in ("swav.safetensors", "report.json"):
        (folder / name).unlink()
    state = checkpoint.load(folder / "checkpoints", "previous")
    assert (state["stage"], state["run"]["step"]) == ("swav", 12)
    again = train(folder, **TINY, resume=True, resume_from="previous")
    assert again["results"] == json.loads((swav / "report.json").read_text())["results"]
    ours, theirs = (load_file(f / "swav.safetensors") for f in (folder, swav))
    assert_close(ours, theirs, rtol=0, atol=0)
    # A new run drops the weights of the old one's objective.
    train(folder, **TINY | {"objective": "pamc", "baseline": False, "epochs": 1}, overwrite=True)
    assert {path.name for path in folder.glob("*.safetensors")} == {"pamc.safetensors", "pamc.detectors.safetensors"}


def test_long_titles_stay_in_their_columns(tmp_path, no_page, capsys):
    train(tmp_path / "run", **TINY | {"objective": "deepcluster-v2", "epochs": 2})
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("features/detector"))
    titles, header, first = lines[at - 1 : at + 2]
    assert titles.endswith(" DeepCluster-v2, near") and "  SimCLR, near " in titles
    assert len(titles) == len(header) == len(first)


def test_a_comparison_names_its_objective():
    detectors = ({"head/a": {"near": {"auroc": value}}} for value in (0.5, 0.75, 0.25, 0.375))
    results = [{"simclr": next(detectors), "meow": next(detectors)} for _ in range(2)]
    comparison = {"seeds": [0, 1], "default": "head/a", "titles": {"simclr": "SimCLR", "meow": "MEOW"}}
    comparison["results"] = summarize(results)
    parts = comparison["results"]["head/a"]["near"]["auroc"]
    assert {name: part["values"] for name, part in parts.items()} == {
        "simclr": [0.5, 0.25],
        "meow": [0.75, 0.375],
        "gain": [0.25, 0.125],
    }
    table = format_comparison(comparison)
    assert table.splitlines()[1].split()[-6:-3] == ["OOD", "SimCLR", "MEOW"]
    assert "Gain: MEOW less SimCLR of the same seed." in table


# ---- errors ----


def test_options_that_an_objective_does_not_use_are_named(tmp_path):
    assert all(FIELDS[name].metadata["after_warm_up"] for name in OPTIONS)
    for name, objective in OBJECTIVES.items():
        for option in set(OPTIONS) - set(objective.options):
            with pytest.raises(ArgumentError, match=rf"^{option}: expected .* with objective '{name}', got"):
                train(tmp_path / "run", name, **{option: CHANGED[option]})
    all_at_once = "; ".join(
        f"{option}: expected .* with objective 'swav', got {CHANGED[option]!r}" for option in OPTIONS
    )
    with pytest.raises(ArgumentError, match=f"^{all_at_once}$"):
        train(tmp_path / "run", "swav", **CHANGED)
    with pytest.raises(ArgumentError, match=r"^objective: expected one of 'simclr', .*, 'ccl', .*, got 'moco'"):
        train(tmp_path / "run", "moco")
    with pytest.raises(ArgumentError, match=r"^objective: expected one of"):
        train(tmp_path / "run", ["ccl", "swav"])
    with pytest.raises(ArgumentError, match=r"^baseline: expected True or False, got 'simclr'"):
        train(tmp_path / "run", baseline="simclr")
    with pytest.raises(ArgumentError, match=r"^objective: expected one to compare with the baseline"):
        compare(tmp_path / "run", objective="simclr")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_cluster_is_refused_where_nothing_would_be_learned(name, tmp_path):
    learns = {}
    for clusters in (1, 2):
        run = make_run(name, clusters=[clusters], backbone=nn.Sequential(nn.Flatten(), nn.Linear(64, 16)))
        go(run, 1)
        learns[clusters] = max(p.grad.abs().max().item() for p in run.model.parameters()) > 1e-4
    assert learns == {1: OBJECTIVES[name].min_clusters == 1, 2: True}
    for clusters in (1, [4, 1]) if not learns[1] else ():
        with pytest.raises(ArgumentError, match=rf"^clusters: expected 2 or more with objective '{name}' .*, got .*1"):
            train(tmp_path / "run", name, clusters=clusters)
    assert not (tmp_path / "run").exists()


def test_several_processes_are_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in OBJECTIVES.keys() - SHARED:
        with pytest.raises(ArgumentError, match=rf"^objective: expected .*ccl, supcon.*, got '{name}' on 2 processes"):
            train(tmp_path / "run", name)
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_earlier_version_is_refused(swav, tmp_path):
    shutil.copytree(swav, tmp_path / "run")
    state = checkpoint.load(tmp_path / "run" / "checkpoints")
    arguments = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    for given in (state["arguments"], arguments):
        del given["objective"], given["baseline"]
        given["method"] = "compare"
    checkpoint.save(tmp_path / "run" / "checkpoints", state)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(arguments))
    with pytest.raises(ArgumentError, match=r"^run: .*, got a file without baseline, objective and with method$"):
        TrainedRun.open(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"of another version of ccl_fast \(baseline, method, objective\)"):
        train(tmp_path / "run", **TINY, resume=True)
    with pytest.raises(ArgumentError, match=r"^output: expected a comparison of this version.* without objective"):
        parts = ("environment", "titles", "results")
        (tmp_path / "seed0").mkdir()
        (tmp_path / "seed0" / "report.json").write_text(
            json.dumps({"arguments": arguments, "images": {"train": 200}} | {part: {} for part in parts})
        )
        compare(tmp_path, [0, 1], resume=True)

# ruff: noqa: E402 (the extra must be there)
"""A trained run, evaluated again and used to score images."""

import csv
import json

import pytest
import torch

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from safetensors.torch import load_file
from torchvision.utils import save_image

from ccl_fast.commands import evaluate, score, train
from ccl_fast.commands.command_line import main
from ccl_fast.data import load_split
from ccl_fast.errors import ArgumentError
from ccl_fast.models import Model, embed
from ccl_fast.ood import NearestNeighbor

pytestmark = pytest.mark.xdist_group("test_evaluate")  # one process has the runs that all tests share

TINY = {"epochs": 4, "warmup_epochs": 2, "clusters": 4, "in_classes": [0, 7], "batch_size": 100, "limit": 400}


@pytest.fixture(scope="module")
def run(tmp_path_factory, no_page):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, **TINY)
    return folder


@pytest.fixture(scope="module")
def folder_of_images(tmp_path_factory):
    """20 test digits of the trained classes, 20 of others, and a file that is no image."""
    folder = tmp_path_factory.mktemp("images")
    digits = load_split("digits", in_classes=[0, 7], seed=0, limit=400)
    for kind, images in (("known", digits.test), ("unknown", digits.held_out)):
        (folder / kind).mkdir()
        for i, image in enumerate(images[torch.arange(20)]):
            save_image(image, folder / kind / f"{i:02}.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def test_evaluation_repeats_the_figures_of_the_run(run, capsys):
    assert main(["evaluate", f"--run={run}"]) == 0
    assert "all/ensemble *" in capsys.readouterr().out
    report = json.loads((run / "report.json").read_text())
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert evaluation["results"] == report["results"]
    assert evaluation["clustering"] == report["clustering"]
    assert evaluation["log"] == report["log"] and evaluation["losses"] == report["losses"]
    assert [line["epoch"] for line in evaluation["log"]["ccl"]] == [1, 2, 3, 4]
    assert main(["evaluate", f"--run={run}"]) == 2  # there is one
    assert "output: expected a folder without an evaluation" in capsys.readouterr().err


def test_other_sets_near_and_far(run, folder_of_images, tmp_path):
    report = evaluate(run, tmp_path / "out", near_ood=["interpolation"], far_ood=["noise", str(folder_of_images)])
    assert report["near"] == ["interpolation"]
    assert report["far"] == ["noise", str(folder_of_images)]
    assert report["images"]["ood"] == {"interpolation": 200, "noise": 200, str(folder_of_images): 40}
    for by_set in report["results"]["ccl"].values():
        assert by_set["near"] == by_set["interpolation"]
        both = (by_set["noise"]["auroc"] + by_set[str(folder_of_images)]["auroc"]) / 2
        assert by_set["far"]["auroc"] == pytest.approx(both)
    assert (tmp_path / "out" / "evaluation.json").exists()


@pytest.mark.parametrize("log", [None, "{}\n", "no JSON"])
def test_an_evaluation_does_without_the_log_of_the_training(run, tmp_path, monkeypatch, capsys, log):
    (run / "metrics.jsonl").rename(tmp_path / "kept")
    try:
        if log is not None:
            (run / "metrics.jsonl").write_text(log)
        evaluation = evaluate(run, tmp_path / "out", near_ood=["interpolation"], far_ood=[])
    finally:
        (tmp_path / "kept").replace(run / "metrics.jsonl")
    assert "log" not in evaluation and "results" in evaluation
    assert "without the curves of the training: run: expected the log of a run in" in capsys.readouterr().out


@pytest.mark.slow
def test_covariances_that_clusters_share_are_said(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ccl_fast.ood.clusters.MOST_COVARIANCES", 12 * 100**2)
    report = evaluate(run, tmp_path / "out")  # 128 features before the head, 64 behind it
    said = "Mahalanobis distances of encoder features: the 12 clusters share one covariance, as their own would take "
    assert report["notes"] == {objective: [said + "0.0 GiB"] for objective in ("simclr", "ccl")}
    assert f"CCL: {said}" in capsys.readouterr().out
    assert "notes" not in json.loads((run / "report.json").read_text())


def test_scores_of_a_folder(run, folder_of_images, tmp_path, capsys):
    output = tmp_path / "scores.csv"
    command = ["score", f"--run={run}", f"--images={folder_of_images}", f"--output={output}"]
    assert main([*command, "--detector=encoder/nearest_neighbor"]) == 0
    printed = capsys.readouterr()
    assert "40 images" in printed.out
    assert "broken.png" in printed.err
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "score", "outlier", "cluster", "threshold"]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)

    # The same digits, from the package and not from files.
    digits = load_split("digits", in_classes=[0, 7], seed=0, limit=400)
    model = Model()
    model.load_state_dict(load_file(run / "ccl.safetensors"))
    train_features, test, unknown = (
        embed(model, images)["encoder"] for images in (digits.train, digits.test, digits.held_out)
    )
    detector = NearestNeighbor().fit_features(train_features)
    threshold = detector.predict_features(test).sort().values[189]  # accepts 190 of 200
    for kind, features in (("known", test), ("unknown", unknown)):
        expected = detector.predict_features(features[:20])
        by_name = {row["image"]: row for row in rows}
        for i, value in enumerate(expected):
            row = by_name[str(folder_of_images / kind / f"{i:02}.png")]
            assert float(row["score"]) == pytest.approx(value.item(), abs=1e-5)
            assert int(row["outlier"]) == (value > threshold) or abs(value - threshold) < 1e-5
            assert float(row["threshold"]) == pytest.approx(threshold.item(), rel=1e-5)
    assert f"outliers, above {rows[0]['threshold']} (accepts 0.95 of the test images)" in printed.out
    assert {int(row["cluster"]) for row in rows} <= set(range(12))
    assert {row["outlier"] for row in rows} == {"0", "1"}
    assert main(["score", f"--run={run}", f"--images={folder_of_images}", f"--output={output}"]) == 2
    assert "output: expected a file that does not exist yet" in capsys.readouterr().err


def test_files_are_scored_like_their_folder_and_more_are_accepted_on_demand(run, folder_of_images, tmp_path):
    files = sorted(folder_of_images.glob("known/*.png"))[:3]
    command = ["score", f"--run={run}", "--images", *map(str, files), str(folder_of_images / "unknown")]
    assert main([*command, f"--output={tmp_path / 's.json'}", "--accept", "1"]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert found["accept"] == 1 and found["run"] == str(run)
    assert (found["objective"], found["detector"]) == ("ccl", "all/ensemble")
    by_path = {of["image"]: of for of in found["images"]}
    assert by_path.keys() == {*map(str, files), *map(str, folder_of_images.glob("unknown/*.png"))}
    assert all(of["outlier"] == (of["score"] > found["threshold"]) for of in by_path.values())
    # A file alone, and fewer that are accepted.
    assert main(["score", f"--run={run}", f"--images={files[0]}", f"--output={tmp_path / 's.csv'}"]) == 0
    with (tmp_path / "s.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["score"]) == pytest.approx(by_path[str(files[0])]["score"], rel=1e-4)
    assert float(row["threshold"]) < found["threshold"]


def test_every_detector_can_score(run, folder_of_images, tmp_path):
    names = json.loads((run / "report.json").read_text())["results"]["ccl"]
    for i, name in enumerate(names):
        path = score(run, folder_of_images, tmp_path / f"{i}.csv", objective="simclr", detector=name)
        assert len(path.read_text().splitlines()) == 41


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "moco"}, "objective: expected one that the run has, simclr or ccl, got 'moco'"),
        ({"detector": "head/oracle"}, "detector: expected"),
        ({"detector": "nearest_neighbor"}, "detector: expected"),
        ({"device": "abacus"}, "device: expected"),
        ({"accept": 95}, "accept: expected a number above 0 and at most 1, got 95"),
        ({"strict": True}, "broken.png"),
    ],
)
def test_wrong_arguments_of_score_are_named(run, folder_of_images, tmp_path, options, said):
    with pytest.raises((ArgumentError, OSError), match=said):
        score(run, folder_of_images, tmp_path / "scores.csv", **options)
    assert not (tmp_path / "scores.csv").exists()


def test_what_is_no_finished_run_is_said(run, tmp_path, capsys):
    assert main(["evaluate", f"--run={tmp_path}"]) == 2
    assert "run: expected the folder of a run" in capsys.readouterr().err
    for text in ("", "- a\n", "epochs: 3\n", "{", "\0"):
        (tmp_path / "config.yaml").write_text(text)
        assert main(["evaluate", f"--run={tmp_path}"]) == 2
        assert "run: expected the arguments of a run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert main(["evaluate", f"--run={tmp_path}"]) == 2
    assert "run: expected a finished run" in capsys.readouterr().err
    (tmp_path / "ccl.safetensors").write_bytes((run / "ccl.safetensors").read_bytes())
    assert main(["evaluate", f"--run={tmp_path}"]) == 2
    assert "without simclr.safetensors; the same training command with resume" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    (tmp_path / "simclr.safetensors").write_bytes((run / "simclr.safetensors").read_bytes()[:1000])
    assert main(["evaluate", f"--run={tmp_path}"]) == 2
    assert "run: expected weights of this run" in capsys.readouterr().err


def test_what_no_file_can_keep_is_asked_for(tmp_path):
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(images, torch.zeros(40, dtype=torch.int64))
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 6))
    report = train(tmp_path / "run", data=data, backbone=backbone, epochs=2, batch_size=16, clusters=2)
    with pytest.raises(ArgumentError, match=r"^backbone: expected the one that the run was trained with"):
        evaluate(tmp_path / "run", data=data)
    with pytest.raises(ArgumentError, match=r"^data: expected the one that the run was trained with"):
        evaluate(tmp_path / "run", backbone=backbone)
    again = evaluate(tmp_path / "run", data=data, backbone=backbone)
    assert again["results"] == report["results"]

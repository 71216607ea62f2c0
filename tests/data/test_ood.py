# ruff: noqa: E402 (the extra must be there)
"""OOD sets: synthetic ones, held-out classes, named data sets, folders, data sets of the user."""

from pathlib import Path

import numpy as np
import pytest
import torch

for extra in ("torchvision", "kornia", "mlxtend", "matplotlib", "skimage"):
    pytest.importorskip(extra)  # the extra "train"

from PIL import Image
from torch.utils.data import TensorDataset

from ccl_fast.data import Split, canonical, load_ood, load_split, synthetic, synthetic_names
from ccl_fast.errors import ArgumentError


def everything(images):
    return images[torch.arange(len(images))]


def random_split(shape, n_test=60, **options):
    pixels = torch.randint(0, 256, (n_test + 9, *shape), dtype=torch.uint8)
    return load_split((TensorDataset(pixels[n_test:]), TensorDataset(pixels[:n_test])), **options)


@pytest.fixture(scope="module")
def digits():
    return load_split("digits", limit=150)


SHAPES = [(1, 28, 28), (3, 32, 32), (3, 24, 40), (1, 96, 70)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", synthetic_names)
def test_made_sets(name, shape):
    split = random_split(shape)
    state = torch.get_rng_state()
    first, same, other = (load_ood([name], split, seed=s)[name] for s in (5, 5, 6))
    assert state.equal(torch.get_rng_state())
    images = everything(first)
    assert images.shape == (60, *shape)
    assert first.classes is None
    assert torch.equal(images, everything(same))
    assert not torch.equal(images, everything(other))
    assert len(images.unique(dim=0)) == 60  # no two are the same
    assert (images.amax((1, 2, 3)) - images.amin((1, 2, 3)) > 0.1).all()  # there is something to see
    distance = torch.cdist(images.flatten(1), everything(split.test).flatten(1))
    assert distance.min() > 1
    if shape[0] == 3 and name != "interpolation":
        assert (images[:, 0] != images[:, 1]).any((1, 2)).all()  # none is grey


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("name", synthetic_names)
def test_made_sets_do_not_follow_torchs_defaults(name, shape, torch_defaults):
    split = random_split(shape, n_test=20)
    expected = everything(load_ood([name], split)[name])
    for dtype, device in (("float64", "cpu"), ("float32", "meta")):
        synthetic._photographs.cache_clear()
        with torch_defaults(dtype, device):
            found = load_ood([name], split)[name]
        assert everything(found).equal(expected)


def test_interpolation_is_the_mean_of_two_test_images():
    split = random_split((3, 8, 8), n_test=7)
    images = everything(load_ood(["interpolation"], split)["interpolation"])
    test = everything(split.test)
    means = torch.stack([(test[i] + test[j]) / 2 for i in range(7) for j in range(i)])
    nearest = torch.cdist(images.flatten(1), means.flatten(1), p=float("inf")).amin(1)
    assert (nearest < 0.51 / 255).all()
    on_demand = random_split((3, 8, 8), n_test=7, memory=0)
    assert len(load_ood(["interpolation"], on_demand)["interpolation"]) == 7


def test_noise_is_half_gaussian_half_uniform():
    images = everything(load_ood(["noise"], random_split((3, 16, 16), n_test=200))["noise"])
    at_the_ends = ((images == 0) | (images == 1)).float().mean((1, 2, 3))
    assert (at_the_ends < 0.015).sum() == 100  # uniform: 1 / 255
    assert ((at_the_ends > 0.02) & (at_the_ends < 0.08)).sum() == 100  # beyond two standard deviations: 0.046
    assert images.mean() == pytest.approx(0.5, abs=0.01)


def test_blobs_are_smooth_and_stretched():
    images = everything(load_ood(["blobs"], random_split((1, 28, 28)))["blobs"])
    assert (images.amin((1, 2, 3)) == 0).all()
    assert (images.amax((1, 2, 3)) == 1).all()
    steps = (images[:, :, 1:] - images[:, :, :-1]).abs().mean((1, 2, 3))
    assert (steps < 0.15).all()  # of uniform noise: 0.33


def test_letters_are_white_on_black_and_apart_from_their_paper():
    images = everything(load_ood(["letters"], random_split((1, 28, 28)))["letters"])
    assert (images.amax((1, 2, 3)) > 0.95).all()
    assert ((images == 0).float().mean((1, 2, 3)) > 0.4).all()
    ink = (images > 0.5).float().mean((1, 2, 3))
    assert (ink > 0.01).all()
    assert (ink < 0.5).all()
    colours = everything(load_ood(["letters"], random_split((3, 28, 28)))["letters"])
    assert (colours.amax((2, 3)) - colours.amin((2, 3)) > 0.28).all()


def test_textures_are_of_photographs():
    images = everything(load_ood(["textures"], random_split((1, 64, 64), n_test=200))["textures"])
    # Neighbours are alike, as nothing that is drawn pixel by pixel is; few pixels are black or white.
    left, right = images[..., 1:].flatten(1), images[..., :-1].flatten(1)
    alike = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(left, right, strict=True)])
    assert (alike > 0.4).all()
    assert ((images > 0) & (images < 1)).float().mean() > 0.99
    assert 0.35 < images.mean() < 0.55


def test_as_many_as_there_are_to_test_on_but_at_most_2000():
    for limit in (None, 2100):
        assert len(load_ood(["noise"], random_split((1, 4, 4), n_test=2300), limit=limit)["noise"]) == 2000
    assert len(load_ood(["noise"], random_split((1, 4, 4), n_test=130))["noise"]) == 130
    assert len(load_ood(["noise"], random_split((1, 4, 4), n_test=130), limit=7)["noise"]) == 7


def test_held_out_classes_are_those_of_the_split(digits):
    assert load_ood(["held-out"], digits)["held-out"] is digits.held_out
    few = load_ood({"near": "Held_Out"}, digits, limit=20, seed=3)["near"]
    assert len(few) == 20
    assert set(few.classes.tolist()) <= {6, 7, 8, 9}
    with pytest.raises(
        ArgumentError, match=r"^near_ood: expected no 'held-out', for no class of TensorDataset is held"
    ):
        load_ood(["held-out"], random_split((1, 4, 4)), argument="near_ood")


def test_sets_come_in_their_order_and_in_the_shape_of_the_split(digits, tmp_path, capfd):
    for i in range(4):
        Image.new("RGB", (40 + i, 30), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "empty.png").touch()
    sets = ["letters", str(tmp_path), "held-out", "Digits", "noise"]
    loaded = load_ood(sets, digits, limit=50)
    assert list(loaded) == sets
    assert [len(images) for images in loaded.values()] == [50, 4, 50, 50, 50]
    assert {images.shape for images in loaded.values()} == {(1, 28, 28)}
    assert capfd.readouterr().err.startswith("ood: skipped 1 files")
    with pytest.raises(OSError, match=r"empty\.png: expected an image, got an empty file$"):
        load_ood([tmp_path], digits, strict=True)


def test_of_a_named_set_the_test_part_is_taken(digits, tmp_path):
    raw = tmp_path / "EMNIST" / "raw"
    raw.mkdir(parents=True)
    headers = np.array([0x803, 3, 28, 28], ">i4").tobytes(), np.array([0x801, 3], ">i4").tobytes()
    (raw / "emnist-balanced-test-images-idx3-ubyte").write_bytes(headers[0] + bytes(3 * 784))
    (raw / "emnist-balanced-test-labels-idx1-ubyte").write_bytes(headers[1] + bytes(3))
    assert len(load_ood(["EMNIST"], digits, root=tmp_path)["EMNIST"]) == 3  # the other part is not there
    with pytest.raises(FileNotFoundError, match=f"^far_ood: expected SVHN in {tmp_path}, got none"):
        load_ood(["svhn"], digits, root=tmp_path, argument="far_ood")
    for i in range(3):
        for part in ("train", "test"):
            (tmp_path / "folder" / part).mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), i).save(tmp_path / "folder" / part / f"{i}.png")
    assert len(load_ood([tmp_path / "folder"], digits)[str(tmp_path / "folder")]) == 6


@pytest.mark.parametrize("memory", [0, 1])
def test_data_sets_by_a_name_of_their_own(digits, memory):
    pixels = torch.randint(0, 256, (30, 3, 28, 28), dtype=torch.uint8)
    loaded = load_ood({"mine": TensorDataset(pixels), "made": "noise"}, digits, limit=25, memory=memory, seed=2)
    assert list(loaded) == ["mine", "made"]
    assert len(loaded["mine"]) == 25
    grey = (pixels.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True) / 255
    nearest = torch.cdist(everything(loaded["mine"]).flatten(1), grey.flatten(1), p=float("inf"))
    assert (nearest.amin(1) < 1 / 255).all()
    assert nearest.argmin(1).tolist() == sorted(set(nearest.argmin(1).tolist()))  # a subset, in order


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ("noise", "expected a list of names and folders"),
        (["noise", 3], "expected a list of names and folders"),
        (7, "expected a list of names and folders"),
        (["noise", "noise"], "expected different sets, got 'noise' twice"),
        (["held_out", "blobs", "held-out"], "expected different sets, got 'held_out' and 'held-out', which are the"),
        (["Noise", "noise"], "expected different sets, got 'Noise' and 'noise', which are the same"),
        (["cifar10", "CIFAR-10"], "expected different sets, got 'cifar10' and 'CIFAR-10', which are the same"),
        ({"a": "noise", "b": "NOISE"}, "expected different sets, got 'noise' and 'NOISE', which are the same"),
        (["leters"], "expected .*did you mean letters"),
        (["held-in"], "expected .*did you mean held-out"),
        (["cifar1"], "expected .*did you mean cifar1"),
        ({"mine": 5}, "expected a map-style data set"),
        ({"mine": ["a", "b"]}, "expected items that are PIL images"),
    ],
)
def test_wrong_sets_are_named_by_the_argument(sets, message, digits):
    with pytest.raises(ArgumentError, match=f"^far_ood: {message}"):
        load_ood(sets, digits, argument="far_ood")


def test_one_folder_under_two_paths_is_one_set(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "inner").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (".", "./", "inner/..", "link", tmp_path / "link" / "link"):
        with pytest.raises(ArgumentError, match=r"^near_ood: expected different sets, got .* and .*, which are the"):
            load_ood([tmp_path, other], digits, argument="near_ood")


def test_canonical_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("held-out", "Held_Out", "heldout"):
        assert canonical(name) == "held-out"
    for name in synthetic_names:
        assert canonical(name) == canonical(name.upper()) == name
    assert canonical("CIFAR-10") == canonical("cifar10") == "cifar10"
    (tmp_path / "Mine").mkdir()
    (tmp_path / "digits").mkdir()
    assert canonical("Mine") == canonical("./Mine") == canonical(tmp_path / "Mine") == str(tmp_path.resolve() / "Mine")
    assert canonical("Digits") == "digits"  # the data set
    assert canonical("./digits") == canonical(Path("digits")) == str(tmp_path.resolve() / "digits")
    assert canonical("No-Such") == "No-Such"
    assert canonical("~/x") == str(Path("~/x").expanduser().resolve())


@pytest.mark.parametrize("name", ["strict", "download"])
@pytest.mark.parametrize("value", ["false", 1, None])
def test_flags_are_booleans(name, value, digits):
    with pytest.raises(ArgumentError, match=f"^{name}: expected True or False, got {value!r}$"):
        load_ood(["noise"], digits, **{name: value})


def test_one_test_image_cannot_be_interpolated():
    split = random_split((1, 4, 4), n_test=1)
    with pytest.raises(ArgumentError, match=r"^ood: expected no 'interpolation', for there are not two images"):
        load_ood(["interpolation"], split)
    assert isinstance(split, Split)
    assert len(load_ood(["noise"], split)["noise"]) == 1


def test_images_that_cannot_be_read_at_all(digits, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:2000])
    with pytest.raises(ArgumentError, match=r"^ood: expected images in .*, got none that can be read"):
        load_ood([tmp_path], digits)

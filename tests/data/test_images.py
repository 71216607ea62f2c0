# ruff: noqa: E402 (the extra must be there)
"""Images of every kind become pixels; in memory and on demand they are the same; what cannot be read is told."""

import pickle

import numpy as np
import pytest
import torch

for extra in ("torchvision", "kornia"):
    pytest.importorskip(extra)  # the extra "train"

from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from torchvision.transforms import v2

import ccl_fast.data.reading
from ccl_fast.data import Images, load_folder, load_split
from ccl_fast.data.pixels import to_pixels
from ccl_fast.errors import ArgumentError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def gradient(height, width, channels=3):
    """uint8 [h, w, c]; every pixel differs from its neighbours, every channel from the others."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing="ij")
    return ((7 * y + 3 * x + 50 * c) % 256).astype(np.uint8)


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def everything(images):
    return images[torch.arange(len(images))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 20 RGB images of different sizes, in nested subfolders."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(20):
        save(gradient(20 + i, 40 - i), folder / f"class{i % 2}" / ("deeper" if i % 3 else ".") / f"{i:02}.png")
    return folder


class Custom(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        item = self.items[i]
        if isinstance(item, Exception):
            raise item
        return item


# Pixels


@pytest.mark.parametrize(
    "convert",
    [
        Image.fromarray,
        lambda a: a,
        lambda a: a[::-1][::-1],  # negative strides on the way
        lambda a: torch.from_numpy(a).permute(2, 0, 1),
        lambda a: torch.from_numpy(a).permute(2, 0, 1) / 255,
        lambda a: torch.from_numpy(a).permute(2, 0, 1).double() / 255,
        lambda a: a.astype(np.float32) / 255,
        lambda a: np.dstack([a, np.full(a.shape[:2], 9, np.uint8)]),  # alpha
        lambda a: Image.fromarray(np.dstack([a, np.zeros(a.shape[:2], np.uint8)])),
        lambda a: v2.functional.to_image(Image.fromarray(a)),
    ],
)
def test_every_kind_of_image_has_the_same_pixels(convert):
    array = gradient(5, 6)
    pixels = to_pixels(convert(array))
    assert type(pixels) is torch.Tensor
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.from_numpy(array).permute(2, 0, 1))


@pytest.mark.parametrize(
    "convert",
    [
        lambda a: a,
        lambda a: a[:, :, None],
        torch.from_numpy,
        lambda a: torch.from_numpy(a)[None] / 255,
        Image.fromarray,
        lambda a: Image.fromarray(a.astype(np.uint16) * 257),  # I;16: 65535 is white
        lambda a: Image.fromarray(a.astype(np.int32) * 257),  # I
        lambda a: Image.fromarray(a.astype(np.float32) / 255),  # F
        lambda a: Image.fromarray(np.dstack([a, np.zeros_like(a)])),  # LA
    ],
)
def test_every_kind_of_grey_image_has_the_same_pixels(convert):
    array = gradient(5, 6, 1)[:, :, 0]
    assert torch.equal(to_pixels(convert(array)), torch.from_numpy(array)[None])


def test_sixteen_bits_are_rounded_not_clipped():
    image = Image.fromarray(np.array([[0, 128, 129, 256, 32768, 65535]], dtype=np.uint16))
    assert to_pixels(image).tolist() == [[[0, 0, 1, 1, 128, 255]]]


def test_black_and_white_and_palettes_with_transparency():
    assert to_pixels(Image.new("1", (2, 2), 1)).unique().tolist() == [255]
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = bytes([0, 128])  # Pillow warns of such a palette when it becomes RGB
    assert to_pixels(image)[:, 0].T.tolist() == [list(RED), list(BLUE)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation, tmp_path):
    # EXIF 2.3: where row 0 and column 0 of the stored image belong in the upright one.
    upright = gradient(6, 9)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(2):
        save(np.ascontiguousarray(stored), tmp_path / f"{i}.png", exif=exif)
    images, _ = load_folder(tmp_path, (3, 6, 9))
    assert torch.equal(images.pixels[0], torch.from_numpy(upright).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("image", "what"),
    [
        ("text", "an object of type str"),
        ({"image": 1}, "an object of type dict"),
        (torch.randn(3, 9, 9), "values from -"),
        (torch.rand(3, 4, 4).fill_(float("nan")), "values from nan"),
        (torch.rand(3, 4, 4) * 255, "values from"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "dtype int64"),
        (np.zeros((4, 4), dtype=np.int64), "dtype int64"),
        (np.zeros((3, 4, 5), dtype=np.uint8), "shape (3, 4, 5)"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), "shape (2, 4, 4)"),
        (torch.zeros(7, dtype=torch.uint8), "shape (7,)"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), "shape (3, 0, 4)"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), "grey values from 70000"),
        (Image.fromarray(np.full((2, 2), 7, np.float32)), "values from 7"),
    ],
)
def test_what_is_no_image_is_named(image, what):
    with pytest.raises(ValueError) as error:
        to_pixels(image)
    assert what in str(error.value)


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (8, 50), (16, 16), (5, 9), (16, 40), (33, 16)])
def test_resize_and_crop_are_those_of_torchvision(size):
    array = gradient(*size)
    split = load_split((Custom(array, array), Custom(array)), image_size=16)
    expected = v2.Compose([v2.Resize(16, antialias=True), v2.CenterCrop(16)])(torch.from_numpy(array).permute(2, 0, 1))
    assert split.train.shape == (3, 16, 16)
    assert torch.equal(everything(split.train)[1], expected / 255)


def test_an_oblong_shape_is_covered_and_cropped_in_the_middle(tmp_path):
    array = np.zeros((40, 40, 3), dtype=np.uint8)
    array[10:30] = 255  # the middle half
    save(array, tmp_path / "a.png")
    images, _ = load_folder(tmp_path, (1, 20, 40))
    assert images.shape == (1, 20, 40)
    assert (everything(images) == 1).all()


def test_grey_becomes_rgb_and_rgb_becomes_grey(tmp_path):
    save(np.full((4, 4), 100, np.uint8), tmp_path / "grey.png")
    save(np.full((4, 4, 3), (255, 0, 0), np.uint8), tmp_path / "red.png")
    rgb, grey = (load_folder(tmp_path, (c, 4, 4))[0].pixels[:, :, 0, 0].tolist() for c in (3, 1))
    assert rgb == [[100, 100, 100], [255, 0, 0]]
    assert grey[0] == [100]
    assert grey[1][0] == pytest.approx(0.299 * 255, abs=1)


# Images


@pytest.mark.parametrize("workers", [0, 2])
def test_on_demand_equals_in_memory(photos, workers):
    in_memory, paths = load_folder(photos, (3, 24, 20))
    on_demand, same_paths = load_folder(photos, (3, 24, 20), memory=0, workers=workers)
    assert paths == same_paths
    assert len(in_memory) == len(on_demand) == 20
    assert type(in_memory) is not type(on_demand)
    order = torch.randperm(20)
    for images in (in_memory, on_demand):
        assert isinstance(images, Images)
        assert images.shape == (3, 24, 20)
        assert images.device == torch.device("cpu")
        assert images.to("cpu").device == torch.device("cpu")
    state = torch.get_rng_state()
    for some in (None, order, order[:7], order[:0], torch.tensor([3, 3, 1])):
        one, other = (list(images.batches(6, some)) for images in (in_memory, on_demand))
        rows = torch.arange(20) if some is None else some
        assert [len(batch) for batch in one] == [len(batch) for batch in rows.split(6)]
        assert torch.equal(torch.cat(one), everything(in_memory)[rows])
        assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.float32 for a, b in zip(one, other, strict=True))
    assert torch.equal(in_memory[order], on_demand[order])
    assert torch.equal(in_memory.classes, on_demand.classes)
    few, same_few = (
        images.to("cpu").subset(order[:5]).subset(torch.tensor([4, 0])) for images in (in_memory, on_demand)
    )
    assert torch.equal(everything(few), everything(same_few))
    assert torch.equal(everything(few), everything(in_memory)[order[[4, 0]]])
    assert few.classes.tolist() == same_few.classes.tolist() == in_memory.classes[order[[4, 0]]].tolist()
    assert torch.equal(torch.cat(list(same_few.batches(1))), everything(few))
    assert state.equal(torch.get_rng_state())  # the caller's


@pytest.mark.parametrize(("cpus", "processes", "expected"), [(1, 1, 0), (2, 1, 1), (64, 1, 8), (64, 8, 7), (2, 3, 0)])
def test_as_many_processes_read_ahead_as_there_are_cpus_to_spare(cpus, processes, expected, monkeypatch, photos):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    on_demand, _ = load_folder(photos, (3, 8, 8), memory=0, workers=None)
    assert on_demand.workers == expected
    assert load_folder(photos, (3, 8, 8), memory=0)[0].workers == 0


def test_unasked_no_process_reads_what_is_kept_or_is_anybodys(monkeypatch, photos):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    reading, asked = ccl_fast.data.reading, []
    load_images = reading.load_images

    def spy(*given, workers):
        asked.append(workers)
        return load_images(*given, workers=workers)

    monkeypatch.setattr(reading, "load_images", spy)
    load_folder(photos, (3, 8, 8), workers=None)
    assert asked == [0]
    data = Custom(*(gradient(8, 8) for _ in range(3)))
    assert load_split((data, data), memory=0, workers=None).train.workers == 0


def test_values_are_the_bytes_by_255(tmp_path):
    array = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save(array, tmp_path / "a.png")
    for memory in (0, 1):
        images, _ = load_folder(tmp_path, (1, 16, 16), memory=memory)
        assert torch.equal(images[torch.tensor([0])].reshape(-1), torch.arange(256).float() / 255)


def test_memory_decides_what_is_kept(photos):
    size = 20 * 3 * 10 * 10 / 2**30
    assert not hasattr(load_folder(photos, (3, 10, 10), memory=0.99 * size)[0], "pixels")
    assert load_folder(photos, (3, 10, 10), memory=size)[0].pixels.dtype == torch.uint8


def test_images_can_be_sent_to_another_process(photos):
    images, _ = load_folder(photos, (3, 10, 10), memory=0)
    assert torch.equal(everything(pickle.loads(pickle.dumps(images))), everything(images))


# Folders


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    names = ["b/x.PNG", "b/c/y.bmp", "a/z.jpeg", "a/w.Tiff", "a/v.webp"]
    for i, name in enumerate(names):
        array = np.full((4, 4, 3), 40 * i, np.uint8)
        save(array, tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    save(array, tmp_path / "a" / "._hidden.png")
    save(array, tmp_path / ".cache" / "thumbnail.png")
    (tmp_path / "b").rename(tmp_path.parent / f"{tmp_path.name}-b")
    (tmp_path / "linked").symlink_to(tmp_path.parent / f"{tmp_path.name}-b")
    images, paths = load_folder(str(tmp_path), (3, 4, 4))
    expected = ["a/v.webp", "a/w.Tiff", "a/z.jpeg", "linked/c/y.bmp", "linked/x.PNG"]
    assert [str(path.relative_to(tmp_path)) for path in paths] == expected
    assert images.classes.tolist() == [0, 0, 0, 1, 1]
    for path, value in zip(paths, images.pixels.float().mean((1, 2, 3)).tolist(), strict=True):
        name = str(path.relative_to(tmp_path)).replace("linked", "b")
        assert value == pytest.approx(40 * names.index(name), abs=2)


@pytest.fixture
def damaged(tmp_path):
    """Two good images, and one of each kind of bad one."""
    for name in ("a.png", "z.png"):
        save(gradient(8, 8), tmp_path / name)
    rng = np.random.default_rng(0)
    save(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), tmp_path / "truncated.jpg")
    whole = (tmp_path / "truncated.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is no image")
    save(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), tmp_path / "broken.png")
    data = bytearray((tmp_path / "broken.png").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "broken.png").write_bytes(bytes(data))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_cannot_be_read_are_skipped_with_a_line(damaged, capfd, workers):
    images, paths = load_folder(damaged, (3, 8, 8), workers=workers)
    assert [path.name for path in paths] == ["a.png", "z.png"]
    assert len(images) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "skipped 4 files" in error
    assert "empty.jpg: expected an image, got an empty file" in error
    assert "text.jpg: expected an image, got a file of another kind" in error
    assert error.rstrip().endswith("; ...")


def test_nothing_is_said_when_nothing_is_skipped(photos, capfd):
    load_folder(photos, (3, 8, 8), strict=True)
    assert capfd.readouterr() == ("", "")


def test_strict_names_the_first_file(damaged):
    with pytest.raises(OSError, match=r"broken\.png: expected an image, got ") as error:
        load_folder(damaged, (3, 8, 8), strict=True)
    assert "Traceback" not in str(error.value)
    for name in ("broken.png", "empty.jpg", "text.jpg"):
        (damaged / name).unlink()
    with pytest.raises(OSError, match=r"truncated\.jpg: expected an image, got OSError: .*truncated"):
        load_folder(damaged, (3, 8, 8), strict=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_on_demand_every_row_keeps_its_path(damaged, capfd, workers):
    images, paths = load_folder(damaged, (3, 8, 8), memory=0, workers=workers)
    assert [path.name for path in paths] == ["a.png", "z.png"]  # all were decoded
    assert len(images) == 2
    error = capfd.readouterr().err
    assert error.startswith("images: skipped 4 files")
    assert error.count("\n") == 1
    paths[1].unlink()
    for some in (images, images.subset(torch.arange(2)), images.to("cpu")):
        with pytest.raises(OSError, match=r"z\.png: expected an image, got FileNotFoundError") as error:
            list(some.batches(2))
        assert "Traceback" not in str(error.value)
    assert len(images[torch.tensor([0])]) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_on_demand_a_file_that_fails_later_is_named(damaged, workers):
    for name in ("broken.png", "empty.jpg", "text.jpg"):
        (damaged / name).unlink()
    images, paths = load_folder(damaged, (3, 8, 8), memory=0, workers=workers, strict=True)
    assert [path.name for path in paths] == ["a.png", "truncated.jpg", "z.png"]  # its header is whole
    with pytest.raises(OSError, match=r"truncated\.jpg: expected an image, got OSError: .*truncated") as error:
        list(images.batches(2))
    assert "Traceback" not in str(error.value)
    with pytest.raises(OSError, match=r"truncated\.jpg"):
        images[torch.tensor([1])]
    assert len(images[torch.tensor([0, 2])]) == 2


def test_damaged_metadata_and_huge_images_do_not_matter(tmp_path, monkeypatch, recwarn):
    save(gradient(8, 8), tmp_path / "a.png", exif=b"Exif\0\0garbage!")
    save(gradient(8, 8), tmp_path / "b.jpg", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\0\xff\x01\x12")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # from here on Pillow warns, from twice that on it refuses
    assert len(load_folder(tmp_path, (3, 8, 8), strict=True)[0]) == 2
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(OSError, match="DecompressionBombError"):
        load_folder(tmp_path, (3, 8, 8), strict=True)


def test_files_and_folders_together(tmp_path):
    (tmp_path / "more").mkdir()
    for i, name in enumerate(("b.png", "a.png", "more/c.png")):
        save(gradient(8, 8 + i), tmp_path / name)
    files = [tmp_path / "b.png", tmp_path / "more", tmp_path / "b.png", tmp_path / "a.png"]
    images, paths = load_folder(files, (3, 8, 8))
    assert paths == [tmp_path / name for name in ("b.png", "more/c.png", "a.png")]
    assert images.classes is None
    alone, [path] = load_folder(str(tmp_path / "a.png"), (3, 8, 8))
    assert path == tmp_path / "a.png"
    assert alone[torch.arange(1)].equal(images[torch.tensor([2])])


def test_folders_without_images(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=f"images: expected a folder of images, got {tmp_path}/missing, which is"
    ):
        load_folder(tmp_path / "missing", (3, 8, 8))
    with pytest.raises(ArgumentError, match=r"images: expected images \(\.jpg, .*\.webp\) in .*, got none"):
        load_folder(tmp_path, (3, 8, 8))
    (tmp_path / "a.png").touch()
    with pytest.raises(ArgumentError, match=r"images: expected images in .*a\.png, got 1 files .* got an empty file"):
        load_folder(tmp_path / "a.png", (3, 8, 8))
    with pytest.raises(ArgumentError, match="images: expected at least one file or folder, got none"):
        load_folder([], (3, 8, 8))
    with pytest.raises(
        ArgumentError, match=r"images: expected images in .*, got 1 files that cannot be read; .*a\.png"
    ):
        load_folder(tmp_path, (3, 8, 8))
    save(gradient(32, 32), tmp_path / "a.jpg")
    (tmp_path / "a.png").unlink()
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-200])
    with pytest.raises(ArgumentError, match=r"images: expected images in .*, got none that can be read"):
        load_folder(tmp_path, (3, 8, 8))
    with pytest.raises(ArgumentError, match=r"^photos: expected images in .*, got none that can be read"):
        load_folder(tmp_path, (3, 8, 8), argument="photos")
    with pytest.raises(FileNotFoundError, match=r"^photos: expected a folder of images, got "):
        load_folder(tmp_path / "missing", (3, 8, 8), argument="photos")


def test_the_line_on_stderr_names_the_argument(damaged, capfd):
    load_folder(damaged, (3, 8, 8), argument="photos")
    assert capfd.readouterr().err.startswith("photos: skipped 4 files")


def test_every_folder_is_looked_at_once(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for i in range(5):
        save(gradient(4, 4), inside / "b" / f"{i}.png")
    save(gradient(4, 4), outside / "c" / "x.png")
    for link, target in (("loop", "."), ("a", "b"), ("b/up", ".."), ("b/out", "../../outside"), ("out2", outside)):
        (inside / link).symlink_to(target, target_is_directory=True)
    (outside / "back").symlink_to(inside)
    images, paths = load_folder(inside, (3, 4, 4))
    expected = [*(f"b/{i}.png" for i in range(5)), "out2/c/x.png"]  # the folder itself, not a link to it
    assert [str(path.relative_to(inside)) for path in paths] == expected
    assert images.classes.tolist() == [0] * 5 + [1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shape", (2, 8, 8)),
        ("shape", (3, 8)),
        ("shape", 8),
        ("shape", (3, 0, 8)),
        ("workers", -1),
        ("memory", -1),
        ("strict", "no"),
    ],
)
def test_wrong_arguments_of_load_folder(photos, name, value):
    with pytest.raises(ArgumentError, match=f"^{name}: expected .*, got "):
        load_folder(photos, **{"shape": (3, 8, 8)} | {name: value})


# Data sets of the user


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("memory", [0, 1])
def test_an_item_that_is_no_image_is_named_without_a_traceback(workers, memory):
    good = gradient(8, 8)
    items = [good] * 1000
    items[501] = "text"  # not among those that are looked at for the shape
    with pytest.raises(ArgumentError, match=r"^data: expected items that are PIL images") as error:
        split = load_split((Custom(*items), Custom(good)), workers=workers, memory=memory)
        list(split.train.batches(100))
    assert "item 501" in str(error.value)
    assert str(error.value).endswith("an object of type str")
    items[501] = KeyError("label\nand more")
    with pytest.raises(ArgumentError, match="item 501, KeyError: 'label") as error:
        split = load_split((Custom(*items), Custom(good)), workers=workers, memory=memory)
        list(split.train.batches(100))
    assert "Traceback" not in str(error.value)


def test_what_is_no_data_set_is_named():
    class Stream(IterableDataset):
        def __iter__(self):
            yield gradient(8, 8)

    class Endless(Dataset):
        def __getitem__(self, i):
            return gradient(8, 8)

    for data in (Stream(), Endless(), 7, None):
        with pytest.raises(ArgumentError, match=f"^data: expected a map-style data set.*got {type(data).__name__}$"):
            load_split(data)
    with pytest.raises(ArgumentError, match=r"^data: expected a data set with images, got an empty one"):
        load_split(Custom())
    with pytest.raises(ArgumentError, match=r"^data: expected a pair .* got 3 data sets"):
        load_split((Custom(1), Custom(1), Custom(1)))


def test_classes_come_from_the_items_or_from_an_attribute_that_agrees_with_them():
    images = torch.zeros(10, 1, 4, 4, dtype=torch.uint8)
    labels = torch.arange(10) % 3
    told = Custom(*zip(images, labels, strict=True))
    for targets in (None, labels.tolist(), (labels + 1).tolist(), labels[:5].tolist(), "0120120120"):
        told.targets = targets
        assert load_split((told, told)).train.classes.tolist() == labels.tolist()
        assert load_split((told, told), in_classes=[1, 2]).held_out.classes.tolist() == [0, 0, 0, 0]
    told.targets = labels.tolist()
    assert load_split((told, told), memory=0).train.classes.tolist() == labels.tolist()
    told.targets = None
    assert load_split((told, told), memory=0).train.classes is None  # that would take reading them all
    assert load_split((told, told), memory=0, in_classes=[1]).train.rows.tolist() == [1, 4, 7]
    for label in ("cat", 0.5, torch.zeros(2), None):
        unlabelled = Custom(*((image, label) for image in images))
        assert load_split((unlabelled, unlabelled)).train.classes is None
        with pytest.raises(ArgumentError, match=r"^in_classes: expected None for data without classes"):
            load_split((unlabelled, unlabelled), in_classes=[0])
    assert load_split(TensorDataset(images)).train.classes is None
    assert load_split((TensorDataset(images, labels), images)).test.classes is None

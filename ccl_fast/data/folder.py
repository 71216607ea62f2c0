"""The image files below a folder, without those that cannot be read."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from ccl_fast.checks import check_count
from ccl_fast.data.checks import check_loading, check_shape
from ccl_fast.data.loading import load
from ccl_fast.data.options import MAX_PIXELS
from ccl_fast.data.pixels import native_shape, pillow_silenced
from ccl_fast.data.reading import BATCH, progress_bar, read
from ccl_fast.data.source import Sampled, Source, reason
from ccl_fast.errors import ArgumentError

if TYPE_CHECKING:
    from ccl_fast.data.images import Images

N_NAMED = 3  # of the files that were skipped
# Of Pillow's, those that IMG_EXTENSIONS name: for others, whatever a file is called, it may start a program.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")


def load_folder(
    path: str | Path | Sequence[str | Path],
    shape: tuple[int, int, int],
    *,
    argument: str = "images",
    strict: bool = False,
    workers: int | None = 0,
    memory: float = 4.0,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Images, list[Path]]:
    """All images below a folder, brought to a shape: grey or RGB, shorter side resized, centre cropped.

    They come in the order of their paths. Files and folders whose name begins with a dot are not looked at; links to
    folders are followed, but each folder is looked at once. Files that cannot be read are left out, and a line on
    stderr says so; for that, images on demand are all decoded once. Every row is the image of its path: none is
    replaced.

    Args:
        path: the folder; or a file, or several files and folders.
        shape: (1 or 3, h, w).
        argument: how errors, and the line on stderr, call the folder.
        strict: a file that cannot be read is an error; of images on demand, when it is used.
        workers: processes that read; 0: this one does; None: as `load_split` says.
        memory: GiB that the decoded images may take; if they take more, they are read on demand.
        max_pixels: a file of more pixels than that counts as one that cannot be read: a small file can hold gigabytes.

    Returns:
        The images, and the path of each. Their classes are the subfolders of a single folder, or None where there are
        none.

    Raises:
        ArgumentError: naming the argument; also if there is no image, or none that can be read.
        FileNotFoundError: there is no such folder.
        OSError: a file cannot be read, and ``strict``; images on demand raise it when a file cannot be read any more.
    """
    check_loading(seed=0, workers=workers, memory=memory, limit=None, strict=strict, download=False)
    check_count("max_pixels", max_pixels)
    check_shape("shape", shape)
    reading: Any = {"strict": strict, "workers": workers or 0, "max_pixels": max_pixels}
    several = [path] if isinstance(path, str | Path) else list(path)
    place = ", ".join(map(str, several))
    if len(several) == 1 and not Path(os.path.expanduser(several[0])).is_file():
        [source] = open_folders([Path(several[0])], argument, **reading)
    else:
        source = _source(_listed(several, argument), None, (), argument, place=place, **reading)
    return _load(source, shape, place, strict=strict, workers=workers, memory=memory)


def _listed(paths: Sequence[str | Path], argument: str) -> list[Path]:
    """The files among the paths, and those below the folders among them."""
    found = []
    for path in (Path(os.path.expanduser(path)) for path in paths):
        found += [path] if path.is_file() else _image_files(path, argument, parts=[])
    if not found:
        raise ArgumentError(f"{argument}: expected at least one file or folder, got none")
    return list(dict.fromkeys(found))


def load_files(
    paths: Sequence[str | Path],
    shape: tuple[int, int, int],
    *,
    argument: str = "images",
    workers: int = 0,
    memory: float = 4.0,
    max_pixels: int = MAX_PIXELS,
) -> Images:
    """The images in some files, in their order, brought to a shape as by `load_folder`.

    Args:
        paths: of the files, at least one.
        shape: (1 or 3, h, w).
        argument: how errors call the files.
        workers: processes that read; 0: this one does.
        memory: GiB that the decoded images may take; if they take more, they are read on demand.
        max_pixels: a file of more pixels than that counts as one that cannot be read.

    Raises:
        ArgumentError: naming the argument.
        OSError: a file cannot be read.
    """
    check_loading(seed=0, workers=workers, memory=memory, limit=None, strict=True, download=False)
    check_count("max_pixels", max_pixels)
    check_shape("shape", shape)
    files = [Path(os.path.expanduser(path)) for path in paths]
    if not files:
        raise ArgumentError(f"{argument}: expected at least one file, got none")
    place = "the files"
    source = _source(files, None, (), argument, place=place, strict=True, workers=workers, max_pixels=max_pixels)
    return _load(source, shape, place, strict=True, workers=workers, memory=memory)[0]


def _load(
    source: FolderSource,
    shape: tuple[int, int, int],
    place: str | Path,
    *,
    strict: bool,
    workers: int | None,
    memory: float,
) -> tuple[Images, list[Path]]:
    """The images of a source and their paths, without those that cannot be read; these are reported."""
    rows = torch.arange(len(source), device="cpu")
    channels, height, width = shape
    images, rows = read(source, rows, (channels, height, width), workers=workers, memory=memory, verify=not strict)
    report_skipped(source)
    if not len(images):
        expected = f"images in {place}, got none that can be read"
        raise ArgumentError(f"{source.argument}: expected {expected}; {source.skipped[0]}")
    return images, [source.items.paths[row] for row in rows.tolist()]


class Files(Dataset):
    """Image files.

    Args:
        paths: of the files.
        targets: their classes, or None.
        classes: what classes 0, 1, ... are called; none where there are none.
    """

    def __init__(self, paths: Sequence[Path], targets: Sequence[int] | None, classes: Sequence[str] = ()):
        self.paths = paths
        self.targets = targets
        self.classes = classes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Image.Image, int | None]:
        with _open(self.paths[i]) as image:
            image.load()
        return image, None if self.targets is None else self.targets[i]


class FolderSource(Source):
    """Image files whose header could be read.

    Args:
        files: at least one.
        shapes: their own, [n].
        argument: how errors call them.
        strict: a file that cannot be read is an error; else it is skipped.
        skipped: why files were skipped so far.
    """

    can_be_shared = True
    items: Files

    def __init__(
        self,
        files: Files,
        shapes: Sequence[tuple[int, int, int]],
        argument: str,
        *,
        strict: bool,
        skipped: list[Exception],
    ):
        super().__init__(files, argument)
        self.strict = strict
        self.skipped = skipped
        self.told: set[int] = set()
        # All headers are known: an item of every shape stands for all items.
        first = {shape: i for i, shape in reversed(list(enumerate(shapes)))}
        self.sample = [
            Sampled(i, shape, None if files.targets is None else files.targets[i])
            for shape, i in sorted(first.items(), key=lambda pair: pair[1])
        ]

    def __getitem__(self, i: int) -> tuple[Tensor, int | None]:
        with pillow_silenced():
            return super().__getitem__(i)

    def failure(self, i: int, reason: str) -> Exception:
        return _unreadable(self.items.paths[i], reason)

    def skip(self, error: Exception) -> None:
        if self.strict:
            raise error
        self.skipped.append(error)

    def missed(self, i: int, error: Exception) -> None:
        if self.strict:
            raise error
        if i not in self.told:
            self.told.add(i)
            tqdm.write(f"{self.argument}: another image replaces a file that cannot be read; {error}", sys.stderr)


def open_folders(
    folders: Sequence[Path], argument: str, *, strict: bool, workers: int, max_pixels: int
) -> list[FolderSource]:
    """The images below each folder; their classes are the subfolders by name, if all images lie in subfolders.

    Raises:
        ArgumentError: there are no images, or none that can be read.
        FileNotFoundError: there is no such folder.
        OSError: the header of a file cannot be read, and ``strict``.
    """
    folders = [Path(os.path.expanduser(folder)) for folder in folders]
    files = [_image_files(folder, argument, parts=folders) for folder in folders]
    names = [[_subfolder(path, folder) for path in paths] for folder, paths in zip(folders, files, strict=True)]
    numbers = {name: i for i, name in enumerate(sorted({name for of_one in names for name in of_one}))}
    sources = []
    for folder, paths, of_one in zip(folders, files, names, strict=True):
        targets = None if "" in numbers else [numbers[name] for name in of_one]
        classes = () if targets is None else list(numbers)
        reading = {"place": folder.absolute(), "strict": strict, "workers": workers, "max_pixels": max_pixels}
        sources.append(_source(paths, targets, classes, argument, **reading))
    return sources


def _source(
    paths: Sequence[Path],
    targets: Sequence[int] | None,
    classes: Sequence[str],
    argument: str,
    *,
    place: str | Path,
    strict: bool,
    workers: int,
    max_pixels: int,
) -> FolderSource:
    """Those of some files whose header can be read; it is an error if there are none, and with ``strict`` any other."""
    headers = _headers(paths, workers=workers, max_pixels=max_pixels)
    errors = [header for header in headers if isinstance(header, Exception)]
    if errors and strict:
        raise errors[0]
    if len(errors) == len(paths):
        expected = f"images in {place}, got {len(paths)} files that cannot be read"
        raise ArgumentError(f"{argument}: expected {expected}; {errors[0]}")
    kept = {i: header for i, header in enumerate(headers) if not isinstance(header, Exception)}
    images = Files([paths[i] for i in kept], None if targets is None else [targets[i] for i in kept], classes)
    return FolderSource(images, list(kept.values()), argument, strict=strict, skipped=errors)


def split_folders(folder: Path) -> list[Path]:
    """The subfolders ``train`` and ``test``, or ``val``, if both are there; else the folder itself."""
    train, *tests = (Path(os.path.expanduser(folder), name) for name in ("train", "test", "val"))
    test = [path for path in tests if path.is_dir()]
    return [train, test[0]] if train.is_dir() and test else [folder]


def report_skipped(*sources: Source) -> None:
    """One line on stderr, if files were skipped."""
    errors = [error for source in sources for error in source.skipped]
    if errors:
        named = "; ".join(map(str, errors[:N_NAMED])) + ("; ..." if len(errors) > N_NAMED else "")
        print(f"{sources[0].argument}: skipped {len(errors)} files that cannot be read; {named}", file=sys.stderr)


def check_is_folder(argument: str, folder: Path) -> None:
    """Check that there is a folder: a FileNotFoundError if not, an ArgumentError if it is a file."""
    if not folder.exists():
        raise FileNotFoundError(f"{argument}: expected a folder of images, got {folder.absolute()}, which is not there")
    if not folder.is_dir():
        raise ArgumentError(f"{argument}: expected a folder of images, got a file, {folder.absolute()}")


def _image_files(folder: Path, argument: str, parts: Sequence[Path]) -> list[Path]:
    """Paths below a folder, each folder looked at once; a link leads into none of the other parts."""
    check_is_folder(argument, folder)
    paths, seen = [], {os.path.realpath(part) for part in parts} - {os.path.realpath(folder)}
    roots = [str(folder)]
    for root in roots:  # it grows: links come after the folders themselves, which keep their own paths
        for parent, subfolders, names in os.walk(root):
            real = os.path.realpath(parent)
            subfolders[:] = [] if real in seen else sorted(name for name in subfolders if not name.startswith("."))
            if real in seen:
                continue
            seen.add(real)
            roots += [link for name in subfolders if os.path.islink(link := os.path.join(parent, name))]
            images = [name for name in names if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")]
            paths += [Path(parent, name) for name in images]
    if not paths:
        raise ArgumentError(
            f"{argument}: expected images ({', '.join(IMG_EXTENSIONS)}) in {folder.absolute()}, got none"
        )
    return sorted(paths)


def _subfolder(path: Path, folder: Path) -> str:
    """The folder's subfolder that the file lies in, at whatever depth; empty: in none."""
    return next(iter(path.relative_to(folder).parts[:-1]), "")


def _headers(paths: Sequence[Path], *, workers: int, max_pixels: int) -> list[tuple[int, int, int] | Exception]:
    """The shape of every image, or why its header cannot be read."""
    headers = []
    with progress_bar(len(paths), "checking") as bar:
        for batch in load(
            _Headers(paths, max_pixels), torch.arange(len(paths), device="cpu").split(BATCH), list, workers=workers
        ):
            headers += batch
            bar.update(len(batch))
    return headers


class _Headers(Dataset):
    def __init__(self, paths: Sequence[Path], max_pixels: int):
        self.paths = paths
        self.max_pixels = max_pixels

    def __getitem__(self, i: int) -> tuple[int, int, int]:
        path = self.paths[i]
        try:
            with pillow_silenced(), _open(path) as image:
                shape = native_shape(image)
                if shape[1] * shape[2] > self.max_pixels:
                    raise ValueError(f"{shape[1]} x {shape[2]} pixels, more than max_pixels = {self.max_pixels}")
                image.verify()
        except Exception as error:  # Pillow's plugins raise whatever a broken file makes them
            raise _unreadable(path, reason(error)) from error
        return shape


def _open(path: Path) -> Image.Image:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
        raise ValueError("no regular file")
    try:
        return Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:  # its message is the path
        what = "a file of another kind" if path.stat().st_size else "an empty file"
        raise ValueError(what) from None


def _unreadable(path: Path, reason: str) -> OSError:
    return OSError(f"{path}: expected an image, got {reason}")

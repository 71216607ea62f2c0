"""Files that are called images: none starts a program, blocks a run, or takes the machine's memory."""

import multiprocessing
import os
import signal
import socket
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

pytest.importorskip("torchvision")  # the extra "train"

from PIL import EpsImagePlugin, Image

from ccl_fast.data import load_folder, load_split, loading
from ccl_fast.errors import ArgumentError, ReaderError

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def good(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(tmp_path / "good.png")
    return tmp_path


def test_no_program_is_started(good, monkeypatch, capfd):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    for name in ("a.jpg", "b.png", "c.tif"):
        (good / name).write_bytes(EPS)
    with Image.open(good / "a.jpg") as image:  # by Pillow itself it is one
        assert image.format == "EPS"
    _, paths = load_folder(good, (3, 8, 8))
    assert [path.name for path in paths] == ["good.png"]
    assert not started
    assert "skipped 3 files" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_file_is_skipped(good, capfd, workers):
    os.mkfifo(good / "pipe.png")
    (good / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(good / "socket.png"))
        _, paths = load_folder(good, (3, 8, 8), workers=workers)
    assert [path.name for path in paths] == ["good.png"]
    error = capfd.readouterr().err
    assert "skipped 3 files" in error
    assert error.count("no regular file") == 3


def test_a_small_file_of_many_pixels_is_skipped(good, capfd):
    Image.new("1", (13_000, 13_000)).save(good / "bomb.png")
    assert (good / "bomb.png").stat().st_size < 2**20
    _, paths = load_folder(good, (3, 8, 8))
    assert [path.name for path in paths] == ["good.png"]
    assert "13000 x 13000 pixels, more than max_pixels = 90000000" in capfd.readouterr().err
    with pytest.raises(ArgumentError, match=r"none that can be read|cannot be read"):
        load_folder(good, (3, 8, 8), max_pixels=63)
    assert len(load_folder(good, (3, 8, 8), max_pixels=64)[1]) == 1
    with pytest.raises(ArgumentError, match=r"^max_pixels: "):
        load_split(good, max_pixels=0)


class Fatal(Dataset):
    """Images of which one does something to the process that reads it."""

    def __init__(self, deed):
        self.deed = deed

    def __len__(self):
        return 200

    def __getitem__(self, i):
        if i == 150 and multiprocessing.parent_process() is not None:
            self.deed()
        return torch.zeros(3, 8, 8), 0


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_reader_that_is_lost_is_an_error_in_time(number, monkeypatch):
    monkeypatch.setattr(loading, "TIMEOUT", 5)
    start = time.monotonic()
    before = multiprocessing.active_children()
    with pytest.raises(ReaderError, match=r"^a process that reads images has ended, or was stopped after 5 ") as error:
        load_split((Fatal(lambda: os.kill(os.getpid(), number)), Fatal(lambda: None)), workers=1)
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 60
    left = [child for child in multiprocessing.active_children() if child not in before]
    for child in left:
        child.join(10)
        assert not child.is_alive()

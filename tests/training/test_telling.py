# ruff: noqa: E402 (the extra must be there)
"""What a long run tells, and what is chosen where few images leave no other choice."""

import io
import sys
from types import SimpleNamespace

import pytest

for extra in ("jsonargparse", "lightning", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from ccl_fast.errors import ArgumentError
from ccl_fast.training.config import Config, check_sizes
from ccl_fast.training.telling import Telling, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def told(monkeypatch, stream, steps=4, **options):
    """What is written to stdout and stderr by a warm-up of one epoch and an objective's second one."""
    out, err = stream(), stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    telling = Telling({"warm-up": (1, 0), "ccl": (2, 1)}, steps, done=0, **{"quiet": False} | options)
    run = SimpleNamespace(losses=[], step_losses=[])
    for stage in ("warm-up", "ccl"):
        with telling.clustering(stage, run):
            pass
        for _ in range(steps):
            run.step_losses.append(1.25)
            telling.step(stage, run)
        run.losses.append(1.25)
        run.step_losses = []
        telling.epoch(stage, run)
    telling.close()
    return out.getvalue(), err.getvalue()


def test_a_file_gets_a_line_for_every_epoch_and_no_bar(monkeypatch):
    out, err = told(monkeypatch, io.StringIO)
    assert err == ""
    first, estimate, last = out.splitlines()
    assert "\r" not in out
    assert first.startswith("warm-up 1/1: loss 1.250, 0 s, about 0 s left")
    assert estimate.startswith("about ") and estimate.endswith(" for the 2 steps that are left")
    assert last.startswith("ccl 2/2: loss 1.250, 0 s")


def test_nothing_is_estimated_where_no_step_is_left(monkeypatch):
    assert "steps that are left" not in told(monkeypatch, io.StringIO, steps=3)[0]


def test_a_terminal_gets_one_bar_over_all_stages(monkeypatch):
    out, err = told(monkeypatch, Terminal)
    assert "8/8" in err and "ccl 2/2" in err and "loss 1.250" in err
    assert "ccl 2/2: k-means" in err
    assert "steps that are left" in out and "1/1" not in out  # the bar has the epochs


def test_other_processes_are_quiet(monkeypatch):
    assert told(monkeypatch, Terminal, quiet=True)[1] == ""
    assert told(monkeypatch, io.StringIO, quiet=True) == ("", "")


def test_what_takes_long_gets_advice(monkeypatch):
    monkeypatch.setattr("ccl_fast.training.telling.LONG", 0)
    assert "left (smaller is quicker)" in told(monkeypatch, io.StringIO, advice="smaller is quicker")[0]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3570, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_durations_are_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("n", "batch_size", "clusters"),
    [(2, 2, 2), (9, 8, 2), (32, 16, 3), (64, 16, 6), (245, 32, 12), (1023, 128, 12), (1024, 256, 12), (10**6, 256, 12)],
)
def test_batch_size_and_clusters_are_fitted_to_few_images(n, batch_size, clusters):
    fitted = Config().fitted(n)
    assert (fitted.batch_size, fitted.clusters) == (batch_size, clusters)
    check_sizes(n, Config())
    given = Config(batch_size=n + 1, clusters=[n])
    assert given.fitted(n) == given
    with pytest.raises(ArgumentError, match=rf"^batch_size: expected at most {n}, the number of training images"):
        check_sizes(n, given)

"""How far an experiment has come, kept on disk: checkpoints and metrics.jsonl of every epoch, and what loggers keep."""

from __future__ import annotations

import json
import signal
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ccl_fast.errors import ArgumentError, PeerError, ReaderError, first_line
from ccl_fast.files import write_atomically
from ccl_fast.training import checkpoint
from ccl_fast.training.checkpoint import CHECKPOINTS, CheckpointError, check_finite
from ccl_fast.training.config import fixed_by_warm_up, warmup_length
from ccl_fast.training.interruption import Interrupted, Interruption

if TYPE_CHECKING:
    from ccl_fast.data import Images
    from ccl_fast.distributed import Group
    from ccl_fast.training.loggers import Loggers, Results
    from ccl_fast.training.loop import Run
    from ccl_fast.training.probe import Probe
    from ccl_fast.training.telling import Telling

WARM_UP = "warm-up"
# Why a run that is not finished keeps its number of epochs.
FIXED = (
    "the learning rate of every step depends on it, half a cosine that ends at 0, so another number makes another run "
    "from its first step on; a run that is finished can be lengthened"
)
# What is in a run's folder beside its checkpoints.
METRICS = "metrics.jsonl"
FINGERPRINTED = 100
# The state that a checkpoint keeps.
STATE = {
    "arguments": dict,
    "images": list,
    "finished": dict,
    "stage": str,
    "run": dict,
    "lines": list,
    "seconds": float,
}
# Of a line of the log: which epoch it is of.
NO_SCALARS = {"stage", "objective", "epoch", "step"}


class Progress:
    """The finished part of an experiment, its files (checkpoints, metrics.jsonl) and its loggers.

    Every process knows what is done; the first one writes the files, and has the loggers.

    Args:
        folder: of the run.
        arguments: those that a resumed run must share.
        images: to train on.
        state: to go on from, of a checkpoint.
        group: the processes.
        probe: looks at the features now and then.
        loggers: what else is told of every epoch.
        go_on: the command that goes on with the run.
    """

    def __init__(
        self,
        folder: Path,
        arguments: dict,
        images: Images,
        state: dict | None,
        group: Group,
        probe: Probe,
        loggers: Loggers,
        go_on: str,
    ):
        self.folder, self.arguments, self.group, self.probe = folder, arguments, group, probe
        self.loggers, self.go_on = loggers, go_on
        with group.together():
            self.images = _fingerprint(images)
        everywhere = group.gather_objects(self.images)
        others = [rank for rank, images in enumerate(everywhere) if images != everywhere[0]]
        if others:
            raise ArgumentError(
                f"data: expected the same training images on every process, got others, or others in number, on "
                f"process {others[0]} than on process 0"
            )
        self.finished: dict[str, dict] = {}  # the states of runs at the end of their stages
        self.under_way: tuple[str, dict] | None = None
        self.lines: list[dict] = []
        self.seconds_before = 0.0
        self._start = time.perf_counter()
        self._not_logged: list[dict] = []  # lines that the loggers have not been given
        if state is None:
            return
        self._check(state, folder, "the run to resume", lambda given: given)
        self.finished, self.lines, self.seconds_before = state["finished"], state["lines"], state["seconds"]
        self.under_way = (state["stage"], state["run"])
        self.loggers.ids = dict(state.get("logs", {}))
        group.first(self._write_lines)  # the last ones may be missing if the run was killed

    def is_finished(self, stage: str, epochs: int) -> bool:
        """Tell whether a stage has its epochs; one of a run that is being lengthened may be at the end of fewer."""
        return stage in self.finished and len(self.finished[stage]["losses"]) >= epochs

    def begin_with(self, state: dict, origin: str | Path, stages: Collection[str]) -> None:
        """Take over the warm-up of another run and, of the stages, what else is finished there.

        Args:
            state: of the other run's last checkpoint.
            origin: its folder.
            stages: the warm-up and others that are the same after the same warm-up.
        """
        self._check(state, Path(origin), "the run to warm up from", fixed_by_warm_up)
        finished, epochs = dict(state["finished"]), len(state["run"]["losses"])
        last = self.arguments["epochs"]
        if state["stage"] == WARM_UP:
            last = warmup_length(last, self.arguments["warmup_epochs"])
        if epochs == last:
            finished[state["stage"]] = _end_of(state["stage"], state["run"])
        if WARM_UP not in finished:
            expected = f"a run that has done its warm-up of {last} epochs"
            raise ArgumentError(f"warmup_from: expected {expected}, got {str(origin)!r} with {epochs}")
        self.finished = {stage: end for stage, end in finished.items() if stage in stages}
        self.lines = [line for line in state["lines"] if line["stage"] in self.finished]
        self._not_logged = list(self.lines)

    def _check(self, state: dict, folder: Path, whose: str, shared: Callable[[dict], dict]) -> None:
        """Check that the state is of a run with the same images and those arguments that are to be shared."""
        if not _is_state(state):
            raise CheckpointError(f"the checkpoint in {folder / CHECKPOINTS} is none of a training run")
        ours, theirs = shared(self.arguments), shared(state["arguments"])
        if ours.keys() != theirs.keys():
            names = ", ".join(sorted(ours.keys() ^ theirs.keys()))
            raise CheckpointError(
                f"the checkpoint in {folder / CHECKPOINTS} is of another version of ccl_fast ({names})"
            )
        for name, was in theirs.items():
            if was != ours[name]:
                expected = f"{was!r}, as {whose} has it (config.yaml in its folder has all)"
                why = f"; {FIXED}" if name == "epochs" else ""
                raise ArgumentError(f"{name}: expected {expected}, got {ours[name]!r}{why}")
        if state["images"] != self.images:
            raise ArgumentError(f"data: expected the training images of {whose}, got others, or others in number")

    def load(self, run: Run, state: dict) -> None:
        """Set a run to a state that a checkpoint has."""
        try:
            check_finite(state)
            run.load_state_dict(state)
        except Exception as error:  # whatever a foreign state makes torch say
            reason = f"({first_line(error)})"
            raise CheckpointError(
                f"the checkpoint in {self.folder / CHECKPOINTS} does not fit this run {reason}"
            ) from error

    def save(self, stage: str, run: Run) -> Path:
        return self.group.first(lambda: self._save(stage, run))

    def _save(self, stage: str, run: Run) -> Path:
        seconds = self.seconds_before + time.perf_counter() - self._start
        return checkpoint.save(
            self.folder / CHECKPOINTS,
            {
                "arguments": self.arguments,
                "images": self.images,
                "finished": self.finished,
                "stage": stage,
                "run": run.state_dict(),
                "lines": self.lines,
                "seconds": seconds,
                "logs": self.loggers.ids,
            },
        )

    def end_epoch(self, stage: str, run: Run, last: int) -> None:
        """Write down an epoch of a stage that ends with epoch ``last``."""
        epoch, seen = len(run.losses), {}
        if self.probe.is_due(epoch, last) or epoch in run.config.restarts:
            seen = self.group.patient.first(lambda: self.probe.look(run))
        line = {"stage": stage, "objective": run.config.objective, "epoch": epoch, "step": run.step}
        line |= {"loss": run.losses[-1], "learning_rate": run.used_learning_rate} | run.log | seen
        self.lines.append(line)
        self._not_logged.append(line)

        def write() -> None:
            self._save(stage, run)
            self._write_lines()
            for line in self._not_logged:
                self._begin_logging(line["stage"], line["epoch"])
                self.loggers.log(_values(line), line["epoch"])

        self.group.patient.first(write)  # a logger's server may be slow
        self._not_logged = []

    def begin_logging(self, stage: str, epoch: int) -> None:
        """Begin, or go on with, the logs of a stage with an epoch: a logger that cannot says so before that."""
        self.group.patient.first(lambda: self._begin_logging(stage, epoch))

    def _begin_logging(self, stage: str, epoch: int) -> None:
        of_stage = [line for line in self.lines if line["stage"] == stage and line["epoch"] < epoch]
        self.loggers.begin(stage, epoch, {line["epoch"]: _values(line) for line in of_stage})

    def log_results(self, objective: str, results: Results) -> None:
        """Give the loggers what is known of an objective at the end, on the first process."""
        last = len(self.finished[objective]["losses"])
        self._begin_logging(objective, last + 1)
        self.loggers.finish(results, last)

    def close(self) -> None:
        self.loggers.close()

    def _write_lines(self) -> None:
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        write_atomically(self.folder / METRICS, lambda file: file.write(text.encode()))


def advance(
    run: Run, stage: str, epochs: int, progress: Progress, interruption: Interruption, telling: Telling
) -> None:
    """Bring one stage to its end, from wherever it is."""
    if progress.is_finished(stage, epochs):
        return
    if progress.under_way and progress.under_way[0] == stage:
        progress.load(run, progress.under_way[1])
    elif stage in progress.finished:
        progress.load(run, progress.finished[stage])
    elif stage != WARM_UP:
        progress.load(run, progress.finished[WARM_UP])
    progress.begin_logging(stage, len(run.losses) + 1)

    def after_step() -> None:
        telling.step(stage, run)
        # A signal may reach one process alone, or all of them at different steps: they stop after the same one.
        number = max(progress.group.gather_int(interruption.received or 0))
        if number:
            received, path = signal.Signals(number), progress.save(stage, run)
            raise Interrupted(f"stopped by {received.name}; saved to {path}", received, progress.go_on)

    def after_epoch() -> None:
        progress.end_epoch(stage, run, epochs)
        telling.epoch(stage, run)

    try:
        with progress.group.waiting():
            run.advance(
                epochs,
                after_step=after_step,
                after_epoch=after_epoch,
                clustering=lambda: telling.clustering(stage, run),
            )
    except (FloatingPointError, PeerError, ReaderError) as error:
        last = progress.folder / CHECKPOINTS / checkpoint.LAST
        good = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        if last.exists() and not isinstance(error, FloatingPointError):
            good += f"; to go on from it: {progress.go_on}"
        raise type(error)(f"{error}; {good}") from error
    progress.finished[stage] = _end_of(stage, run.state_dict())


def lengthened(state: dict, arguments: dict, objectives: Sequence[str]) -> dict:
    """Return the state of a finished run as that of a run with more epochs; any other state as it is.

    Args:
        state: of a checkpoint.
        arguments: of the run to come.
        objectives: of both, in the order in which they are trained.

    Raises:
        ArgumentError: the run has fewer epochs, but is not finished.
    """
    if not _is_state(state) or not {"epochs", "warmup_epochs", "restarts"} <= state["arguments"].keys():
        return state  # of something else, which is told later
    was, stage, run = state["arguments"], state["stage"], state["run"]
    if arguments["restarts"] != [*was["restarts"], was["epochs"]]:
        return state
    if len(run["losses"]) < was["epochs"] or stage not in (WARM_UP, objectives[-1]):
        expected = f"{was['epochs']}, as the run to resume has it"
        raise ArgumentError(f"epochs: expected {expected}, got {arguments['epochs']}; {FIXED}")
    changed = {name: arguments[name] for name in ("epochs", "restarts")}
    changed["warmup_epochs"] = warmup_length(was["epochs"], was["warmup_epochs"])
    end = _end_of(stage, run)
    return state | {"arguments": was | changed, "finished": state["finished"] | {stage: end}, "run": end}


def _values(line: dict) -> dict[str, float]:
    """Return the numbers of a line of the log."""
    return {name: line[name] for name in sorted(line.keys() - NO_SCALARS)}


def _is_state(state: dict) -> bool:
    """Tell whether a checkpoint's state has what is read of it here; the rest is `Run`'s to read."""
    if not all(isinstance(state.get(name), kind) for name, kind in STATE.items()):
        return False
    lines_are_lines = all(isinstance(line, dict) and {"stage", "epoch"} <= line.keys() for line in state["lines"])
    return lines_are_lines and isinstance(state["run"].get("losses"), list)


def _end_of(stage: str, state: dict) -> dict:
    """Return what is kept of the state at the end of a stage: only the warm-up is gone on from."""
    return state if stage == WARM_UP else state | {"optimizer": None}


def _fingerprint(images: Images) -> list[int]:
    """Return number and shape of the images, and a check sum of some: labels and centres belong to these."""
    some = images[
        torch.linspace(0, len(images) - 1, min(len(images), FINGERPRINTED), dtype=torch.float64, device="cpu").long()
    ]
    pixels = (some.cpu() * 255).round().to(torch.uint8).contiguous()
    return [len(images), *images.shape, zlib.crc32(pixels.numpy().data)]

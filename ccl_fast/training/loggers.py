"""Loggers of an experiment, by name: Lightning's, of every stage a run of its own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from ccl_fast.checks import check_choice
from ccl_fast.errors import ArgumentError, first_line

if TYPE_CHECKING:
    import numpy as np

LoggerName = Literal["tensorboard", "csv", "wandb", "mlflow"]

# What is in a run's folder, and the name that wandb and MLflow group runs under unless their environment names another.
EVENTS, TABLES, PROJECT = "tensorboard", "csv", "ccl-fast"
# What is no part of the extra "train"; MLflow's imports as it is called.
EXTRA = ("wandb", "mlflow")

Values = Mapping[str, float]


def check_loggers(name: str, value: object) -> None:
    """Check one or several names of loggers, and that the packages of these are there.

    Raises:
        ArgumentError: naming what is wrong, and what to install.
    """
    names = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
    for one in names:
        check_choice(name, one, get_args(LoggerName))
        if one in EXTRA and find_spec(str(one)) is None:
            raise ArgumentError(f"{name}: expected the package of {one!r} to be there (pip install {one}), got none")


@dataclass(frozen=True)
class Stage:
    """A stage of an experiment, as a logger begins it, or goes on with it.

    Args:
        name: of the stage.
        folder: of the run.
        arguments: the hyper-parameters, as a file keeps them.
        epoch: the first one that is to come.
        lines: values by epoch, of those before.
        id: of the run that wandb or MLflow has of it; None: none yet.
    """

    name: str
    folder: Path
    arguments: dict
    epoch: int
    lines: Mapping[int, Values]
    id: str | None


class Pixels(Protocol):
    """What can be drawn."""

    def pixels(self) -> np.ndarray:
        """Return uint8 [h, w, 3]."""
        ...


class Results(NamedTuple):
    """What is known of an objective at the end: numbers, and the report's page, if it is there, and its pictures."""

    values: Values
    page: Path
    pictures: Mapping[str, Pixels]


class StageLogger(Protocol):
    """A logger of one stage."""

    # By which the run is found again; "": by its folder.
    id: str

    def log(self, values: Values, epoch: int) -> None: ...

    def finish(self, results: Results, epoch: int) -> None:
        """Log what is known at the end."""
        ...

    def close(self) -> None: ...


class Loggers:
    """The loggers of an experiment, open for one stage at a time; the first process alone has any.

    Once a stage has begun, a logger that fails costs a line on stderr and not the training.

    Args:
        names: which.
        folder: of the run.
        arguments: the hyper-parameters.
    """

    def __init__(self, names: Sequence[LoggerName], folder: Path, arguments: dict):
        self.names, self.folder, self.arguments = names, folder, arguments
        # Of wandb's and MLflow's runs, by "<logger>/<stage>"; they belong into the checkpoint.
        self.ids: dict[str, str] = {}
        self._stage = ""
        self._open: dict[str, StageLogger] = {}

    def begin(self, stage: str, epoch: int, lines: Mapping[int, Values]) -> None:
        """Begin a stage with an epoch, or go on with it, unless that is done; ``lines`` are those of epochs before.

        Raises:
            ArgumentError: a logger cannot.
        """
        if stage == self._stage:
            return
        self.close()
        for name in self.names:
            key = f"{name}/{stage}"
            at = Stage(stage, self.folder, self.arguments, epoch, lines, self.ids.get(key))
            try:
                self._open[name] = _KINDS[name](at)
            except Exception as error:  # whatever their servers say
                self.close()
                got = f"{type(error).__name__} ({first_line(error)})"
                raise ArgumentError(f"loggers: expected {name} to begin or go on with a run, got {got}") from error
            if self._open[name].id:
                self.ids[key] = self._open[name].id
        self._stage = stage

    def log(self, values: Values, epoch: int) -> None:
        """Log what is known of an epoch of the stage."""
        for name, logger in self._open.items():
            self._attempt(name, f"epoch {epoch}", lambda logger=logger: logger.log(values, epoch))

    def finish(self, results: Results, epoch: int) -> None:
        """Log what is known at the end of the stage."""
        for name, logger in self._open.items():
            self._attempt(name, "the results", lambda logger=logger: logger.finish(results, epoch))

    def close(self) -> None:
        """End the stage, as far as it is known."""
        for name, logger in self._open.items():
            self._attempt(name, "the end", logger.close)
        self._stage, self._open = "", {}

    def _attempt(self, name: str, what: str, log: Callable[[], None]) -> None:
        try:
            log()
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            print(f"loggers: {name} could not take {what} of {self._stage} ({reason})", file=sys.stderr)


class _TensorBoard:
    id = ""

    def __init__(self, stage: Stage):
        from lightning.fabric.loggers.tensorboard import TensorBoardLogger

        self._arguments = stage.arguments
        # What a killed run wrote of this epoch and later ones does not count.
        purged: dict[str, Any] = {"default_hp_metric": False, "purge_step": stage.epoch}
        self._logger = TensorBoardLogger(stage.folder / EVENTS, "", stage.name, **purged)

    def log(self, values: Values, epoch: int) -> None:
        self._logger.log_metrics(values, epoch)
        self._logger.save()

    def finish(self, results: Results, epoch: int) -> None:
        # Its tab of hyper-parameters is a table of runs by these and by what came of them, so it has both or neither.
        self._logger.log_hyperparams(self._arguments, dict(results.values), epoch)
        for name, picture in results.pictures.items():
            self._logger.experiment.add_image(name, picture.pixels(), epoch, dataformats="HWC")

    def close(self) -> None:
        self._logger.finalize("success")


class _Csv:
    id = ""

    def __init__(self, stage: Stage):
        from lightning.pytorch.loggers import CSVLogger

        # It goes on with no file, so it is given all there was.
        for name in ("metrics.csv", "hparams.yaml"):
            (stage.folder / TABLES / stage.name / name).unlink(missing_ok=True)
        self._logger = CSVLogger(stage.folder / TABLES, "", stage.name)
        self._logger.log_hyperparams(stage.arguments)
        for epoch, values in stage.lines.items():
            self._logger.log_metrics(dict(values), epoch)

    def log(self, values: Values, epoch: int) -> None:
        self._logger.log_metrics(dict(values), epoch)
        self._logger.save()

    def finish(self, results: Results, epoch: int) -> None:
        self.log(results.values, epoch)

    def close(self) -> None:
        self._logger.finalize("success")


class _Wandb:
    def __init__(self, stage: Stage):
        from lightning.pytorch.loggers import WandbLogger

        self._logger = WandbLogger(
            name=f"{stage.folder.name} {stage.name}",
            group=str(stage.folder),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            save_dir=os.environ.get("WANDB_DIR", "."),
            version=stage.id,
        )
        self._logger.log_hyperparams(stage.arguments)
        self.id = str(self._logger.version)

    def log(self, values: Values, epoch: int) -> None:
        self._logger.log_metrics(values, epoch)

    def finish(self, results: Results, epoch: int) -> None:
        self.log(results.values, epoch)
        if results.page.exists():
            self._logger.experiment.log({results.page.stem: importlib.import_module("wandb").Html(str(results.page))})

    def close(self) -> None:
        self._logger.experiment.finish()  # else the next stage would go into the same run


class _MLflow:
    def __init__(self, stage: Stage):
        from lightning.pytorch.loggers import MLFlowLogger

        self._logger = MLFlowLogger(
            os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT),
            run_name=f"{stage.folder.name} {stage.name}",
            tracking_uri=importlib.import_module("mlflow").get_tracking_uri(),
            run_id=stage.id,
        )
        self.id = str(self._logger.run_id)
        if stage.id is None:  # it lets no argument change, not even where the run is computed
            self._logger.log_hyperparams(stage.arguments)

    def log(self, values: Values, epoch: int) -> None:
        self._logger.log_metrics(values, epoch)

    def finish(self, results: Results, epoch: int) -> None:
        self.log(results.values, epoch)
        if results.page.exists():
            self._logger.experiment.log_artifact(self.id, str(results.page))

    def close(self) -> None:
        self._logger.finalize("success")


_KINDS: dict[LoggerName, Callable[[Stage], StageLogger]] = {
    "tensorboard": _TensorBoard,
    "csv": _Csv,
    "wandb": _Wandb,
    "mlflow": _MLflow,
}

"""A run whose models are trained, opened again: its arguments, its models and its fitted detectors."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, Self

import torch

from ccl_fast.commands.plain_yaml import read_yaml
from ccl_fast.commands.run_folder import CONFIG, DETECTORS, REPORT, WEIGHTS, newest
from ccl_fast.commands.tensor_files import read_tensors, write_tensors
from ccl_fast.data.pixels import TRANSFORM
from ccl_fast.errors import ArgumentError, first_line
from ccl_fast.evaluation import FittedDetectors
from ccl_fast.models import Model
from ccl_fast.training.config import FIELDS, Config, as_list
from ccl_fast.training.objectives import OBJECTIVES, ObjectiveName
from ccl_fast.version import __version__


class KeptModel(NamedTuple):
    """A model from its file.

    Attributes:
        model: in evaluation mode.
        shape: (c, h, w) of the images.
        classes: what the classes are called that it was trained on, if the data told.
        packages: the versions that trained it.
        check_sum: of the file.
    """

    model: Model
    shape: tuple[int, int, int]
    classes: list[str] | None
    packages: dict[str, str]
    check_sum: str


class TrainedRun:
    """The folder of a run, of whose objectives some or all are trained.

    Args:
        folder: that ``train`` writes to.
        config: the run's arguments.
    """

    def __init__(self, folder: str | Path, config: Config):
        self.folder, self.config = Path(folder), config
        self.arguments = config.plain()

    @classmethod
    def open(cls, folder: str | Path, *, needs: tuple[str, ...] = ("backbone", "data"), **replaced) -> Self:
        """Open the folder of a run that was trained some time.

        Args:
            folder: of the run.
            needs: arguments that no file can keep if they are modules or Datasets, and that have to be given then.
            replaced: arguments of ``train`` to use instead of the run's own: other OOD sets, another place of the data,
                a module, a Dataset. None leaves the run's own.

        Raises:
            ArgumentError: that is no run, or one of which no objective is trained, or ``needs`` something.
        """
        path = Path(folder) / CONFIG
        if not path.exists():
            inside = newest(Path(folder), CONFIG)
            hint = f" (did you mean {str(inside)!r}, the newest one in it?)" if inside is not None else ""
            raise ArgumentError(f"run: expected the folder of a run (with config.yaml), got {str(folder)!r}{hint}")
        run = cls(folder, read_arguments(path))
        run.config = replace(run.config, **{name: value for name, value in replaced.items() if value is not None})
        for name in needs:
            kept = getattr(run.config, name)
            if any(isinstance(value, str) and value.startswith("<") for value in as_list(kept)):
                raise ArgumentError(
                    f"{name}: expected the one that the run was trained with, as no file can keep {kept}"
                )
        if not run.objectives:
            run.check_finished()
        return run

    @property
    def objectives(self) -> list[ObjectiveName]:
        """Those that are trained."""
        return [objective for objective in OBJECTIVES if self._weights(objective).exists()]

    @property
    def is_judged(self) -> bool:
        """Whether all is there that a run leaves: report, page and every model's fitted detectors."""
        paths = [self.folder / f"{REPORT}.json", self.folder / f"{REPORT}.html"]
        return all(path.exists() for path in (*paths, *map(self._detectors, self.config.objectives)))

    def check_finished(self) -> None:
        """Check that all objectives are trained.

        Raises:
            ArgumentError: one is not.
        """
        missing = [objective for objective in self.config.objectives if objective not in self.objectives]
        if missing:
            raise ArgumentError(
                f"run: expected a finished run, got {str(self.folder)!r} without {WEIGHTS.format(missing[0])}; "
                "the same training command with resume goes on with it"
            )

    def write_model(self, objective: str, model: Model, shape: tuple[int, int, int], classes: list[str] | None) -> None:
        """Keep the weights of a model, and what has to be known of its images."""
        packages = {"ccl_fast": __version__, "python": platform.python_version()}
        packages |= {name: version(name) for name in ("torch", "torchvision", "safetensors")}
        description = {"objective": objective, "shape": list(shape), "transform": TRANSFORM}
        description |= {"classes": classes, "packages": packages}
        write_tensors(self._weights(objective), model.state_dict(), description)

    def model(self, objective: str, device: torch.device) -> KeptModel:
        """Read a model.

        Raises:
            ArgumentError: its file is damaged, or of another run.
        """
        path = self._weights(objective)
        weights, description, check_sum = read_tensors(path, "weights")
        try:
            shape, classes, packages = (description[name] for name in ("shape", "classes", "packages"))
            if description["transform"] != TRANSFORM:
                raise ValueError(f"images are transformed in another way: {description['transform']}")
            channels, height, width = shape
            model = Model(
                self.config.backbone,
                (channels, height, width),
                self.config.embedding_dim,
                stem=self.config.stem,
                pretrained=self.config.pretrained,
                load=False,
            )
            model.load_state_dict(weights)
        except Exception as error:  # whatever weights of another network make torch say
            raise ArgumentError(f"run: expected weights of this run, got {path} ({first_line(error)})") from error
        if self.config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return KeptModel(model.to(device).eval(), (channels, height, width), classes, packages, check_sum)

    def write_detectors(self, objective: str, fitted: FittedDetectors, check_sum: str) -> None:
        """Keep the fitted detectors of the model whose file has that check sum."""
        tensors, description = fitted.state()
        write_tensors(self._detectors(objective), tensors, {**description, "weights": check_sum}, equal_once=True)

    def detectors(self, objective: str, check_sum: str) -> FittedDetectors:
        """Read the fitted detectors of the model whose file has that check sum.

        Raises:
            ArgumentError: they are damaged, or not there.
        """
        path = self._detectors(objective)
        advice = f"`ccl-fast evaluate --run {self.folder}` fits them"
        if not path.exists():
            raise ArgumentError(
                f"run: expected fitted detectors, got {str(self.folder)!r} without {path.name}; {advice}"
            )
        tensors, description, _ = read_tensors(path, "fitted detectors")
        try:
            if description["weights"] != check_sum:
                raise ValueError(f"fitted to another model; {advice}")
            return FittedDetectors.of_state(tensors, description)
        except Exception as error:  # whatever tensors of other detectors make a constructor say
            raise ArgumentError(
                f"run: expected fitted detectors of this run, got {path} ({first_line(error)})"
            ) from error

    def _weights(self, objective: str) -> Path:
        return self.folder / WEIGHTS.format(objective)

    def _detectors(self, objective: str) -> Path:
        return self.folder / DETECTORS.format(objective)


def read_arguments(path: Path) -> Config:
    """Read the arguments of a run.

    Raises:
        ArgumentError: that is no file of them, or one of another version.
    """
    try:
        arguments = read_yaml(path.read_text())
    except ValueError as error:
        got = f"something else ({first_line(error)})"
        raise ArgumentError(f"run: expected the arguments of a run in {path}, got {got}") from error
    if not isinstance(arguments, dict) or arguments.keys() != FIELDS.keys():
        names = arguments.keys() if isinstance(arguments, dict) else set()
        missing, unknown = (
            ", ".join(sorted(map(str, those))) for those in (FIELDS.keys() - names, names - FIELDS.keys())
        )
        wrong = " and ".join([f"without {missing}"] * bool(missing) + [f"with {unknown}"] * bool(unknown))
        raise ArgumentError(f"run: expected the arguments of a run in {path}, got a file {wrong}")
    return Config(**arguments)

"""A finished run, opened again: its arguments, its images and its models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ccl_fast.commands.plain_yaml import read_yaml
from ccl_fast.commands.run_folder import CONFIG
from ccl_fast.errors import ArgumentError, first_line
from ccl_fast.models import Model
from ccl_fast.training.checkpoint import check_finite, read_tensors
from ccl_fast.training.config import FIELDS, Config, as_list
from ccl_fast.training.objectives import OBJECTIVES, ObjectiveName


class TrainedRun:
    """A finished run, from the folder that ``train`` wrote.

    Args:
        folder: that folder.
        replaced: arguments of ``train`` to use instead of the run's own: other OOD sets, another place of the data, and
            what no file can keep (a module, a Dataset). None leaves the run's own.

    Raises:
        ArgumentError: that is no finished run, or it was trained with a module or Dataset that ``replaced`` lacks.
    """

    def __init__(self, folder: str | Path, **replaced):
        self.folder = Path(folder)
        if not (self.folder / CONFIG).exists():
            raise ArgumentError(f"run: expected the folder of a run (with config.yaml), got {str(folder)!r}")
        given = {name: value for name, value in replaced.items() if value is not None}
        self.config = replace(_read(self.folder / CONFIG), **given)
        for name in ("backbone", "data"):
            kept = getattr(self.config, name)
            if any(isinstance(value, str) and value.startswith("<") for value in as_list(kept)):
                raise ArgumentError(
                    f"{name}: expected the one that the run was trained with, as no file can keep {kept}"
                )
        self.objectives: list[ObjectiveName] = [
            objective for objective in OBJECTIVES if (self.folder / f"{objective}.pt").exists()
        ]
        if not self.objectives:
            raise ArgumentError(
                f"run: expected a finished run (with <objective>.pt), got {str(folder)!r}; "
                "the same training command with resume goes on with it"
            )

    def model(self, objective: str, shape: tuple[int, int, int], device: torch.device) -> Model:
        """Return the model of an objective, in evaluation mode."""
        model = Model(
            self.config.backbone,
            shape,
            self.config.embedding_dim,
            stem=self.config.stem,
            pretrained=self.config.pretrained,
            load=False,
        )
        path = self.folder / f"{objective}.pt"
        try:
            weights = read_tensors(path)
            check_finite(weights)
            model.load_state_dict(weights)
        except Exception as error:  # whatever a damaged or foreign file makes torch say
            raise ArgumentError(f"run: expected weights of this run, got {path} ({first_line(error)})") from error
        return model.to(device).eval()


def _read(path: Path) -> Config:
    """Read the configuration of a run."""
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

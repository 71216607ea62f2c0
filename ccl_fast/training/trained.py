"""A finished run, opened again: its arguments, its images and its models."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from torch import nn

from ccl_fast.errors import ArgumentError
from ccl_fast.models import Model
from ccl_fast.training.arguments import as_list
from ccl_fast.training.experiment import train
from ccl_fast.training.objectives import OBJECTIVES
from ccl_fast.training.run_folder import CONFIG


class TrainedRun:
    """The folder that ``train`` wrote.

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
        arguments = _read(self.folder / CONFIG)
        arguments |= {name: value for name, value in replaced.items() if value is not None}
        for name in ("backbone", "data"):
            if any(isinstance(value, str) and value.startswith("<") for value in as_list(arguments[name])):
                raise ArgumentError(
                    f"{name}: expected the one that the run was trained with, as no file can keep {arguments[name]}"
                )
        self.options = SimpleNamespace(**arguments | {"clusters": as_list(arguments["clusters"])})
        self.objectives = [objective for objective in OBJECTIVES if (self.folder / f"{objective}.pt").exists()]
        if not self.objectives:
            raise ArgumentError(
                f"run: expected a finished run (with <objective>.pt), got {str(folder)!r}; "
                "the same training command with resume goes on with it"
            )

    def model(self, objective: str, shape: tuple[int, int, int], device: torch.device) -> nn.Module:
        """In evaluation mode."""
        model = Model(self.options.backbone, shape, self.options.embedding_dim, stem=self.options.stem)
        path = self.folder / f"{objective}.pt"
        try:
            model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        except Exception as error:  # whatever a damaged file makes torch say
            raise ArgumentError(
                f"run: expected weights of this run, got {path} ({str(error).splitlines()[0]})"
            ) from error
        return model.to(device).eval()


def _read(config: Path) -> dict:
    """The arguments of a run."""
    newer = {"timeout", "objective", "baseline", "warmup_from", "probe_every"}  # older runs have none
    names = inspect.signature(train).parameters.keys() - newer
    try:
        arguments = yaml.safe_load(config.read_text())
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(
            f"run: expected the arguments of a run in {config}, got something else ({reason})"
        ) from error
    if not isinstance(arguments, dict) or not names <= arguments.keys():
        missing = sorted(names - arguments.keys()) if isinstance(arguments, dict) else "any"
        raise ArgumentError(f"run: expected the arguments of a run in {config}, got a file without {missing}")
    return arguments

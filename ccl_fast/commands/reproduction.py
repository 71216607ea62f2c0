"""What a run's arguments came to, and the command line that gives them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping

import torch

from ccl_fast.commands.image_sets import ImageSets
from ccl_fast.data import Views
from ccl_fast.training.config import FIELDS, Config, as_list

# Of one call alone: the same command is to run in a fresh folder.
OF_A_CALL = ("output", "overwrite", "resume", "resume_from")


def resolved(arguments: Mapping, sets: ImageSets, device: torch.device) -> dict:
    """Return arguments of ``train``, as a file keeps them, with what was used in place of "auto" and of no value."""
    used = Config(**arguments).resolved().plain()
    shape = sets.train.shape
    return (
        used
        | {
            "clusters": arguments["clusters"],  # not as a list, where it is one number
            "near_ood": list(sets.near),
            "far_ood": list(sets.far),
            "image_size": shape[1] if shape[1] == shape[2] else list(shape[1:]),
            "augmentation": Views(used["augmentation"], shape).recipe,
            "device": str(device),
        }
    )


def command_line(arguments: Mapping) -> str | None:
    """Return ``ccl-fast train ...`` with the arguments that are not defaults; None where no command line can give them.

    Args:
        arguments: of ``train``, as a file keeps them.
    """
    parts = ["ccl-fast", "train"]
    defaults = Config().plain()
    for name, value in arguments.items():
        if name in OF_A_CALL or name not in FIELDS or value == defaults[name]:
            continue
        if isinstance(value, Mapping) or any(str(part).startswith("<") for part in as_list(value)):
            return None  # objects, of which there are only names here
        option = name.replace("_", "-")
        if isinstance(value, bool):
            parts.append(f"--{option}" if value else f"--no-{option}")
        else:
            parts += [f"--{option}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
    return shlex.join(parts)

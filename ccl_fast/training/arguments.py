"""Checks of the arguments of ``train``: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math

import torch

from ccl_fast.training.data import N_CLASSES

# What may differ when a run is resumed: where its files are, and where it is computed.
FREE_ARGUMENTS = ("output", "overwrite", "resume", "resume_from", "device")


class ArgumentError(ValueError):
    """A wrong argument of ``train``: its name, what was expected and what came."""


def comparable(arguments: dict) -> dict:
    """The arguments that a resumed run must share, as a file keeps them."""
    kept = {name: value for name, value in arguments.items() if name not in FREE_ARGUMENTS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in kept.items()}


def check(arguments: dict) -> None:
    """Everything that can be told before the data is read."""

    def expect(condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ArgumentError(f"{name}: expected {expected}, got {arguments[name]!r}")

    for name in ("epochs", "clusters"):
        expect(is_int(arguments[name]) and arguments[name] >= 1, name, "a positive integer")
    for name in ("temperature", "learning_rate"):
        expect(0 < arguments[name] < math.inf, name, "a positive number")
    expect(0 <= arguments["center_weight"] < math.inf, "center_weight", "a number >= 0")
    expect(arguments["method"] in ("compare", "ccl", "simclr"), "method", '"compare", "ccl" or "simclr"')
    micro_batch = arguments["micro_batch"]
    expect(micro_batch is None or (is_int(micro_batch) and micro_batch >= 1), "micro_batch", "a positive integer")
    expect(arguments["precision"] in ("32-true", "bf16-mixed"), "precision", '"32-true" or "bf16-mixed"')
    expect(not (arguments["resume"] and arguments["overwrite"]), "overwrite", "False when resuming")
    expect(not arguments["resume"] or arguments["output"] is not None, "output", "the folder of the run to resume")
    expect(arguments["resume_from"] in ("last", "previous"), "resume_from", '"last" or "previous"')
    epochs, warmup = arguments["epochs"], arguments["warmup_epochs"]
    expect(is_int(warmup) and 0 <= warmup <= epochs, "warmup_epochs", f"0 to epochs={epochs}")
    expect(is_int(arguments["seed"]) and arguments["seed"] >= 0, "seed", "an integer >= 0")
    classes = list(arguments["in_classes"])
    expect(
        0 < len(classes) == len(set(classes)) < N_CLASSES and set(classes) <= set(range(N_CLASSES)),
        "in_classes",
        f"1 to {N_CLASSES - 1} different digits",
    )


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f'device: expected "auto" or a device of this machine, got {name!r} ({reason})') from error

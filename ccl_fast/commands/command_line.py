"""The ``ccl-fast`` command. Its options are the arguments of the functions of `ccl_fast.commands`."""

from __future__ import annotations

import functools
import inspect
import operator
import os
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from jsonargparse import ActionYesNo, ArgumentParser, get_loader, set_loader
from torch import nn
from torch.utils.data import Dataset

from ccl_fast.commands.compare_objectives import SET_BY_COMPARE, compare
from ccl_fast.commands.embed_images import embed
from ccl_fast.commands.evaluate_run import evaluate
from ccl_fast.commands.export_model import export
from ccl_fast.commands.output import lasting_output
from ccl_fast.commands.plain_yaml import without_aliases
from ccl_fast.commands.score_images import score
from ccl_fast.commands.train_models import train
from ccl_fast.errors import ArgumentError, MissingPackages, PeerError, ReaderError
from ccl_fast.training.checkpoint import CheckpointError
from ccl_fast.training.interruption import Interrupted

COMMANDS = {
    "train": train,
    "compare": compare,
    "evaluate": evaluate,
    "score": score,
    "embed": embed,
    "export": export,
}
# What Python can give and a command line cannot.
PYTHON_ONLY = (Dataset, nn.Module)

_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: _load_yaml(without_aliases(text)), exceptions=(yaml.YAMLError,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ccl-fast <command> ...``.

    Returns:
        The exit code: 2 for wrong arguments and files, 1 if the loss diverges or another process is lost, 128 + signal
        if stopped by one.
    """
    with lasting_output():
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> int:
    parser = ArgumentParser(prog="ccl-fast", description="Cluster-aware contrastive learning.")
    subcommands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        subcommands.add_subcommand(name, _parser(function), help=_summary(function))
    parsed = parser.parse_args([_with_underscores(argument) for argument in arguments])
    options = parsed[parsed.subcommand].as_dict()
    del options["config"]
    try:
        for name, value in options.items():
            _check_text(name, value)
        COMMANDS[parsed.subcommand](**options)
    except KeyboardInterrupt:
        print(f"ccl-fast {parsed.subcommand}: interrupted", file=sys.stderr)
        return 130
    except Interrupted as interrupted:
        if _speaks_for_all():
            print(f"ccl-fast {parsed.subcommand}: {interrupted}", file=sys.stderr)
        return interrupted.code
    except (
        ArgumentError,
        CheckpointError,
        OSError,
        FloatingPointError,
        PeerError,
        ReaderError,
        MissingPackages,
    ) as error:
        if _speaks_for_all() or isinstance(error, PeerError):
            print(f"ccl-fast {parsed.subcommand}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError | PeerError | ReaderError | MissingPackages) else 2
    return 0


def _check_text(name: str, value: object) -> None:
    """Check that no text has a NUL, with which no path can be used."""
    if isinstance(value, list):
        for item in value:
            _check_text(name, item)
    elif isinstance(value, str | Path) and "\0" in str(value):
        raise ArgumentError(f"{name}: expected text without NUL, got {value!r}")


def _speaks_for_all() -> bool:
    """Tell whether this is the first of several processes, which all end with the same error."""
    return os.environ.get("RANK", "0") == "0"


def _with_underscores(argument: str) -> str:
    """Return ``--batch-size=2`` as ``--batch_size=2``: both are accepted."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _parser(function: Callable) -> ArgumentParser:
    """Make a parser with an option for every argument; a truth value makes a flag, and --no_<flag>."""
    parser = ArgumentParser(description=_summary(function))
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below.")
    for name, parameter in _parameters(function).items():
        given: dict[str, Any] = {"help": _help(function, name)}
        if isinstance(parameter.default, bool):
            given["action"] = ActionYesNo(no_prefix="no_")
        else:
            given["type"] = _without_python_only(parameter.annotation)
        if parameter.default is parameter.empty:
            given["required"] = True
        else:
            given["default"] = parameter.default
        parser.add_argument(f"--{name}", **given)
    return parser


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """Return the parameters by name; where ``**options`` are those of ``train``, these too."""
    parameters = dict(inspect.signature(function, eval_str=True).parameters)
    if parameters.pop("options", None):
        of_train = {n: p for n, p in inspect.signature(train).parameters.items() if n not in SET_BY_COMPARE}
        parameters = of_train | parameters
    return parameters


def _without_python_only(annotation: object) -> object:
    """Return a type without the alternatives that a command line cannot give."""
    if not isinstance(annotation, types.UnionType):
        return annotation
    left = [one for one in typing.get_args(annotation) if not _is_python_only(one)]
    return functools.reduce(operator.or_, left)


def _is_python_only(annotation: object) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, PYTHON_ONLY):
        return True
    return any(_is_python_only(part) for part in typing.get_args(annotation))


def _help(function: Callable, name: str) -> str:
    """Return what a function's docstring, or that of ``train``, says of an argument."""
    for described in (function, train):
        for parameter in docstring_parser.parse(inspect.getdoc(described) or "").params:
            if parameter.arg_name == name and parameter.description:
                return parameter.description
    raise AssertionError(f"{name} is not documented")


def _summary(function: Callable) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())

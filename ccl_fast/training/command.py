"""The ``ccl-fast`` command. Its options are the arguments of the functions below."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentParser

from ccl_fast.errors import ArgumentError, PeerError
from ccl_fast.training.checkpoint import CheckpointError
from ccl_fast.training.comparison import SET_BY_COMPARE, compare
from ccl_fast.training.evaluate_run import evaluate
from ccl_fast.training.experiment import train
from ccl_fast.training.interruption import Interrupted
from ccl_fast.training.score_images import score

COMMANDS = {"train": train, "compare": compare, "evaluate": evaluate, "score": score}
# What Python can give and a command line cannot (modules, data sets) is left out of these.
TYPES = {"data": str, "backbone": str, "near_ood": list[str] | None, "far_ood": list[str] | None}


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says of an option that configurations of earlier versions have what has replaced it."""
        is_old = message.endswith("does not accept option 'method'")
        super().error(message + "; objective and baseline have replaced it" * is_old, ex)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ccl-fast <command> ...``.

    Returns:
        The exit code: 2 for wrong arguments and files, 1 if the loss diverges or another process is lost, 128 + signal
        if stopped by one.
    """
    parser = _Parser(prog="ccl-fast", description="Cluster-aware contrastive learning.")
    subcommands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        subcommands.add_subcommand(name, _parser(function), help=_summary(function))
    parsed = parser.parse_args([_with_underscores(a) for a in (sys.argv[1:] if arguments is None else arguments)])
    options = parsed[parsed.subcommand].as_dict()
    del options["config"]
    try:
        COMMANDS[parsed.subcommand](**options)
    except KeyboardInterrupt:
        print(f"ccl-fast {parsed.subcommand}: interrupted", file=sys.stderr)
        return 130
    except Interrupted as interrupted:
        if _speaks_for_all():
            print(f"ccl-fast {parsed.subcommand}: {interrupted}", file=sys.stderr)
        return interrupted.code
    except (ArgumentError, CheckpointError, OSError, FloatingPointError, PeerError) as error:
        if _speaks_for_all() or isinstance(error, PeerError):
            print(f"ccl-fast {parsed.subcommand}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError | PeerError) else 2
    return 0


def _speaks_for_all() -> bool:
    """Of several processes, which all end with the same error, the first."""
    return os.environ.get("RANK", "0") == "0"


def _with_underscores(argument: str) -> str:
    """``--batch-size=2`` as ``--batch_size=2``: both are accepted."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _parser(function: Callable) -> ArgumentParser:
    """One option per argument, its help from the docstring; a truth value makes a flag, and --no_<flag>."""
    parser = ArgumentParser(description=_summary(function))
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below.")
    parameters = _parameters(function)
    flags = {name for name, p in parameters.items() if isinstance(p.default, bool)}
    special = flags | (TYPES.keys() & parameters.keys())
    parser.add_function_arguments(function, as_group=False, skip=special)
    for name in parameters:
        help_text = _help(function, name)
        if name in flags:
            flag = ActionYesNo(no_prefix="no_")
            parser.add_argument(f"--{name}", action=flag, default=parameters[name].default, help=help_text)
        elif name in special:
            parser.add_argument(f"--{name}", type=TYPES[name], default=parameters[name].default, help=help_text)
    return parser


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """By name; where ``**options`` are those of ``train``, these too."""
    parameters = dict(inspect.signature(function).parameters)
    if parameters.pop("options", None):
        of_train = {n: p for n, p in inspect.signature(train).parameters.items() if n not in SET_BY_COMPARE}
        parameters = of_train | parameters
    return parameters


def _help(function: Callable, name: str) -> str:
    for described in (function, train):
        for parameter in docstring_parser.parse(inspect.getdoc(described)).params:
            if parameter.arg_name == name:
                return parameter.description
    raise AssertionError(f"{name} is not documented")


def _summary(function: Callable) -> str:
    return inspect.getdoc(function).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())

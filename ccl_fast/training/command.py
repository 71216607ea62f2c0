"""The ``ccl-fast`` command. Its options are the arguments of the functions below."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence

import docstring_parser
from jsonargparse import ArgumentParser

from ccl_fast.training.arguments import ArgumentError
from ccl_fast.training.checkpoint import CheckpointError
from ccl_fast.training.comparison import compare
from ccl_fast.training.experiment import train
from ccl_fast.training.interruption import Interrupted

COMMANDS = {"train": train, "compare": compare}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ccl-fast <command> ...``.

    Returns:
        The exit code: 2 for wrong arguments and files, 1 if the loss diverges, 128 + signal if stopped by one.
    """
    parser = ArgumentParser(prog="ccl-fast", description="Cluster-aware contrastive learning.")
    subcommands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        subcommands.add_subcommand(name, _parser(function), help=_summary(function))
    parsed = parser.parse_args(arguments)
    try:
        COMMANDS[parsed.subcommand](**parsed[parsed.subcommand].as_dict())
    except Interrupted as interrupted:
        print(f"ccl-fast {parsed.subcommand}: {interrupted}", file=sys.stderr)
        return interrupted.code
    except (ArgumentError, CheckpointError, OSError, FloatingPointError) as error:
        print(f"ccl-fast {parsed.subcommand}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    return 0


def _parser(function: Callable) -> ArgumentParser:
    """One option per argument, its help from the docstring; False by default makes a flag."""
    parser = ArgumentParser(description=_summary(function))
    flags = {name for name, p in inspect.signature(function).parameters.items() if p.default is False}
    parser.add_function_arguments(function, as_group=False, skip=flags)
    for parameter in docstring_parser.parse(inspect.getdoc(function)).params:
        if parameter.arg_name in flags:
            parser.add_argument(f"--{parameter.arg_name}", action="store_true", help=parameter.description)
    return parser


def _summary(function: Callable) -> str:
    return inspect.getdoc(function).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())

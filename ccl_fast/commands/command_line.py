"""The ``ccl-fast`` command. Its options are the arguments of the functions of `ccl_fast.commands`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ccl_fast import commands
from ccl_fast.commands.arguments import check_known, close, prepared, told
from ccl_fast.commands.options import make_parser, options_of
from ccl_fast.commands.output import lasting_output
from ccl_fast.errors import ArgumentError, PeerError, ReaderError
from ccl_fast.training.checkpoint import CheckpointError
from ccl_fast.training.config import Config
from ccl_fast.training.interruption import Interrupted
from ccl_fast.version import __version__


class Command(NamedTuple):
    """A command, a function of `ccl_fast.commands` that is imported when it runs: its help need not wait for that.

    Attributes:
        summary: a sentence on it.
        options: what has its options as arguments, if that is not the function; it is quick to import.
    """

    summary: str
    options: Callable | None = None


COMMANDS = {
    "train": Command(
        "Train on images without their labels, and tell images of other kinds from them.",
        Config,
    ),
    "compare": Command(
        "Train SimCLR and an objective on the same budget with several seeds, and tell what the objective gains.",
    ),
    "evaluate": Command("Evaluate a trained run on OOD sets: a table, evaluation.json and evaluation.html."),
    "score": Command(
        "Write an outlier score for every image of files and folders into a CSV or JSON file, most outlying first.",
    ),
    "embed": Command(
        "Write what a trained model makes of every image of files and folders: features, embedding, cluster, score.",
    ),
    "export": Command(
        "Write a trained model as one file that needs ccl_fast no more: torch.export's (.pt2) or ONNX (.onnx).",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``ccl-fast <command> ...``.

    Returns:
        The exit code: 2 for wrong arguments and files, 1 if the loss diverges or another process is lost, 128 + signal
        if stopped by one.
    """
    with lasting_output():
        return _run(sys.argv[1:] if arguments is None else arguments)


def _run(arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "--version"):
        told_on = sys.stdout if arguments else sys.stderr
        print(f"ccl-fast {__version__}" if name == "--version" else _overview(), file=told_on)
        return 0 if arguments else 2
    try:
        if name not in COMMANDS:
            hint = close(name, COMMANDS) or "ccl-fast --help says what they do"
            raise ArgumentError(f"expected a command, {', '.join(COMMANDS)}, got {name!r} ({hint})")
        options = _parsed(name, rest)
    except ArgumentError as error:
        if _speaks_for_all():
            print(f"ccl-fast{f' {name}' * (name in COMMANDS)}: error: {error}", file=sys.stderr)
        return 2
    return _call(name, options)


def _overview() -> str:
    """Return what the commands are."""
    parser = argparse.ArgumentParser("ccl-fast", description="Cluster-aware contrastive learning.", allow_abbrev=False)
    parser.add_argument("--version", action="version", help="print the version")
    overview = parser.add_subparsers(metavar="command", title="commands (ccl-fast train --help lists its options)")
    for name, command in COMMANDS.items():
        overview.add_parser(name, help=command.summary)
    return parser.format_help().rstrip()


def _parsed(name: str, arguments: Sequence[str]) -> dict:
    """Return the options of a command.

    Raises:
        ArgumentError: one is wrong.
    """
    command = COMMANDS[name]
    function = command.options or _function(name)
    options = options_of(function)
    parser = make_parser(name, command.summary, options, function)
    annotations = {option: given.annotation for option, given in options.items()}
    arguments = prepared(arguments, annotations)
    shown = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    check_known(arguments, shown, name)
    try:
        parsed = parser.parse_args(arguments).as_dict()
        if parsed.get("resume"):
            parsed = parser.parse_args(_resumed(name, parsed["output"], arguments)).as_dict()
    except argparse.ArgumentError as error:
        raise ArgumentError(told(error, annotations)) from error
    del parsed["config"]
    for option, value in parsed.items():
        _check_text(option, value)
    return parsed


def _resumed(name: str, output: str | Path | None, arguments: list[str]) -> list[str]:
    """Return the arguments after those of what is gone on with, which hold unless others are given."""
    from ccl_fast.commands.run_folder import RESUMED, resumed_folder  # here: no help needs it

    folder = resumed_folder(name, output)
    config = folder / RESUMED[name][1]
    return [*([f"--config={config}"] if config.exists() else []), *arguments, f"--output={folder}"]


def _function(name: str) -> Callable:
    return getattr(commands, name)


def _call(name: str, options: dict) -> int:
    """Run a command; return the exit code."""
    try:
        if _speaks_for_all():
            print(f"ccl-fast {__version__} {name}", flush=True)  # what comes next takes seconds to import
        _function(name)(**options)
    except KeyboardInterrupt as interrupt:
        go_on = [f"; to go on:\n  {note}" for note in getattr(interrupt, "__notes__", [])]
        print(f"ccl-fast {name}: interrupted{(go_on or [''])[-1]}", file=sys.stderr)
        return 130
    except Interrupted as interrupted:
        if _speaks_for_all():
            print(f"ccl-fast {name}: {interrupted}", file=sys.stderr)
        return interrupted.code
    except (ArgumentError, CheckpointError, OSError, FloatingPointError, PeerError, ReaderError) as error:
        if _speaks_for_all() or isinstance(error, PeerError):
            print(f"ccl-fast {name}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError | PeerError | ReaderError) else 2
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


if __name__ == "__main__":
    sys.exit(main())

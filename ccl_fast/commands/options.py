"""The options of a command: a parser made from the arguments of its function."""

from __future__ import annotations

import argparse
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Mapping
from inspect import Parameter
from typing import Any, get_args

import docstring_parser
import yaml
from jsonargparse import ActionYesNo, ArgumentParser, get_loader, set_loader
from torch import nn
from torch.utils.data import Dataset

from ccl_fast.commands.arguments import alternatives
from ccl_fast.commands.plain_yaml import without_aliases
from ccl_fast.training.config import FIELDS, GROUPS, Config

# What Python can give and a command line cannot.
PYTHON_ONLY = (Dataset, nn.Module)
# Arguments of ``train`` that are compare's to set.
SET_BY_COMPARE = ("seed", "baseline")

_load_yaml = get_loader("yaml")
set_loader("yaml", lambda text: _load_yaml(without_aliases(text)), exceptions=(yaml.YAMLError,))


class _Help(argparse.HelpFormatter):
    """Help without the ways to spell an option that nobody needs, and without Python's types."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)  # "coding-rate" stays whole

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if not name.endswith("+")]
        if action.nargs == 0:
            return ", ".join(names)
        return f"{', '.join(names)} {self._format_args(action, action.dest.upper())}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if any(name.endswith("+") for name in action.option_strings):
            return f"{default_metavar} ..."
        return super()._format_args(action, default_metavar)


def options_of(function: Callable) -> dict[str, Parameter]:
    """Return the arguments of a command by name; where ``**options`` are those of ``train``, as compare's, these."""
    parameters = dict(inspect.signature(function, eval_str=True).parameters)
    if parameters.pop("options", None):
        of_train = inspect.signature(Config).parameters.items()
        parameters = {name: given for name, given in of_train if name not in SET_BY_COMPARE} | parameters
    return {name: given.replace(annotation=_of_command_line(given.annotation)) for name, given in parameters.items()}


def make_parser(command: str, summary: str, options: Mapping[str, Parameter], function: Callable) -> ArgumentParser:
    """Make a parser with an option for every argument; a truth value makes a flag, and --no-<flag>.

    Args:
        command: its name.
        summary: a sentence on it.
        options: of `options_of`.
        function: its docstring says what its own arguments are.
    """
    parser = ArgumentParser(
        prog=f"ccl-fast {command}",
        usage=f"ccl-fast {command} [options]",
        description=summary,
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-config",
    )
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below.")
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    described = {one.arg_name: one.description for one in docstring_parser.parse(inspect.getdoc(function) or "").params}
    for name, option in options.items():
        place = groups[FIELDS[name].metadata["group"]] if name in FIELDS else parser
        text = described.get(name) or FIELDS[name].metadata["help"]
        place.add_argument(f"--{name.replace('_', '-')}", **_given(option, " ".join(text.split()).replace("``", "")))
    return parser


def _given(option: Parameter, text: str) -> dict[str, Any]:
    """Return what the parser is told of an option."""
    text = text.replace("%", "%%")
    if option.default is option.empty:
        return {"type": option.annotation, "required": True, "help": f"{text} Required."}
    if isinstance(option.default, bool):
        shown = f"{text} (default: {'yes' if option.default else 'no'})"
        return {"action": ActionYesNo(no_prefix="no-"), "default": option.default, "help": shown}
    default = option.default
    if default is not None and default != ():
        shown = " ".join(map(str, default)) if isinstance(default, tuple | list) else default
        text += f" (default: {shown})"
    return {"type": option.annotation, "default": default, "help": text}


def _of_command_line(annotation: Any) -> Any:
    """Return a type without the alternatives that a command line cannot give."""
    return functools.reduce(operator.or_, [one for one in alternatives(annotation) if not _is_python_only(one)])


def _is_python_only(annotation: object) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, PYTHON_ONLY):
        return True
    return any(_is_python_only(part) for part in get_args(annotation))

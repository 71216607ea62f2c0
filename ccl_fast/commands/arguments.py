"""What is typed, as the parser takes it: dashes, lists without brackets; and what is typed wrong, told in a line."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from argparse import ArgumentError as ParserError
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from ccl_fast.checks import shown
from ccl_fast.errors import ArgumentError

NUMBER = re.compile(r"-?(0|[1-9]\d*)")
# What the parser says of a value that has not the type of its option, or is none of the options in a file.
OF_KEY = re.compile(r'Parser key "(?P<name>\w+)":\s*(?P<reason>.*)', re.DOTALL)
UNKNOWN_IN_FILE = re.compile(r"Option '(?P<name>[^']*)' is not accepted")
VALUE = re.compile(r".*(?:Got value|Given value): (.*)", re.DOTALL)
# What people know from other trainers and would do harm here, and what does what they want.
ACCUMULATION = (
    "gradients that are added up contrast images with those of their small batch alone; "
    "--micro-batch has the loss of the whole batch in the memory of a small one"
)
INSTEAD: dict[str, str] = dict.fromkeys(
    ("accumulate", "accumulate-grad-batches", "gradient-accumulation-steps"), ACCUMULATION
)
# Objectives by names that they have elsewhere.
OTHER_NAMES = {
    "mcr2": "coding-rate",
    "pcl": "protonce",
    "nt-xent": "simclr",
    "ntxent": "simclr",
    "deepcluster": "deepcluster-v2",
}
WORDS: dict[Any, str] = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def prepared(arguments: Sequence[str], annotations: Mapping[str, Any]) -> list[str]:
    """Return the arguments with dashes in names, and with lists in brackets.

    Args:
        arguments: as they are typed.
        annotations: the types of options with a value, by name with underscores.

    Raises:
        ArgumentError: an option that there is not.
    """
    result = []
    for name, values in _by_option(arguments):
        option, equals, value = name.partition("=")
        option = dashed(option)
        annotation = annotations.get(option.removeprefix("--").replace("-", "_"))
        if not name.startswith("--") or not is_list(annotation) or not (equals or values):
            result += [option + equals + value if name.startswith("--") else name, *values]
        else:
            result.append(f"{option}={_bracketed([value] * bool(equals) + values, annotation)}")
    return result


def check_known(arguments: Sequence[str], known: Collection[str], command: str) -> None:
    """Check that all options are known, each by its whole name.

    Raises:
        ArgumentError: one is not; it says which were meant, if that can be told.
    """
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("--") and option not in known:
            hint = close(option, known) or f"ccl-fast {command} --help lists them"
            raise ArgumentError(f"{option}: expected an option of {command} ({hint})")


def close(word: str, known: Collection[str]) -> str:
    """Return a question about the names that a word is like or begins, or why there is none; empty: neither."""
    plain = word.lstrip("-").replace("_", "-").lower()
    if reason := INSTEAD.get(plain):
        return reason
    if (ours := OTHER_NAMES.get(plain)) in known:
        return f"did you mean {ours}?"
    begun = sorted(name for name in known if name.startswith(word)) if len(word) > len("--") else []
    meant = begun[:3] or difflib.get_close_matches(word, known)
    return f"did you mean {' or '.join(meant)}?" if meant else ""


def dashed(option: str) -> str:
    """Return ``--batch_size`` as ``--batch-size``: both are accepted."""
    return "--" + option[2:].replace("_", "-") if option.startswith("--") else option


def is_list(annotation: Any) -> bool:
    """Tell whether a type is that of a list, or of a list or something else."""
    return any(typing.get_origin(one) is Sequence for one in alternatives(annotation))


def alternatives(annotation: Any) -> tuple:
    """Return the types that a union allows, or the only one."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def told(error: ParserError, annotations: Mapping[str, Any]) -> str:
    """Return, in a line, what the parser says of a wrong argument: "name: expected X, got Y"."""
    text = str(error)
    if unknown := UNKNOWN_IN_FILE.search(text):
        hint = close(unknown["name"], annotations) or "--help lists them"
        return f"config: expected options alone, got {unknown['name']!r} ({hint})"
    of_key = OF_KEY.search(text)
    if (loose := text.removeprefix("unrecognized arguments: ")) != text:
        likely = "run" if "run" in annotations else "data"
        return f"{loose}: expected after the name of an option, as in --{likely} {loose}"
    if of_key is None:
        return " ".join(text.replace("the following arguments are required", "required").split())
    name, value = of_key["name"], VALUE.search(of_key["reason"])
    annotation = annotations.get(name)
    if annotation is None or value is None:
        return f"{name}: " + " ".join(of_key["reason"].split())
    got = value[1].strip()
    hint = close(got, [choice for one in alternatives(annotation) for choice in _choices(one)])
    return (
        f"{name}: expected {_expected(annotation)}, got {got if got.startswith('[') else shown(got)}"
        + f" ({hint})" * bool(hint)
    )


def _by_option(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Split the arguments into options, each with the values that follow it."""
    name, values = None, []
    for argument in arguments:
        if argument.startswith("-") and not NUMBER.fullmatch(argument):
            if name is not None:
                yield name, values
            name, values = argument, []
        elif name is None:
            yield argument, []
        else:
            values.append(argument)
    if name is not None:
        yield name, values


def _bracketed(values: Sequence[str], annotation: Any) -> str:
    """Return values as a list in brackets; a single one as it is if it has brackets, or need be no list."""
    others = [one for one in alternatives(annotation) if not is_list(one) and one is not types.NoneType]
    if len(values) == 1 and (values[0].startswith(("[", "{")) or values[0] == "null" or others):
        return values[0]
    of_list = next(typing.get_args(one)[0] for one in alternatives(annotation) if is_list(one))
    has_numbers = int in alternatives(of_list)
    texts = [one if has_numbers and NUMBER.fullmatch(one) else json.dumps(one, ensure_ascii=False) for one in values]
    return f"[{', '.join(texts)}]"


def _expected(annotation: Any) -> str:
    return " or ".join(dict.fromkeys(_word(one) for one in alternatives(annotation) if one is not types.NoneType))


def _word(annotation: Any) -> str:
    if typing.get_origin(annotation) is Sequence:
        return f"a list (of {_expected(typing.get_args(annotation)[0]).replace('an integer', 'integers')})"
    if choices := _choices(annotation):
        return ("one of " if len(choices) > 1 else "") + ", ".join(map(repr, choices))
    return WORDS.get(annotation, "a path")


def _choices(annotation: Any) -> tuple:
    return typing.get_args(annotation) if typing.get_origin(annotation) is Literal else ()

"""YAML of plain values, each written out: a file of some hundred bytes cannot unfold into gigabytes."""

from __future__ import annotations

import yaml

from ccl_fast.errors import first_line


def read_yaml(text: str) -> object:
    """Return the value of a YAML text.

    Raises:
        ValueError: it is no YAML, or has an alias; the message is one line.
    """
    try:
        return yaml.safe_load(without_aliases(text))
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from error


def without_aliases(text: str) -> str:
    """Return the text if it has no alias.

    Raises:
        yaml.YAMLError: it has one, or is no YAML.
    """
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"expected values that are written out, got the alias *{event.anchor}")
    return text

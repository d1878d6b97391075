"""YAML tables as recipes want them: 1e-4 is a number, and a name stands once.

PyYAML follows YAML 1.1, where 1e-4 without a point is a text, and takes the last of two equal names.
"""

from __future__ import annotations

import re
from importlib.resources.abc import Traversable
from typing import Any

import yaml

from medsr_cli.errors import ArgumentsError, mention, reason_of

LARGEST_BYTES = 1_000_000
"""No recipe is longer; a file given by mistake is not read into memory."""


class _Loader(yaml.SafeLoader):
    """Plain values only, no objects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _unique(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        msg = f"{twice[0]} stands there twice"
        raise yaml.constructor.ConstructorError(None, None, msg, node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique)


def read_table(file: Traversable) -> dict[str, Any]:
    """The table that a YAML file holds.

    Raises:
        ArgumentsError: the file cannot be read, is no YAML, or holds something else than a table of names.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(LARGEST_BYTES + 1)
        content = yaml.load(data, Loader=_Loader) if len(data) <= LARGEST_BYTES else None  # noqa: S506 - a SafeLoader
    except OSError as error:
        msg = f"The recipe {mention(file.name)} cannot be read: {reason_of(error)}."
        raise ArgumentsError(msg, "Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        msg = f"The recipe {mention(file.name)} is no YAML that can be read: {_reason(error)}."
        raise ArgumentsError(msg, "One field stands on each line, for example learning_rate: 1e-4.") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        msg = f"The recipe {mention(file.name)} holds no table of fields."
        raise ArgumentsError(msg, "One field stands on each line, for example learning_rate: 1e-4.")
    return content


def _reason(error: Exception) -> str:
    """The problem and its line, without what the file holds."""
    if isinstance(error, yaml.MarkedYAMLError):
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        return f"{error.problem}{line}"
    return type(error).__name__

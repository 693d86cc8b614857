"""What a caller may give where a list is expected, and errors that name arguments instead of options."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rexrag.errors import ConfigError
from rexrag.plugins import shown

T = TypeVar("T")


def one_or_several(given: str | Sequence[str]) -> list[str]:
    """A text stands for a list of one."""
    return [given] if isinstance(given, str) else list(given)


def listed(given: Sequence[T], name: str, what: str) -> list[T]:
    """The list. Raises ConfigError where it is a text, or no list at all."""
    if isinstance(given, str | bytes) or not hasattr(given, "__iter__"):
        raise ConfigError(f"{name}: expected a list of {what}, got {shown(given)}")
    return list(given)


@contextmanager
def naming_arguments(**options: str) -> Iterator[None]:
    """A ConfigError inside speaks of arguments: option without its dashes -> argument."""
    try:
        yield
    except ConfigError as error:
        text = re.sub(r"--([a-z]+)\b(?!-)", lambda m: options.get(m[1], m[0]), str(error))
        raise ConfigError(text) from None

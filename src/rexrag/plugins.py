"""Plug-ins by dotted name: `"my_package.module:name"`. Importing one runs its code."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from rexrag.errors import PluginError, RexragError


def is_dotted(name: str) -> bool:
    """Is this the name of a plug-in, not of something built in?"""
    return ":" in name


_GIVEN: dict[str, Any] = {}
"""What a caller of the Python API gave as an argument, under its dotted name."""


def give(thing: Any) -> str:
    """Make an object known in this process; returns the name that the configuration calls it by.

    A second object of the same dotted name gets a number, so that a name always means the same object.
    """
    name = dotted_name(thing)
    for number in range(2, 1_000_000):
        if _GIVEN.setdefault(name, thing) is thing:
            break
        name = f"{dotted_name(thing)}#{number}"
    return name


def is_given(name: str) -> bool:
    """Was this name given as an object in this process, so that nothing is imported for it?"""
    return name in _GIVEN


def dotted_name(thing: Any) -> str:
    """The name under which a function, class or object of a module could be found again."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}:{named.__qualname__}"


def load_plugin(name: str, key: str, parameters: int = 0, known: Collection[str] = ()) -> Any:
    """What a dotted name stands for. Raises PluginError with one line.

    key: the setting that names it. parameters: how many positional arguments it must take; 0 does not look.
    known: the built-in names beside it, for the message.
    """
    if name in _GIVEN:
        return _GIVEN[name]
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        close = difflib.get_close_matches(name, list(known), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"expected {', '.join([*known, 'module:name'])}"
        raise PluginError(f"{key} = '{name}': {hint}")
    if os.getcwd() not in sys.path:  # a user's own module lies beside the configuration
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        close_module = _nearest_module(missing) if f"{module_name}.".startswith(f"{missing}.") else ""
        hint = f"; did you mean '{close_module}{name[len(missing) :]}'?" if close_module else ""
        raise PluginError(f"{key} = '{name}': cannot be imported: {reason}{hint}") from None
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [n for n in dir(found) if n[0] != "_"], n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise PluginError(f"{key} = '{name}': {module_name} has no '{part}'{hint}")
        found = getattr(found, part)
    if parameters:
        require_parameters(found, parameters, f"{key} = '{name}'")
    return found


def _nearest_module(missing: str) -> str:
    """The module or package in the working directory whose name is closest; empty where none is close."""
    *packages, last = missing.split(".")
    folder = Path.cwd().joinpath(*packages)
    files = [file.stem for file in folder.glob("*.py")] + [
        file.parent.name for file in folder.glob("*/__init__.py")
    ]
    close = difflib.get_close_matches(last, files, n=1, cutoff=0.7)
    return ".".join([*packages, *close]) if close else ""


def calling(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a plug-in's function returns. Its errors become a PluginError of one line that begins with `name`.

    A RexragError passes: it is one line already.
    """
    try:
        return function(*arguments)
    except RexragError:
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        kind = type(error).__name__
        raise PluginError(f"{name}: {kind}: {first}" if first else f"{name}: {kind}") from error


def shown(value: Any) -> str:
    """What a plug-in returned, short and on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def require_parameters(function: Any, count: int, what: str) -> None:
    """Can it be called with `count` positional arguments? Raises PluginError."""
    if not callable(function):
        raise PluginError(f"{what}: is a {type(function).__name__}, expected a function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in without a signature
        return
    try:
        signature.bind(*range(count))
    except TypeError:
        raise PluginError(f"{what}: takes {signature}, expected {count} positional arguments") from None

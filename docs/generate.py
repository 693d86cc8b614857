"""Write the pages of docs/reference from the code that they describe.

python docs/generate.py            a test fails where a page is not what this writes
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

import rexrag
from rexrag.cli import app
from rexrag.config import presets, reference
from rexrag.verl.mapping import TABLE, settings

FOLDER = Path(__file__).resolve().parent / "reference"
WIDTH = 100
"""Columns of a help text."""


def cli() -> str:
    """Every command with its help."""
    parts = ["# Command line", "What `rexrag COMMAND --help` prints."]
    for name, text in helps(typer.main.get_command(app), "rexrag"):
        parts += [f"## {name}", f"```text\n{text.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def helps(command: Any, name: str) -> Iterator[tuple[str, str]]:
    """(full name, help text) of a command and those below it."""
    context = command.make_context(
        name, ["x"] if hasattr(command, "commands") else [], resilient_parsing=True
    )
    context.terminal_width = context.max_content_width = WIDTH
    yield name, command.get_help(context)
    for below, inner in sorted(getattr(command, "commands", {}).items()):
        yield from helps(inner, f"{name} {below}")


def verl() -> str:
    """Which of our settings decides each of verl's keys, with the values of one shipped configuration."""
    shipped = "qwen2.5-3b-nq-hotpot"
    values = settings(presets.resolve(shipped))
    parts = [
        "# verl's keys",
        'Which setting decides each key of verl\'s configuration where `engine = "verl"`, and its value for '
        f"`{shipped}`. `[verl.overrides]` sets any key and wins.",
    ]
    lines = ["| verl | here | value |", "|---|---|---|"]
    for entry in TABLE:
        ours = f"`{entry.ours}`" if entry.ours else "fixed"
        lines.append(f"| `{entry.key.lstrip('+')}` | {ours} | `{json.dumps(values[entry.key])}` |")
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


def api() -> str:
    """Every public name with its signature and docstring."""
    parts = ["# Python API", "`import rexrag`. Names are loaded when they are first used."]
    for name in rexrag.__all__:
        if name.startswith("__"):
            continue
        thing = getattr(rexrag, name)
        parts += [f"## {name}", f"```python\n{_signature(name, thing)}\n```", _text(thing)]
        for member, inner in vars(thing).items() if inspect.isclass(thing) else ():
            if member.startswith("_") or not (callable(inner) or isinstance(inner, property)):
                continue
            call = member if isinstance(inner, property) else _signature(member, inner)
            parts += [f"### {name}.{member}", f"```python\n{call}\n```", _text(inner)]
    return "\n\n".join(part for part in parts if part) + "\n"


class _Plain:
    """An annotation that is printed as it stands in the source, without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(name: str, thing: Any) -> str:
    if isinstance(thing, classmethod | staticmethod):
        thing = thing.__func__
    if hasattr(thing, "model_fields"):
        return f"{name}({', '.join(f'{field}=…' for field in thing.model_fields)})"
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    parameters = [p.replace(annotation=_plain(p.annotation)) for p in found.parameters.values()]
    return f"{name}{found.replace(parameters=parameters, return_annotation=_plain(found.return_annotation))}"


def _plain(annotation: Any) -> Any:
    return _Plain(annotation) if isinstance(annotation, str) else annotation


def _text(thing: Any) -> str:
    """A docstring, its examples as code. A docstring that a class got from dataclass is no text."""
    text = inspect.getdoc(thing) or ""
    if inspect.isclass(thing) and text.startswith(f"{thing.__name__}("):
        return ""
    lines, code = [], False
    for line in text.splitlines():
        if line.startswith(">>> ") and not code:
            lines.append("```python")
        elif code and not line.startswith((">>> ", "... ")):
            lines.append("```")
        code = line.startswith((">>> ", "... ")) or (code and line.strip() != "" and lines[-1] != "```")
        lines.append(line.split("  # doctest")[0].rstrip())
    return "\n".join([*lines, "```"] if code else lines)


PAGES: dict[str, Callable[[], str]] = {
    "api.md": api, "cli.md": cli, "config.md": reference.markdown, "verl.md": verl,
}  # fmt: skip


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Write the pages of docs/reference from the code that they describe.

    python docs/generate.py            a test fails where a page is not what this writes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from rexrag.cli import app
from rexrag.config import presets
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
    context = command.make_context(name, ["x"] if hasattr(command, "commands") else [], resilient_parsing=True)
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


PAGES: dict[str, Callable[[], str]] = {"cli.md": cli, "verl.md": verl}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

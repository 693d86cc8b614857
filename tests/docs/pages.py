"""What the docs say: pages, fenced blocks, commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HAND_WRITTEN = sorted(
    [
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs" / "guides").glob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    ]
)
"""Every page that a person writes, but for the log and the changelog."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> Iterator[str]:
    """The fenced blocks of one language in a page; "" are commands and screens."""
    for found in FENCE.finditer(page.read_text(encoding="utf-8")):
        if found.group(1) == language:
            yield found.group(2)


def commands(page: Path) -> Iterator[str]:
    """The commands of a page, one a line, comments and continuations resolved."""
    for block in blocks(page, ""):
        for line in block.replace("\\\n", " ").splitlines():
            text = " ".join(line.split(" #")[0].split())
            if text and not text.startswith("#") and is_command(text):
                yield text


def is_command(text: str) -> bool:
    """Not a screen, a tree or a picture: it begins with a program that our pages use."""
    program = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", text).split()[0]
    return program in {"rexrag", "python", "make", "pip", "curl", "ray", "cp", "cd", "git", "pytest", "."}

"""Every path, module, function and link that a page names exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from rexrag.config.schema import Config
from tests.docs.pages import HAND_WRITTEN, ROOT

LOG = ROOT / "experiments" / "LOG.md"
PAGES = [*HAND_WRITTEN, LOG]
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACES = (ROOT, ROOT / "src" / "rexrag", ROOT / "tests", ROOT / "src")
"""Where a path of a page may begin."""
FOLDERS = ("src", "tests", "benchmarks", "docs", "configs", "experiments", "examples")
PATH = re.compile(r"[\w./-]+\.(py|toml|jsonl|md)|(?:" + "|".join(FOLDERS) + r")/[\w./-]*")
LAYERS = ("method", "training", "theory", "engine", "evaluation", "experiments", "stats")
OF_THE_READER = re.compile(r"^(runs|models|indexes|data)/|FOLDER|OUT/|CONFIG|<|\{|\*")
"""Paths that the reader makes."""


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{target}: no such heading"


def anchors(page: Path) -> set[str]:
    """The ids that GitHub gives the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_exist(page):
    for text in CODE.findall(page.read_text(encoding="utf-8")):
        path, _, test = text.partition("::")
        if not PATH.fullmatch(path):
            continue
        if OF_THE_READER.search(path) or "/" not in path:
            continue
        found = next((p / path for p in PLACES if (p / path).exists()), None)
        assert found is not None, f"{text}: there is no {path}"
        if test and found is not None:
            assert f"def {test}(" in found.read_text(encoding="utf-8"), f"{text}: no such test"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_dotted_names_exist(page):
    for text in CODE.findall(page.read_text(encoding="utf-8")):
        name = text.removeprefix("rexrag.").split("(")[0]
        if re.fullmatch(r"[a-z_]+(\.\w+)+", name) and name.split(".")[0] in LAYERS and "/" not in text:
            assert resolves(f"rexrag.{name}"), text


def resolves(dotted: str) -> bool:
    """A module, or what hangs on one."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_settings_exist(page):
    sections = set(Config.model_fields)
    for text in CODE.findall(page.read_text(encoding="utf-8")):
        found = re.fullmatch(r"([a-z]+)\.([a-z_]+)(?: = .+)?", text)
        if (
            not found
            or found.group(1) not in sections
            or found.group(2) in ("overrides", "md", "py", "toml", "jsonl", "parquet")
        ):
            continue
        section = Config.model_fields[found.group(1)].annotation
        fields = getattr(section, "model_fields", None)
        if fields is not None and not text.startswith("agent.cues"):
            assert found.group(2) in fields, text

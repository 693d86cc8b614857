"""Configurations shipped in the package: whole runs by name, and arms to lay over any run.

`configs/` at the root of the repository is a link to them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rexrag.config.files import deep_merge, parse_config, read_toml
from rexrag.config.schema import Config
from rexrag.errors import ConfigError

FOLDER = Path(str(files("rexrag.config"))) / "presets"
ABLATIONS = Path(str(files("rexrag"))) / "experiments" / "ablations"
QUICKSTART = "quickstart"
DEFAULT_ARM = "rex-rag-rescue"
"""What `rexrag train` without a configuration or an arm runs; docs/experiments.md says why."""


def resolve(config: str | Path | None, arm: str = "", overrides: Sequence[str] = ()) -> Config:
    """A configuration file (or the name of a shipped one), then an arm, then overrides; later ones win.

    Raises ConfigError with one line that names the file, key or override.
    """
    path = config_path(config or QUICKSTART)
    tree = read_toml(path)
    if arm:
        tree = deep_merge(tree, arm_overlay(arm))
    return parse_config(tree, overrides, where=str(config or QUICKSTART) + (f" + arm {arm}" if arm else ""))


def config_path(config: str | Path) -> Path:
    """A file, or a shipped configuration by name. Raises ConfigError naming the nearest."""
    shipped = FOLDER / f"{config}.toml"
    if Path(config).is_file() or not shipped.is_file():
        if not Path(config).is_file():
            known = sorted(path.stem for path in FOLDER.glob("*.toml"))
            raise ConfigError(f"{config}: no such config file{_nearest(str(config), known)}")
        return Path(config)
    return shipped


def arm_overlay(name: str) -> dict[str, Any]:
    """The changes an arm makes: a file of that path, or a shipped arm. Raises ConfigError."""
    path = Path(name)
    if path.suffix == ".toml":
        return {**read_toml(path), "arm": path.stem}
    shipped = ABLATIONS / f"{name}.toml"
    if not shipped.is_file():
        raise ConfigError(f"arm '{name}': there is no such arm{_nearest(name, arm_names())}")
    return {**read_toml(shipped), "arm": name}


def arm_names() -> list[str]:
    return sorted(path.stem for path in ABLATIONS.glob("*.toml"))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(Path(name).stem, known, n=1, cutoff=0.4)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"

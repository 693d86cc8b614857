"""Configurations shipped in the package: whole runs by name, and arms to lay over any run.

An arm is an algorithm, an ablation shipped in `rexrag/experiments/ablations`, or a TOML file of your own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rexrag.config.algorithms import ALGORITHMS, DEFAULT_ALGORITHM
from rexrag.config.files import nearest, parse_config, read_toml
from rexrag.config.schema import Config
from rexrag.config.upgrade import ARMS, NOT_TRAINED, lay_over, upgrade
from rexrag.errors import ConfigError
from rexrag.io import say_once

FOLDER = Path(str(files("rexrag.config"))) / "presets"
ABLATIONS = Path(str(files("rexrag"))) / "experiments" / "ablations"
QUICKSTART = "quickstart"


def resolve(config: str | Path | None, arm: str = "", overrides: Sequence[str] = ()) -> Config:
    """A configuration file (or the name of a shipped one), then an arm, then overrides; later ones win.

    A file that names no algorithm takes the default one, and says so. Raises ConfigError with one line that
    names the file, key or override.
    """
    where = str(config or QUICKSTART)
    raw = read_toml(config_path(config or QUICKSTART))
    over = _own_arm(arm) if arm.endswith(".toml") else {}
    if isinstance(raw.get("method"), dict) and isinstance(over.get("method"), dict):
        # Both of 0.1.0: switches of one table, which decide together which algorithm it is.
        raw["method"] |= over.pop("method")
    tree = upgrade(raw, where)
    if "algorithm" not in tree and tree.get("arm") and not arm:
        named = arm_overlay(str(tree["arm"]))
        tree = lay_over(named, {key: value for key, value in tree.items() if key != "arm"})
        say_once(f'{where}: arm = "{raw["arm"]}" is read as that algorithm or ablation')
    if arm:
        tree = lay_over(tree, upgrade(over, arm) if over else arm_overlay(arm))
    elif not (_names_algorithm(tree) or any(o.strip().startswith("algorithm.name") for o in overrides)):
        say_once(f"{where} names no algorithm: {DEFAULT_ALGORITHM} (--algorithm NAME chooses another)")
    return parse_config(tree, overrides, where=where + (f" + {arm}" if arm else ""))


def _own_arm(file: str) -> dict[str, Any]:
    """A user's arm as it is written, labelled by its file's name."""
    return {**read_toml(file), "arm": Path(file).stem}


def _names_algorithm(tree: Mapping[str, Any]) -> bool:
    table = tree.get("algorithm", {})
    return not isinstance(table, Mapping) or "name" in table


def config_path(config: str | Path) -> Path:
    """A file, or a shipped configuration by name. Raises ConfigError naming the nearest."""
    shipped = FOLDER / f"{config}.toml"
    if Path(config).is_file() or not shipped.is_file():
        if not Path(config).is_file():
            known = sorted(path.stem for path in FOLDER.glob("*.toml"))
            raise ConfigError(f"{config}: no such config file{nearest(Path(config).stem, known)}")
        return Path(config)
    return shipped


def arm_overlay(name: str) -> dict[str, Any]:
    """The changes that an arm makes; an old name is said to be one. Raises ConfigError."""
    if name in NOT_TRAINED:
        raise ConfigError(f"{name}: {NOT_TRAINED[name]}")
    if name in ARMS:
        say_once(f"{name} is now called {ARMS[name]}")
        name = ARMS[name]
    if name in ALGORITHMS:
        return {"algorithm": {"name": name}, "arm": ""}
    if name.endswith(".toml"):
        return upgrade(_own_arm(name), name)
    shipped = ABLATIONS / f"{name}.toml"
    if not shipped.is_file():
        raise ConfigError(
            f"algorithm '{name}': there is no such algorithm or ablation{nearest(name, arm_names())}"
        )
    return {**read_toml(shipped), "arm": name}


def arm_names() -> list[str]:
    """Algorithms first, then the shipped ablations."""
    return [*ALGORITHMS, *sorted(path.stem for path in ABLATIONS.glob("*.toml"))]

"""A configuration as TOML: read, changed by dotted overrides, checked, written.

An unknown key is refused and the nearest known one is named.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rexrag.config.algorithms import ALGORITHMS, DEFAULT_ALGORITHM
from rexrag.config.renamed import precision_key, read_precision
from rexrag.config.schema import OPEN_TABLE, Config
from rexrag.config.upgrade import lay_over, upgrade, upgrade_key
from rexrag.errors import ConfigError


def load_config(path: str | Path | None, overrides: Sequence[str] = (), strict: bool = True) -> Config:
    """Read a TOML file (None: all defaults) and apply `a.b=value` overrides in order.

    Not strict reads a run that is over: a setting that is gone is dropped. Raises ConfigError with one line
    that names the file or override, the key and what was expected.
    """
    tree = read_toml(path) if path is not None else {}
    return parse_config(tree, overrides, where=str(path or "defaults"), strict=strict)


def read_toml(path: str | Path) -> dict[str, Any]:
    """The table in a TOML file. Raises ConfigError."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None


def parse_config(
    tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config", strict: bool = True
) -> Config:
    """Validate a parsed tree of this version or of 0.1.0. Raises ConfigError."""
    try:
        plain = json.loads(json.dumps(tree))
    except TypeError as error:  # a date: TOML has them, no setting is one
        raise ConfigError(f"{where}: {error}; put it in quotes") from None
    merged = upgrade(plain, where, strict)
    read_precision(merged, where)
    # The name first: another algorithm drops what only the old one has, and must not drop an override.
    for override in sorted(overrides, key=lambda text: text.partition("=")[0].strip() != "algorithm.name"):
        merged = _apply(merged, override)
    if isinstance(merged.get("algorithm"), dict):
        merged["algorithm"].setdefault("name", DEFAULT_ALGORITHM)
    _refuse_unknown(merged, Config, where)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        if place[:1] == ["algorithm"] and place[1:2] and place[1] in ALGORITHMS:
            del place[1]  # pydantic names the member of the union
        key = ".".join(place)
        raise ConfigError(f"{where}: {key or 'config'} = {first['input']!r}: {first['msg']}") from None


def dump_toml(config: Config) -> str:
    """The resolved configuration as TOML; `parse_config` of it gives the same Config."""
    tree = config.model_dump(mode="json")
    tables = {key: value for key, value in tree.items() if isinstance(value, dict)}
    tables |= {f"verl.{OPEN_TABLE}": tables["verl"].pop(OPEN_TABLE)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in tree.items() if key not in tables]
    for section, values in tables.items():
        lines += ["", f"[{section}]"]
        lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    """Scalars and lists of them. TOML knows no surrogate pairs and no raw DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if key.isidentifier() and key.isascii() else _toml_value(key)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree; of `algorithm`, those of every algorithm."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        if name == "algorithm" and model is Config:
            leaves = {leaf for algorithm in ALGORITHMS.values() for leaf in algorithm.model_fields}
            yield from (f"algorithm.{leaf}" for leaf in sorted(leaves))
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error message: "; did you mean …?", or all known names where they are few."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if len(known) < 30 else ""


RENAMED_LEAVES = {"realignment": "correction", "tail": "suffix_weight", "dtype": "precision"}
"""Names of keys in 0.1.0 that do not look like today's."""


def _nearest_key(key: str) -> str:
    known = list(known_keys())
    leaf = RENAMED_LEAVES.get(key.rsplit(".", 1)[-1], key.rsplit(".", 1)[-1])
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    close = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _refuse_unknown(tree: Mapping[str, Any], model: type[BaseModel], where: str, prefix: str = "") -> None:
    for key, value in tree.items():
        if key not in model.model_fields:
            raise ConfigError(f"{where}: unknown key '{prefix}{key}'{_nearest_key(prefix + key)}")
        kind = model.model_fields[key].annotation
        is_algorithm = model is Config and key == "algorithm"
        if is_algorithm or (isinstance(kind, type) and issubclass(kind, BaseModel)):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: '{prefix}{key}' is a table, got {value!r}")
            if is_algorithm:
                _refuse_foreign(value, where)
            elif isinstance(kind, type) and issubclass(kind, BaseModel):
                _refuse_unknown(value, kind, where, f"{prefix}{key}.")


def _refuse_foreign(table: Mapping[str, Any], where: str) -> None:
    """An `[algorithm]` table with an unknown name, or with a key that this algorithm does not have."""
    name = table["name"]
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise ConfigError(f"{where}: algorithm.name = {name!r}: unknown{nearest(str(name), [*ALGORITHMS])}")
    known = ALGORITHMS[name].model_fields
    for key in table:
        if key not in known:
            having = [other for other, kind in ALGORITHMS.items() if key in kind.model_fields]
            whose = f"{', '.join(having)} has it" if having else f"unknown{nearest(key, list(known))}"
            raise ConfigError(f"{where}: algorithm '{name}' has no key '{key}': {whose.lstrip()}")


def _apply(tree: dict[str, Any], override: str) -> dict[str, Any]:
    key, eq, raw = override.partition("=")
    key = key.strip()
    if not eq or not key:
        raise ConfigError(f"--set {override}: expected key=value, for example algorithm.kl=0.001")
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    key, value = precision_key(*upgrade_key(key, value))
    if key.startswith(f"verl.{OPEN_TABLE}."):
        parents, leaf = ["verl", OPEN_TABLE], key.removeprefix(f"verl.{OPEN_TABLE}.")
    elif key in set(known_keys()):
        *parents, leaf = key.split(".")
    else:
        raise ConfigError(f"--set {override}: unknown key '{key}'{_nearest_key(key)}")
    over: dict[str, Any] = {leaf: value}
    for part in reversed(parents):
        over = {part: over}
    return lay_over(tree, over)

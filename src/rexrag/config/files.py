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

from rexrag.config.renamed import precision_key, read_precision
from rexrag.config.schema import OPEN_TABLE, Config
from rexrag.errors import ConfigError


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (None: all defaults) and apply `a.b=value` overrides in order.

    Raises ConfigError with one line that names the file or override, the key and what was expected.
    """
    return parse_config(read_toml(path) if path is not None else {}, overrides, where=str(path or "defaults"))


def read_toml(path: str | Path) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None


def parse_config(tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> Config:
    """Validate a parsed tree. Raises ConfigError."""
    try:
        merged = json.loads(json.dumps(tree))
    except TypeError as error:  # a date: TOML has them, no setting is one
        raise ConfigError(f"{where}: {error}; put it in quotes") from None
    read_precision(merged, where)
    _refuse_unknown(merged, Config, where)
    for override in overrides:
        _apply(merged, override)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {key or 'config'} = {first['input']!r}: {first['msg']}") from None


def deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`; tables merge, anything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = deep_merge(old, value)
        merged[key] = value
    return merged


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
    """Every dotted key of the tree."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _nearest(key: str) -> str:
    known = list(known_keys())
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    close = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def _refuse_unknown(tree: Mapping[str, Any], model: type[BaseModel], where: str, prefix: str = "") -> None:
    for key, value in tree.items():
        if key not in model.model_fields:
            raise ConfigError(f"{where}: unknown key '{prefix}{key}'{_nearest(prefix + key)}")
        kind = model.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: '{prefix}{key}' is a table, got {value!r}")
            _refuse_unknown(value, kind, where, f"{prefix}{key}.")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, eq, raw = override.partition("=")
    key = key.strip()
    if not eq or not key:
        raise ConfigError(f"--set {override}: expected key=value, for example method.kl=0.001")
    try:
        value = tomllib.loads(f"v = {raw.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    key, value = precision_key(key, value)
    if key.startswith(f"verl.{OPEN_TABLE}."):
        parents, leaf = ["verl", OPEN_TABLE], key.removeprefix(f"verl.{OPEN_TABLE}.")
    elif key in set(known_keys()):
        *parents, leaf = key.split(".")
    else:
        raise ConfigError(f"--set {override}: unknown key '{key}'{_nearest(key)}")
    for part in parents:
        tree = tree.setdefault(part, {})
    tree[leaf] = value

"""Settings of version 0.1.0, read as what they mean today; each new name is said once.

0.1.0 had one flat `[method]` table; its switches decide which algorithm of today they are. A switch that is
gone is refused where it was used, and dropped where it had its neutral value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rexrag.config.algorithms import ALGORITHMS, DEFAULT_ALGORITHM, Shared
from rexrag.errors import ConfigError
from rexrag.io import say_once

PATHS = {"embedded": "tiny-hard", "embedded-middle": "tiny-middle", "embedded-easy": "tiny-easy"}
"""Names of the shipped checkpoints, old -> new."""
ARMS = {
    "rex-rag-rescue": "rex-rag-distill",
    "rex-rag-rescue-paper": "rex-rag-distill-probes",
    "rex-rag-internalize": "rex-rag-context-distillation",
    "rex-rag-internalize-truncated": "rex-rag-context-distillation-is",
    "grpo-matched": "grpo-more-rollouts",
    "resample": "probe-without-cue",
    "probe-uncorrected": "probe-no-correction",
}
"""Names of arms, old -> new."""
NOT_TRAINED = {
    "rex-rag-trajectory": "multiple importance sampling is proven in rexrag.theory and cannot be trained"
}
"""Arms that are gone, and why."""

_OLD_DEFAULTS: dict[str, Any] = {
    "probe": True,
    "realignment": "paper",
    "tail": "one",
    "probe_probability": 0.2,
    "probe_target": 0.0,
    "probe_groups": "all",
    "filter": "cue-logp",
    "keep_ratio": 0.08,
    "keep_per_group": 0,
}
"""Of `[method]` in 0.1.0, where an algorithm of today has another default."""
_GONE: dict[str, tuple[Any, ...]] = {
    "keep": ("fixed",),
    "keep_floor": (),
    "keep_momentum": (),
    "probe_forced_turn": (False,),
    "tail_cap": (1.0,),
}
"""Switches of `[method]` that are gone -> their neutral values; none: neutral beside the others."""
_GONE_VALUES = {
    "aggregation": ("sequence-mean",),
    "filter": ("random",),
    "realignment": ("trajectory",),
}
_SUFFIX = {"one": "clipped", "truncated": "truncated-is", "unclipped": "unclipped"}
_CORRECTION = {"paper": "mixture", "none": "none"}
MOVED = {"cues": ("agent", "cues")}
"""Keys of `[method]` that are in another table now."""


def upgrade(tree: Mapping[str, Any], where: str, strict: bool = True) -> dict[str, Any]:
    """A parsed configuration of any version as one of this version. Not strict: what is gone is dropped.

    Not strict is for reading a run that is over. Raises ConfigError.
    """
    new = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    _rename_values(new, where, strict)
    if "method" in new:
        method = new.pop("method")
        if not isinstance(method, dict):
            raise ConfigError(f"{where}: 'method' is a table, got {method!r}")
        if "algorithm" in new:
            raise ConfigError(f"{where}: both [method] and [algorithm]; [method] is the old name, remove it")
        for key, (table, leaf) in MOVED.items():
            if key in method and isinstance(new.setdefault(table, {}), dict):
                new[table].setdefault(leaf, method.pop(key))
        new["algorithm"] = algorithm_of(method, where, strict)
        policy = new.setdefault("policy", {})
        if isinstance(policy, dict) and not {"precision", "dtype", "autocast"} & set(policy):
            policy["precision"] = "float32"  # what it was where nothing was said
        say_once(f'{where}: [method] is read as [algorithm] name = "{new["algorithm"]["name"]}"')
    algorithm = new.get("algorithm", {})
    if isinstance(algorithm, dict) and new.get("arm") == algorithm.get("name", DEFAULT_ALGORITHM):
        new["arm"] = ""  # the algorithm's own name is the label
    return new


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The new name of a value; a value that has none, of whatever type, stays."""
    return names.get(value, value) if isinstance(value, str) else value


def _rename_values(tree: dict[str, Any], where: str, strict: bool) -> None:
    """Values that have a new name; `tree` is changed."""
    policy, agent = tree.get("policy"), tree.get("agent")
    if isinstance(policy, dict) and "path" in policy:
        policy["path"] = _renamed_path(policy["path"], where)
    if isinstance(agent, dict) and agent.pop("format_reward", 0) not in (0, 0.0) and strict:
        raise ConfigError(f"{where}: agent.format_reward is gone; write a reward plug-in (agent.reward)")
    verl = tree.get("verl")
    if isinstance(verl, dict):
        for key in ("gpu_tflops", "gpu_bandwidth"):  # of an estimate of time that is gone
            verl.pop(key, None)
    if "arm" in tree:
        tree["arm"] = _renamed(tree["arm"], ARMS)


def _renamed_path(path: Any, where: str) -> Any:
    new = _renamed(path, PATHS)
    if new != path:
        say_once(f"{where}: policy.path '{path}' is now called '{new}'")
    return new


def algorithm_of(method: Mapping[str, Any], where: str, strict: bool = True) -> dict[str, Any]:
    """The `[algorithm]` table that a `[method]` table of 0.1.0 means. Raises ConfigError."""
    old = _without_gone(method, where, strict)
    known = _OLD_DEFAULTS | old
    realignment = known.pop("realignment")
    suffix, probe = _renamed(known.pop("tail"), _SUFFIX), known.pop("probe")
    if not probe:
        name = "grpo"
    elif realignment == "internalize":
        name = DEFAULT_ALGORITHM
        known["suffix_weight"] = suffix
    else:
        name = "rex-rag"
        known["correction"] = _renamed(realignment, _CORRECTION)
    fields = ALGORITHMS[name].model_fields
    anywhere = {field for kind in ALGORITHMS.values() for field in kind.model_fields}
    # A key that only another algorithm has was without effect; one that none has is a mistake.
    return {"name": name} | {k: v for k, v in known.items() if k in fields or k not in anywhere}


def _without_gone(method: Mapping[str, Any], where: str, strict: bool) -> dict[str, Any]:
    kept = {}
    adaptive = method.get("keep") == "adaptive"
    for key, value in method.items():
        neutral = _GONE.get(key)
        gone = neutral is not None or value in _GONE_VALUES.get(key, ())
        used = gone and value not in (neutral or ()) and not (neutral == () and not adaptive)
        if used and strict:
            raise ConfigError(f"{where}: method.{key} = {value!r} is gone, see CHANGELOG.md")
        if not gone:
            kept[key] = value
    kinds = kept.get("dead_ends")
    extra = [k for k in kinds if k not in ("wrong", "unanswered")] if isinstance(kinds, list) else []
    if extra and strict:
        raise ConfigError(f"{where}: method.dead_ends has {extra[0]!r}, which is gone: wrong, unanswered")
    if extra:
        kept["dead_ends"] = [k for k in kept["dead_ends"] if k not in extra] or ["wrong"]
    return kept


def upgrade_key(key: str, value: Any) -> tuple[str, Any]:
    """The dotted key and the value of today for an override of 0.1.0, as they are where nothing changed.

    Raises ConfigError for a switch that decides which algorithm runs.
    """
    table, _, leaf = key.partition(".")
    if key == "policy.path":
        return key, _renamed_path(value, f"--set {key}")
    if table != "method" or not leaf:
        return key, value
    if leaf in ("probe", "realignment"):
        raise ConfigError(
            f"--set {key}: which algorithm runs is --algorithm NAME now ({', '.join(ALGORITHMS)})"
        )
    if leaf in _GONE:
        raise ConfigError(f"--set {key}: this switch is gone, see CHANGELOG.md")
    if leaf == "tail":
        new, value = "algorithm.suffix_weight", _renamed(value, _SUFFIX)
    elif leaf in MOVED:
        new = ".".join(MOVED[leaf])
    else:
        new = f"algorithm.{leaf}"
    say_once(f"--set {key}: this key is now called {new}")
    return new, value


def lay_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, both of this version: tables merge, anything else replaces.

    Where `over` names another algorithm, of the old one those settings stay that all algorithms share and
    that differ from its own defaults.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            if key == "algorithm" and value.get("name", old.get("name")) != old.get("name"):
                old = _shared_changes(old)
            value = lay_over(old, value)
        merged[key] = value
    return merged


def _shared_changes(table: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an `[algorithm]` table that every algorithm has and that are not this one's defaults."""
    kind = ALGORITHMS.get(table.get("name", DEFAULT_ALGORITHM), Shared)
    shared = {k: v for k, v in table.items() if k in Shared.model_fields and k != "name"}
    return {k: v for k, v in shared.items() if v != kind.model_fields[k].default}

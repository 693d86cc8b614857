"""`policy.precision` instead of the older `policy.dtype` and `policy.autocast`.

The older keys are read and their new name is said once. In a file, `dtype` decides: it is the precision that
rollouts and evaluations of an older run had. `autocast` alone says how a run was trained.
"""

from __future__ import annotations

from typing import Any

from rexrag.errors import ConfigError
from rexrag.io import say_once

OLD_PRECISION = ("policy.dtype", "policy.autocast")


def read_precision(tree: dict[str, Any], where: str) -> None:
    """Replace the older keys of a configuration tree, in place. Raises ConfigError where both are there."""
    policy = tree.get("policy")
    if not isinstance(policy, dict):
        return
    old = {key: policy.pop(key.partition(".")[2]) for key in OLD_PRECISION if key.partition(".")[2] in policy}
    if not old:
        return
    if "precision" in policy:
        raise ConfigError(f"{where}: policy.precision and its older name {next(iter(old))}; remove the older")
    # The last one of these wins: dtype where it is given.
    for key in reversed(OLD_PRECISION):
        if key in old:
            _, policy["precision"] = precision_key(key, old[key], where)


def precision_key(key: str, value: Any, where: str = "--set") -> tuple[str, Any]:
    """The key and value of today for one of the older keys; any other as it is. Says the new name once."""
    if key not in OLD_PRECISION:
        return key, value
    if key == "policy.autocast":
        value = {True: "bfloat16", False: "float32"}.get(value, value)
    say_once(f'{where}: {key} is now called policy.precision ("auto", "float32" or "bfloat16")')
    return "policy.precision", value

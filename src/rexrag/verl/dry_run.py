"""`rexrag train CONFIG --dry-run`: what verl would get, and whether it fits."""

from __future__ import annotations

from typing import Any

from rexrag.config.schema import Config
from rexrag.engine.loading import EMBEDDED, resolve, settled
from rexrag.errors import ConfigError
from rexrag.verl import cost
from rexrag.verl.checks import check_installed, check_settings
from rexrag.verl.mapping import resolved, settings


def dry_run(config: Config) -> dict[str, Any]:
    """Facts for people and scripts. Starts nothing, writes nothing, needs no GPU and no verl.

    Where verl is installed its whole resolved tree is in `tree`, and a key that it lacks is an error.
    Raises ConfigError for settings that cannot be honoured and for what cannot fit, ModelError.
    """
    if config.engine != "verl":
        raise ConfigError(f"--dry-run: engine = '{config.engine}'; it is there for engine = 'verl'")
    config = settled(config)
    check_settings(config)
    path = resolve(config.policy.path) if config.policy.path in EMBEDDED else config.policy.path
    shape = cost.shape_of(path)
    memory = cost.check_memory(config, shape)
    tree: dict[str, Any] | None = None
    notes: list[str] = []
    try:
        check_installed()
    except ConfigError as missing:
        notes.append(f"not checked against verl's own configuration: {missing}")
    else:
        tree = resolved(config)
    return {
        "name": config.name,
        "model": config.policy.path,
        "parameters": shape.parameters,
        "gpus": config.verl.nodes * config.verl.gpus_per_node,
        "verl": settings(config),
        "tree": tree,
        "memory_gib": {
            "contexts": cost.CONTEXT / cost.GIB,
            "weights, gradients, moments": memory.state / cost.GIB,
            "gathered layers": memory.gathered / cost.GIB,
            "activations": memory.activations / cost.GIB,
            "logits": memory.logits / cost.GIB,
            "= while training": memory.training / cost.GIB,
            "rollout engine": memory.engine / cost.GIB,
            "training state beside it": memory.resident / cost.GIB,
            "= while sampling": memory.rollout / cost.GIB,
            "of": config.verl.gpu_memory,
        },
        "notes": notes,
    }

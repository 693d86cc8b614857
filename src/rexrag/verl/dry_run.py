"""`rexrag train CONFIG --dry-run`: what verl would get, whether it fits, and about how long a step takes."""

from __future__ import annotations

from typing import Any

from rexrag.config.schema import Config
from rexrag.engine.loading import EMBEDDED, resolve
from rexrag.errors import ConfigError
from rexrag.verl import cost
from rexrag.verl.checks import check_installed, check_settings
from rexrag.verl.mapping import resolved, settings

ASSUMPTIONS = (
    f"assumed: {cost.SEARCHES} searches and {cost.TURN_TOKENS} tokens a turn, {cost.FAILURES:.0%} dead ends, "
    f"{cost.TRAIN_MFU:.0%} of peak in passes, {cost.DECODE_BANDWIDTH:.0%} of bandwidth in decoding, "
    f"{cost.SEARCHES_PER_SECOND:.0f} searches a second (docs/scaling.md)"
)


def dry_run(config: Config) -> dict[str, Any]:
    """Facts for people and scripts. Starts nothing, writes nothing, needs no GPU and no verl.

    Where verl is installed its whole resolved tree is in `tree`, and a key that it lacks is an error.
    Raises ConfigError for settings that cannot be honoured and for what cannot fit, ModelError.
    """
    if config.engine != "verl":
        raise ConfigError(f"--dry-run: engine = '{config.engine}'; it is there for engine = 'verl'")
    check_settings(config)
    path = resolve(config.policy.path) if config.policy.path in EMBEDDED else config.policy.path
    shape = cost.shape_of(path)
    memory = cost.check_memory(config, shape)
    step = cost.step(config, shape)
    tree, notes = None, [ASSUMPTIONS]
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
        "step": {
            "base rollouts": step.rollouts,
            "probes": step.probes,
            "searches": step.searches,
            "tokens generated": step.generated_tokens,
            "tokens read": step.read_tokens,
            "tokens trained on": step.trained_tokens,
        },
        "seconds": {**step.seconds, "= step": step.total, "= run": step.total * config.train.steps},
        "notes": notes,
    }

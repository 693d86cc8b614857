"""What must hold before a process starts: one line for each failure, with what would mend it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from rexrag.config.schema import Config
from rexrag.errors import ConfigError

PINS = {"verl": "0.9.1", "TransferQueue": "0.1.11", "ray": "2.60.0", "tensordict": "0.10.0"}
"""Versions that ran together; verl's extension points move from one release to the next."""
INSTALL = 'pip install -e ".[verl]"'
MODEL = "actor_rollout_ref.model"
ATTENTION = f"{MODEL}.override_config.attn_implementation"


def check_installed() -> None:
    """verl and what it needs, in the versions that the adapter was made for."""
    for name, pinned in PINS.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            raise ConfigError(f"engine = 'verl' needs {name}, which is not installed: {INSTALL}") from None
        if found != pinned:
            raise ConfigError(f"{name} {found} is installed, this adapter was made for {pinned}: {INSTALL}")


def check_settings(config: Config) -> None:
    """Settings that verl's trainer cannot honour, and sizes that do not divide."""
    algorithm, train, verl = config.algorithm, config.train, config.verl
    if getattr(algorithm, "suffix_weight", "") == "truncated-is":
        raise ConfigError(
            "algorithm.suffix_weight = 'truncated-is' is not there for engine = 'verl': it would train rows "
            "against the density of other rows; use 'clipped' or 'unclipped', or engine = 'local'"
        )
    if algorithm.rollouts < 2:
        raise ConfigError(
            f"algorithm.rollouts = {algorithm.rollouts}: a group needs at least 2 for an advantage"
        )
    if config.policy.train_last_layers:
        raise ConfigError("policy.train_last_layers: verl trains all weights or a LoRA; set it to 0")
    if train.track:
        raise ConfigError("train.track: verl has loggers of its own; name them in verl.loggers")
    if train.control:
        raise ConfigError("train.control: engine = 'verl' trains one algorithm a run; set it to ''")
    if train.diagnose_every or config.data.fresh_questions:
        raise ConfigError(
            "train.diagnose_every and data.fresh_questions are not there for engine = 'verl'; set them to 0"
        )
    for name in ("max_generated", "max_tokens", "max_rollouts", "max_seconds"):
        if getattr(train, name):
            raise ConfigError(f"train.{name}: engine = 'verl' stops after train.steps; set it to 0")
    gpus = verl.nodes * verl.gpus_per_node
    rows, parts = train.questions * algorithm.rollouts, gpus * config.learner.minibatches
    if rows % parts:
        raise ConfigError(
            f"train.questions × algorithm.rollouts = {train.questions} × {algorithm.rollouts} = {rows} "
            f"rollouts do not divide by {gpus} GPUs × learner.minibatches = {parts}"
        )
    if gpus % verl.tensor_parallel or verl.gpus_per_node % verl.tensor_parallel:
        raise ConfigError(
            f"verl.tensor_parallel = {verl.tensor_parallel} does not divide "
            f"verl.gpus_per_node = {verl.gpus_per_node}"
        )
    if verl.prompt_tokens >= config.agent.total_tokens:
        raise ConfigError(
            f"verl.prompt_tokens = {verl.prompt_tokens} leaves nothing of "
            f"agent.total_tokens = {config.agent.total_tokens} for a response"
        )
    if verl.tokens_per_gpu < config.agent.total_tokens:
        raise ConfigError(
            f"verl.tokens_per_gpu = {verl.tokens_per_gpu} is less than agent.total_tokens = "
            f"{config.agent.total_tokens}: the longest row would fit no micro-batch"
        )


def check_devices(config: Config, found: int) -> None:
    """found: accelerators of this machine. Of several nodes only this one can be seen from here."""
    asked = config.verl.gpus_per_node
    if found < asked:
        raise ConfigError(f"verl.gpus_per_node = {asked}, but this machine has {found}")


def check_attention(config: Config, device: str) -> None:
    """verl's models run FlashAttention-2 on GPUs, which verl alone does not bring."""
    chosen = any(key.lstrip("+") == ATTENTION for key in config.verl.overrides)
    if device == "cuda" and not chosen and find_spec("flash_attn") is None:
        raise ConfigError(
            'flash-attn is not installed, and verl runs it: pip install "verl[fsdp]==0.9.1"; or set, in '
            f"verl.overrides, '+{ATTENTION}' = 'sdpa' and '{MODEL}.use_remove_padding' = false"
        )

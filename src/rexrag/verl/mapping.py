"""Our configuration → verl's Hydra tree: one table.

`TABLE` says which of our settings decides each of verl's keys, and how; `docs/reference/verl.md` shows it,
generated. `[verl.overrides]` comes after it and wins.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rexrag.config.files import dump_toml
from rexrag.config.schema import Config
from rexrag.engine.lora import SCALE as LORA_SCALE
from rexrag.engine.precision import settled
from rexrag.errors import ConfigError
from rexrag.verl.records import AGENT

Value = Any
PLUGIN, MODULES = "rexrag.verl.plugin", "VERL_USE_EXTERNAL_MODULES"
"""What verl imports in each of its processes, and the variable that says so."""

AGGREGATIONS = {"token-mean": "token-mean", "sequence-sum": "seq-mean-token-sum"}
ESTIMATORS = {("mean", "std"): "grpo", ("mean", "none"): "grpo", ("leave-one-out", "none"): "rloo"}
"""(`advantage_baseline`, `advantage_scale`) → verl's estimator."""
HELD_LOSS = "rexrag-held"
"""Name under which `loss.policy_loss` is registered."""
NO_DUAL_CLIP = 1e9
"""verl cuts the loss of a token with a negative advantage at this many times the advantage; ours does not."""


@dataclass(frozen=True, slots=True)
class Entry:
    """verl's key, our setting (for the documentation), and how one follows from the other."""

    key: str
    ours: str
    value: Callable[[Config], Value]


def _setting(name: str) -> Callable[[Config], Value]:
    def read(config: Config) -> Value:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        return list(value) if isinstance(value, tuple) else value

    return read


def _as_is(key: str, ours: str) -> Entry:
    return Entry(key, ours, _setting(ours))


def _from(key: str, ours: str, value: Callable[[Config], Value]) -> Entry:
    return Entry(key, ours, value)


def _fixed(key: str, value: Value) -> Entry:
    return Entry(key, "", lambda config: value)


ACTOR, REF, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.ref", "actor_rollout_ref.rollout"
MODEL = "actor_rollout_ref.model"

TABLE = (
    # what is trained
    _as_is(f"{MODEL}.path", "policy.path"),
    _as_is(f"{MODEL}.lora_rank", "policy.lora_rank"),
    _from(f"{MODEL}.lora_alpha", "policy.lora_rank", lambda c: int(LORA_SCALE * c.policy.lora_rank) or 16),
    _fixed(f"{MODEL}.trust_remote_code", False),
    _fixed(f"{ACTOR}.strategy", "fsdp2"),
    # A LoRA's too: verl keeps the adapters in the dtype of the weights below, and in bfloat16 most of the
    # updates of a small rate would round away.
    _fixed(f"{ACTOR}.fsdp_config.model_dtype", "fp32"),
    # What the passes run in.
    _from(f"+{ACTOR}.fsdp_config.mixed_precision.param_dtype", "policy.precision", lambda c: _passes(c)),
    _fixed(f"+{ACTOR}.fsdp_config.mixed_precision.reduce_dtype", "fp32"),
    _from(f"+{REF}.fsdp_config.mixed_precision.param_dtype", "policy.precision", lambda c: _passes(c)),
    _fixed(f"+{REF}.fsdp_config.mixed_precision.reduce_dtype", "fp32"),
    _as_is(f"{ACTOR}.fsdp_config.param_offload", "verl.offload"),
    _as_is(f"{ACTOR}.fsdp_config.optimizer_offload", "verl.offload"),
    _as_is(f"{REF}.fsdp_config.param_offload", "verl.offload"),
    _from(f"{ROLLOUT}.dtype", "policy.precision", lambda c: settled(c).policy.precision),
    # the step
    _as_is("data.train_batch_size", "train.questions"),
    _as_is(f"{ROLLOUT}.n", "algorithm.rollouts"),
    _as_is(f"{ROLLOUT}.temperature", "agent.temperature"),
    _as_is("trainer.total_training_steps", "train.steps"),
    _from("trainer.total_epochs", "train.steps", lambda c: c.train.steps),
    # `learner.minibatches` itself is obeyed by our trainer; this keeps verl's own checks content.
    _from(f"{ACTOR}.ppo_mini_batch_size", "train.questions", lambda c: c.train.questions),
    _fixed(f"{ACTOR}.ppo_epochs", 1),
    _fixed(f"{ACTOR}.shuffle", True),
    _as_is(f"{ACTOR}.data_loader_seed", "seed"),
    _as_is("data.seed", "seed"),
    _fixed("data.shuffle", True),
    # the loss
    _from("algorithm.adv_estimator", "algorithm.advantage_baseline", lambda c: _estimator(c)),
    _from(
        "algorithm.norm_adv_by_std_in_grpo",
        "algorithm.advantage_scale",
        lambda c: c.algorithm.advantage_scale == "std",
    ),
    _from(
        "algorithm.filter_groups.enable",
        "algorithm.dynamic_sampling",
        lambda c: c.algorithm.dynamic_sampling > 0,
    ),
    _fixed("algorithm.filter_groups.metric", "reward"),
    _fixed("algorithm.use_kl_in_reward", False),
    _fixed("algorithm.rollout_correction", None),
    _from(
        f"{ACTOR}.policy_loss.loss_mode",
        "algorithm.suffix_weight",
        lambda c: HELD_LOSS if getattr(c.algorithm, "suffix_weight", "") == "unclipped" else "vanilla",
    ),
    _as_is(f"{ACTOR}.clip_ratio_low", "algorithm.clip_low"),
    _as_is(f"{ACTOR}.clip_ratio_high", "algorithm.clip_high"),
    _fixed(f"{ACTOR}.clip_ratio_c", NO_DUAL_CLIP),
    _from(f"{ACTOR}.loss_agg_mode", "algorithm.aggregation", lambda c: AGGREGATIONS[c.algorithm.aggregation]),
    _from(f"{ACTOR}.use_kl_loss", "algorithm.kl", lambda c: c.algorithm.kl > 0),
    _as_is(f"{ACTOR}.kl_loss_coef", "algorithm.kl"),
    _fixed(f"{ACTOR}.kl_loss_type", "low_var_kl"),
    _fixed(f"{ACTOR}.entropy_coeff", 0),
    # the optimizer
    _as_is(f"{ACTOR}.optim.lr", "learner.lr"),
    _as_is(f"{ACTOR}.optim.lr_warmup_steps", "learner.warmup_steps"),
    _fixed(f"{ACTOR}.optim.lr_scheduler_type", "constant"),
    _as_is(f"{ACTOR}.optim.weight_decay", "learner.weight_decay"),
    _as_is(f"{ACTOR}.optim.betas", "learner.betas"),
    _as_is(f"{ACTOR}.optim.clip_grad", "learner.grad_clip"),
    _as_is(f"{ACTOR}.grad_clip", "learner.grad_clip"),
    # lengths and memory
    _as_is("data.max_prompt_length", "verl.prompt_tokens"),
    _from("data.max_response_length", "agent.total_tokens", lambda c: c.agent.total_tokens),
    # verl's SGLang server keeps one token of the window for itself.
    _from(
        f"{ROLLOUT}.max_model_len",
        "agent.total_tokens",
        lambda c: c.agent.total_tokens + (c.verl.rollout == "sglang"),
    ),
    _fixed(f"{ACTOR}.use_dynamic_bsz", True),
    _as_is(f"{ACTOR}.ppo_max_token_len_per_gpu", "verl.tokens_per_gpu"),
    _as_is(f"{ROLLOUT}.log_prob_max_token_len_per_gpu", "verl.tokens_per_gpu"),
    _as_is(f"{REF}.log_prob_max_token_len_per_gpu", "verl.tokens_per_gpu"),
    # Scoring reports an entropy; in one piece it would hold the vocabulary in float32 for every token.
    _fixed(f"{ACTOR}.entropy_from_logits_with_chunking", True),
    _fixed(f"{REF}.entropy_from_logits_with_chunking", True),
    # the rollout engine and the agents
    _as_is(f"{ROLLOUT}.name", "verl.rollout"),
    _as_is(f"{ROLLOUT}.tensor_model_parallel_size", "verl.tensor_parallel"),
    _as_is(f"{ROLLOUT}.gpu_memory_utilization", "verl.rollout_memory"),
    _fixed(f"{ROLLOUT}.calculate_log_probs", True),
    # SGLang finds the stop strings only with a tokenizer; vLLM always has one.
    _fixed(f"{ROLLOUT}.skip_tokenizer_init", False),
    _as_is(f"{ROLLOUT}.agent.num_workers", "verl.agent_workers"),
    _fixed(f"+{ROLLOUT}.agent.agent_loop_manager_class", "rexrag.verl.agent.RexragManager"),
    _fixed(f"{ROLLOUT}.val_kwargs.temperature", 0),
    _fixed(f"{ROLLOUT}.val_kwargs.n", 1),
    _fixed(f"{ROLLOUT}.val_kwargs.do_sample", False),
    # machines and the run
    _as_is("trainer.nnodes", "verl.nodes"),
    _as_is("trainer.n_gpus_per_node", "verl.gpus_per_node"),
    _fixed("trainer.v1.trainer_mode", AGENT),
    _fixed("trainer.use_v1", True),
    _fixed("trainer.project_name", AGENT),
    _as_is("trainer.experiment_name", "name"),
    _as_is("trainer.logger", "verl.loggers"),
    _as_is("trainer.save_freq", "train.save_every"),
    _as_is("trainer.max_actor_ckpt_to_keep", "train.keep_checkpoints"),
    _from("trainer.test_freq", "train.evals", lambda c: evaluation_every(c)),
    _from("trainer.val_before_train", "train.evals", lambda c: evaluation_every(c) > 0),
    _fixed(f"{ACTOR}.checkpoint.save_contents", ["model", "optimizer", "extra", "hf_model"]),
    _fixed(f"{ACTOR}.checkpoint.load_contents", ["model", "optimizer", "extra"]),
    _fixed("critic.enable", False),
    _fixed("reward.num_workers", 1),
)


def _passes(config: Config) -> str:
    return "bf16" if settled(config).policy.precision == "bfloat16" else "fp32"


def _estimator(config: Config) -> str:
    algorithm = config.algorithm
    known = ESTIMATORS.get((algorithm.advantage_baseline, algorithm.advantage_scale))
    if known is None:
        raise ConfigError(
            "algorithm.advantage_baseline = 'leave-one-out' with advantage_scale = 'std': verl has no such "
            "estimator; set algorithm.advantage_scale = 'none'"
        )
    return known


def evaluation_every(config: Config) -> int:
    """Steps between two held-out evaluations, so that there are at most `train.evals`; −1 for none."""
    return -1 if not config.train.evals else -(-config.train.steps // config.train.evals)


def settings(config: Config) -> dict[str, Value]:
    """verl's keys and values for a configuration, `[verl.overrides]` included. Raises ConfigError."""
    known = {entry.key: entry.value(config) for entry in TABLE}
    given = {key: None if value == "null" else value for key, value in config.verl.overrides.items()}
    plain = {key.lstrip("+") for key in given}
    return {key: value for key, value in known.items() if key.lstrip("+") not in plain} | given


def compose(config: Config, folder: Path, digests: dict[str, str], resume: bool = False) -> Any:
    """verl's whole tree (an OmegaConf DictConfig). Needs verl. Raises ConfigError for a key verl lacks."""
    import hydra
    from omegaconf import OmegaConf, open_dict

    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        tree = hydra.compose("ppo_trainer")
    keys = set(_leaves(OmegaConf.to_container(tree, resolve=False)))
    for key, value in settings(config).items():
        if not key.startswith("+") and not _known(key, keys):
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(
                f"verl.overrides: verl's configuration has no '{key}'{hint} (a key to add begins with '+')"
            )
        with open_dict(tree):
            OmegaConf.update(tree, key.lstrip("+"), value, force_add=True)
    run: dict[str, Any] = {
        "data.train_files": str(folder / "verl" / "train.jsonl"),
        "data.val_files": str(folder / "verl" / "dev.jsonl"),
        "trainer.default_local_dir": str(folder / "checkpoints"),
        "trainer.resume_mode": "auto" if resume else "disable",
        "rexrag": {"config": dump_toml(config), "folder": str(folder), "digests": digests},
        # Nodes that the driver did not start do not have its environment.
        f"ray_kwargs.ray_init.runtime_env.env_vars.{MODULES}": os.environ.get(MODULES, PLUGIN),
    }
    if resume:  # the run folder has that evaluation already
        run["trainer.val_before_train"] = False
    with open_dict(tree):
        for key, value in run.items():
            OmegaConf.update(tree, key, value, force_add=True)
    return tree


def resolved(config: Config) -> dict[str, Any]:
    """verl's whole tree for a dry run, with every reference resolved that can be before a run."""
    from omegaconf import OmegaConf

    tree = compose(config, Path("RUN"), {})
    del tree.rexrag
    plain: dict[str, Any] = OmegaConf.to_container(tree, resolve=True)
    return plain


def _leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix


def _known(key: str, keys: set[str]) -> bool:
    """A leaf, a branch, or below a leaf that is an open table ({} in verl's files)."""
    return key in keys or any(k.startswith(f"{key}.") for k in keys)

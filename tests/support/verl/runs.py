"""How the tests run verl on a CPU: settings and environment of a child process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PLUGINS = ("cpu_platform", "cpu_rollout", "cpu_trainer")

SMALL = {
    "engine": "verl",
    "policy.device": "cpu",
    "seed": 3,
    "policy.path": "tiny-hard",
    "data.world_people": 24,
    "data.world_questions": 32,
    "data.dev_limit": 4,
    "retriever.topk": 2,
    "agent.template": "terse",
    "agent.search_turns": 2,
    "agent.turn_tokens": 32,
    "agent.evidence_tokens": 60,
    "agent.total_tokens": 256,
    "agent.cues": "tiny",
    "algorithm.name": "rex-rag",
    "algorithm.rollouts": 4,
    "algorithm.probe_probability": 1.0,
    "algorithm.keep_ratio": 0.2,
    "algorithm.kl": 0.05,
    "learner.warmup_steps": 0,
    "learner.lr": 1e-3,
    "train.questions": 6,
    "train.steps": 2,
    "train.evals": 1,
    "train.save_every": 1,
    "train.control": "",
    "train.log_rollouts": 500,
    "train.max_tokens": 0,
    "train.max_generated": 0,
    "verl.gpus_per_node": 2,
    "verl.tensor_parallel": 2,
    "verl.agent_workers": 1,
    "verl.prompt_tokens": 64,
    "verl.tokens_per_gpu": 4096,
}
VERL = {
    "trainer.device": "cpu",
    "trainer.v1.trainer_mode": "rexrag_cpu",
    "actor_rollout_ref.rollout.name": "replica",
    "actor_rollout_ref.model.use_remove_padding": False,
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "+actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "actor_rollout_ref.actor.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "data.dataloader_num_workers": 0,
    "+ray_kwargs.ray_init.num_gpus": 2,
    "ray_kwargs.ray_init.num_cpus": 16,
    "+ray_kwargs.ray_init.include_dashboard": False,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
}


def environment(**more: str) -> dict[str, str]:
    """The child's environment: our plugins, one thread a process, no network."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "PYTHONWARNINGS": "ignore",
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": ",".join(f"tests.support.verl.{name}" for name in PLUGINS),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_DEDUP_LOGS": "0",
        # Ray makes its workers nicer than everything else: on a busy machine they would not get on.
        "RAY_worker_niceness": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        **more,
    }


def options(settings: dict[str, object], overrides: dict[str, object]) -> list[str]:
    """`--set` options of both kinds of setting."""
    pairs = {**settings, **{f"verl.overrides.{key}": value for key, value in overrides.items()}}
    spelled = {k: str(v).lower() if isinstance(v, bool) else v for k, v in pairs.items()}
    return [word for key, value in spelled.items() for word in ("--set", f"{key}={value}")]


def train(folder: Path, *more: str, settings=None, overrides=None, env=None, timeout=600):
    """`rexrag train` in a process of its own; stdout and stderr as text."""
    known = options(SMALL | (settings or {}), VERL | (overrides or {}))
    config = [] if "--resume" in more else [str(ROOT / "tests/support/verl/base.toml")]
    command = [sys.executable, "-m", "rexrag", "train", *config, *known, "--out", str(folder), *more]
    known_env = environment(**(env or {}))
    for _ in range(3):
        done = subprocess.run(
            command, env=known_env, capture_output=True, text=True, timeout=timeout, cwd=ROOT
        )
        # Ray gives its own daemons 30 s to come up, which a busy machine does not always manage.
        if "current node timed out during startup" not in done.stderr:
            break
        if "--resume" not in more:
            shutil.rmtree(folder, ignore_errors=True)
    return done

"""`rexrag warmup`: teach a pretrained model the protocol from rule-built demonstrations of real questions."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rexrag.agent.prompts import cue_pool
from rexrag.config.schema import Config
from rexrag.data.demonstrations import Demonstration
from rexrag.data.two_wiki import question_demonstrations
from rexrag.engine.export import export_model
from rexrag.engine.learning.muon import adamw
from rexrag.engine.loading import choose_trained, codec_of, load_model, precision_of
from rexrag.errors import ConfigError, DataError
from rexrag.io import atomic_folder, check_writable, write_json
from rexrag.retrieval import make_retriever
from rexrag.training.components import load_data
from rexrag.training.sft import episode_setting, fit

RECORD = "start.json"
DOUBTS = "default_demo"
"""The cue pool whose wordings are demonstrated; probes use another one."""


def warm_up(config: Config, out: Path) -> dict[str, Any]:
    """Fine-tune `config.policy` on demonstrations of its training questions; writes a model folder.

    Only questions whose chain of searches the rule can find are demonstrated; their share is reported.
    Raises RexragError with one line; nothing is left half-written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not empty")
    check_writable(out)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    data = load_data(config.data)
    retriever = make_retriever(config.retriever, data.corpus)
    model, folder = load_model(config.policy, dtype=torch.float32)
    codec = codec_of(model, folder)
    setting = episode_setting(codec, config.agent, config.retriever.topk)
    doubts = [cue.removeprefix("<think>").strip() for cue in cue_pool(DOUBTS)]
    demonstrations, share = question_demonstrations(
        data.train, retriever, setting, config.warmup.recovery, doubts, config.seed
    )
    kept = [d for d in demonstrations if len(d.prompt) + len(d.tokens) <= config.agent.total_tokens]
    if config.warmup.demonstrations:
        kept = kept[: config.warmup.demonstrations]
    if not kept:
        raise DataError("the rule finds no demonstration that fits agent.total_tokens in these questions")
    choose_trained(model, config.policy, config.seed)
    steps = max(1, config.warmup.epochs * len(kept) // config.warmup.batch)
    start = time.perf_counter()
    losses = fit(
        model,
        adamw(model, config.warmup.lr),
        _batches(kept, config.warmup.batch, config.seed),
        steps,
        evidence_weight=config.warmup.evidence_weight,
        autocast=precision_of(config.policy).autocast,
    )
    facts = {
        "from": config.policy.path,
        "demonstrations": len(kept),
        "share_of_questions": round(share, 4),
        "steps": steps,
        "loss_first": round(losses[0], 4),
        "loss_last": round(sum(losses[-10:]) / len(losses[-10:]), 4),
        "seconds": round(time.perf_counter() - start, 1),
        "seed": config.seed,
    }
    with atomic_folder(out) as fresh:
        export_model(model, codec, fresh)
        write_json(fresh / RECORD, facts | {"warmup": config.warmup.model_dump(mode="json")})
    return facts | {"out": str(out)}


def _batches(rows: Sequence[Demonstration], size: int, seed: int) -> Iterator[list[Demonstration]]:
    """Endless shuffled epochs, cut into batches."""
    rng = random.Random(f"warmup/{seed}")
    queue: list[Demonstration] = []
    while True:
        while len(queue) < size:
            queue += rng.sample(rows, len(rows))
        yield queue[:size]
        queue = queue[size:]

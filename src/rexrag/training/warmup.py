"""`rexrag warmup`: supervised training that teaches a pretrained model the protocol.

Three sources of demonstrations, one function each:

    warm_up                 built by a rule that was made for questions of 2WikiMultihopQA
    warm_up_on_file         a user's own rows: question and trace, or messages
    warm_up_on_rollouts     the policy's own right rollouts, on any questions with answers
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rexrag.agent.codec import HFCodec
from rexrag.agent.prompts import cue_pool, template_text
from rexrag.config.schema import Config
from rexrag.data.demonstrations import Demonstration
from rexrag.data.own_demonstrations import read_demonstrations
from rexrag.data.questions import draw_questions
from rexrag.data.two_wiki import question_demonstrations
from rexrag.engine.export import export_model
from rexrag.engine.learning.learner import refresh
from rexrag.engine.learning.muon import adamw
from rexrag.engine.loading import choose_trained, codec_of, load_engine, load_model, precision_of
from rexrag.errors import ConfigError, DataError
from rexrag.io import atomic_folder, check_writable, write_json, write_jsonl
from rexrag.retrieval import check_service, make_retriever
from rexrag.training.components import check_window, fit_prompts, load_data
from rexrag.training.rejection_sampling import Drawn, RejectionSampling, draw_demonstrations
from rexrag.training.sft import episode_setting, fit

RECORD = "start.json"
ROWS = "demonstrations.jsonl"
"""Beside the weights: what `warm_up_on_rollouts` trained on, as rows that `warm_up_on_file` reads."""
DOUBTS = "default_demo"
"""The cue pool whose wordings are demonstrated; probes use another one."""
OTHER_WAYS = "for other questions: --from-rollouts, or --demonstrations FILE"


def warm_up(config: Config, out: Path) -> dict[str, Any]:
    """Train `config.policy` on demonstrations of its training questions; writes a model folder.

    The rule that builds them was made for questions of 2WikiMultihopQA over a corpus of one passage an
    entity. Questions whose chain of searches it does not find are left out; the share of the others is
    returned. Raises RexragError with one line; nothing is left half-written.
    """
    _prepare(config, out)
    data = load_data(config.data)
    retriever = make_retriever(config.retriever, data.corpus)
    model, codec = _trainable(config)
    setting = episode_setting(codec, config.agent, config.retriever.topk)
    doubts = [cue.removeprefix("<think>").strip() for cue in cue_pool(DOUBTS)]
    demonstrations, share = question_demonstrations(
        data.train, retriever, setting, config.warmup.recovery, doubts, config.seed
    )
    rows = [d for d in demonstrations if len(d.prompt) + len(d.tokens) <= config.agent.total_tokens]
    if not rows:
        raise DataError(
            "the rule, made for questions of 2WikiMultihopQA, finds no demonstration here that fits "
            f"agent.total_tokens; {OTHER_WAYS}"
        )
    facts = {"share_of_questions": round(share, 4)} | _train(model, rows, config)
    return _export(model, codec, out, config, facts)


def warm_up_on_file(config: Config, out: Path, file: Path) -> tuple[dict[str, Any], list[str]]:
    """Train `config.policy` on a user's own demonstrations; writes a model folder.

    Returns the facts of the run and one line for each row that could not be converted. Neither questions nor
    a corpus are read. Raises RexragError with one line.
    """
    _prepare(config, out)
    model, codec = _trainable(config)
    found = read_demonstrations(file, codec, config.agent, config.retriever.topk)
    facts = {"refused": len(found.refused)} | _train(model, found.rows, config)
    return _export(model, codec, out, config, facts), found.refused


def warm_up_on_rollouts(config: Config, out: Path, amount: RejectionSampling) -> dict[str, Any]:
    """Train `config.policy` on its own right rollouts of `config.data.train`; writes a model folder.

    Each round draws rollouts from the policy that the last round trained, and trains on them. Raises
    DataError where no rollout of a round was right: there is nothing to train on, and nothing is written.
    """
    _prepare(config, out)
    # Held-out questions are not asked, so their file need not be there.
    data = load_data(config.data.model_copy(update={"dev": ""}) if config.data.train else config.data)
    retriever = make_retriever(config.retriever, data.corpus)
    if config.retriever.kind == "remote":
        check_service(config.retriever)
    policy, learner = load_engine(config)
    check_window(policy, config)
    data = fit_prompts(data, policy.codec, config)
    codec = policy.codec
    assert isinstance(codec, HFCodec)
    rounds: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number in range(1, amount.rounds + 1):
        seed = config.seed + 1_000_003 * number
        questions = draw_questions(data.train, amount.questions or len(data.train), seed)
        drawn = draw_demonstrations(
            policy, questions, retriever, config.agent, config.retriever.topk, amount, seed
        )
        if not drawn.rows:
            raise DataError(_nothing_right(drawn, number, config))
        trained = _train(learner.model, [row for _, row in drawn.rows], config)
        rounds.append({"round": number} | drawn.figures() | trained)
        learner.model.eval()
        if learner.mirror is not None:
            refresh(learner.mirror, learner.trained)
        rows += [
            {"question": question.text, "trace": codec.decode(row.tokens), "round": number}
            for question, row in drawn.rows
        ]
    return _export(learner.model, codec, out, config, {"rounds": rounds}, rows)


def _nothing_right(drawn: Drawn, number: int, config: Config) -> str:
    """Why there is no row to train on, and what to try."""
    share = drawn.unanswered / max(1, drawn.rollouts)
    line = (
        f"round {number}: none of {drawn.rollouts:,} rollouts of {drawn.questions:,} questions was right, "
        f"{share:.0%} gave no answer: no row to train on; "
    )
    if number > 1:
        return line + f"the round before made it worse: fewer rounds, or warmup.lr below {config.warmup.lr:g}"
    return line + (
        "try more questions or rollouts, agent.template = 'search-first', or demonstrations from a file"
    )


# -- what the three ways share -----------------------------------------------------------------------------


def _prepare(config: Config, out: Path) -> None:
    """Refuse a folder that cannot be written, or an unknown template, before hours of work."""
    template_text(config.agent.template)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is not empty")
    check_writable(out)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)


def _trainable(config: Config) -> tuple[Any, HFCodec]:
    """The model in float32, with the configured weights trainable, and its tokenizer.

    Raises ConfigError where demonstrations, which are written in tags, would be another protocol's.
    """
    if config.agent.protocol != "tags":
        raise ConfigError(
            f"agent.protocol = '{config.agent.protocol}': demonstrations are written in tags; "
            "only --from-rollouts takes another protocol"
        )
    model, folder = load_model(config.policy, dtype=torch.float32)
    codec = codec_of(model, folder)
    choose_trained(model, config.policy, config.seed)
    return model, codec


def _train(model: Any, rows: Sequence[Demonstration], config: Config) -> dict[str, Any]:
    """Supervised training on rows, `warmup.demonstrations` of them where that is set; returns its facts."""
    kept = rows[: config.warmup.demonstrations or len(rows)]
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
    return {
        "demonstrations": len(kept),
        "steps": steps,
        "loss_first": round(losses[0], 4),
        "loss_last": round(sum(losses[-10:]) / len(losses[-10:]), 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def _export(
    model: Any,
    codec: HFCodec,
    out: Path,
    config: Config,
    facts: dict[str, Any],
    rows: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write the model folder, whole or not at all; returns its facts."""
    facts = {"from": config.policy.path} | facts | {"seed": config.seed}
    with atomic_folder(out) as fresh:
        export_model(model, codec, fresh)
        write_json(fresh / RECORD, facts | {"warmup": config.warmup.model_dump(mode="json")})
        if rows:
            write_jsonl(fresh / ROWS, rows)
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

"""`rexrag warmup`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rexrag.cli.training import JsonOption, SetOption
from rexrag.config import presets
from rexrag.errors import ConfigError
from rexrag.io import printable

DEFAULT_CONFIG = "own-data"
"""The config of --demonstrations and --from-rollouts, which take any questions."""
REFUSED_SHOWN = 10
"""Rows that could not be converted, one line each; the rest are counted."""


def register(app: typer.Typer) -> None:
    app.command()(warmup)


def warmup(
    config: Annotated[
        str | None, typer.Argument(help="A config: its policy is trained. Default with an option: own-data.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Model folder to write.")] = Path("models/warm"),
    demonstrations: Annotated[
        Path | None,
        typer.Option(help="A .jsonl of question and trace, or of messages.", metavar="FILE"),
    ] = None,
    from_rollouts: Annotated[
        bool, typer.Option("--from-rollouts", help="Train on the policy's own right rollouts on data.train.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(help="--from-rollouts: how often to draw and train; default 1.", min=1)
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help="--from-rollouts: questions a round; default 200, 0: all.", min=0)
    ] = None,
    rollouts: Annotated[
        int | None, typer.Option(help="--from-rollouts: rollouts of a question; default 4.", min=1)
    ] = None,
    per_question: Annotated[
        int | None,
        typer.Option(help="--from-rollouts: rollouts kept of a question, at most; default 2.", min=1),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the warm-up.")] = None,
    override: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Teach a pretrained model the protocol by supervised training, before reinforcement learning.

    The demonstrations come from a file (--demonstrations) or from the policy's own right rollouts
    (--from-rollouts). Without either, a rule makes them for questions of 2WikiMultihopQA; it finds next to
    none for other questions.

    \b
    A row of FILE is one of
      {"question": "…", "trace": "<think> … </think> <search> … </search> <information> … </information>
        <think> … </think> <answer> … </answer>"}
      {"messages": […]}   with roles user, assistant (tool_calls with an argument query), tool

    Evidence is never trained on. A row that cannot be converted is named and left out.
    The settings are agent.* for limits and warmup.* for training (epochs, batch, lr).

    \b
    Examples:
      rexrag warmup --demonstrations demos.jsonl --out models/warm \\
          --set policy.path=Qwen/Qwen2.5-0.5B-Instruct
      rexrag warmup --from-rollouts --out models/warm --set data.train=train.jsonl \\
          --set data.corpus=corpus.jsonl --set agent.template=search-first
      rexrag warmup my.toml --from-rollouts --rounds 2 --questions 300 --out models/warm
      rexrag warmup smollm2-2wiki --out models/smollm2-2wiki-warm
    """
    given = {"rounds": rounds, "questions": questions, "rollouts": rollouts, "per_question": per_question}
    amount = {name: value for name, value in given.items() if value is not None}
    if demonstrations is not None and from_rollouts:
        raise ConfigError("--demonstrations and --from-rollouts: give one of them")
    if amount and not from_rollouts:
        raise ConfigError(f"--{next(iter(amount)).replace('_', '-')}: only with --from-rollouts")
    if config is None and demonstrations is None and not from_rollouts:
        raise ConfigError("expected --demonstrations FILE, --from-rollouts, or a config of 2WikiMultihopQA")
    overrides = [*(override or []), *([f"seed={seed}"] if seed is not None else [])]
    settings = presets.resolve(config or DEFAULT_CONFIG, "", overrides)
    facts = _run(settings, out, demonstrations, amount if from_rollouts else None)
    if as_json:
        print(json.dumps(facts))
        return
    rounds_done = facts.pop("rounds", [])
    for row in rounds_done:
        _print(row)
    _print(facts)


def _run(settings: Any, out: Path, file: Path | None, amount: dict[str, int] | None) -> dict[str, Any]:
    from rexrag.training.rejection_sampling import RejectionSampling
    from rexrag.training.warmup import warm_up, warm_up_on_file, warm_up_on_rollouts

    if amount is not None:
        return warm_up_on_rollouts(settings, out, RejectionSampling(**amount))
    if file is None:
        return warm_up(settings, out)
    facts, refused = warm_up_on_file(settings, out, file)
    for line in refused[:REFUSED_SHOWN]:
        print(f"left out: {printable(line)}", file=sys.stderr)
    if len(refused) > REFUSED_SHOWN:
        print(f"left out: {len(refused) - REFUSED_SHOWN:,} more rows", file=sys.stderr)
    return facts


def _print(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        print(f"{name:24} {printable(str(value))}")

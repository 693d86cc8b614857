"""`rexrag ask`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from rexrag.cli.training import AllowPlugins, JsonOption, SetOption


def register(app: typer.Typer) -> None:
    app.command()(ask)


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    config: Annotated[str | None, typer.Option(help="Config with policy, corpus and agent.")] = None,
    policy: Annotated[
        str,
        typer.Option(help="Run folder, checkpoint, model folder or id, http://…/v1."),
    ] = "",
    override: SetOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling, for temperature > 0.")] = 0,
    model: Annotated[str, typer.Option(help="Endpoint: the model's name there.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Endpoint: tokenizer folder or id; default: --model.")] = "",
    allow_plugins: AllowPlugins = False,
    as_json: JsonOption = False,
) -> None:
    """Answer one question; the trace appears as it is written.

    \b
    Examples:
      rexrag ask "Who is the mayor of the city where … was born?"
      rexrag ask "…" --policy runs/quickstart --set data.world_seed=7
      rexrag ask "…" --policy http://127.0.0.1:8000/v1 --set data.corpus=corpus.jsonl --json
    """
    from rexrag.evaluation.ask import ask as run
    from rexrag.evaluation.policies import EndpointOptions, load_agent_parts
    from rexrag.io import printable

    endpoint = EndpointOptions(model=model, tokenizer=tokenizer)
    agent = load_agent_parts(policy, config, override or [], endpoint=endpoint, allow_plugins=allow_plugins)
    try:
        told = None if as_json else _write
        answer = run(agent.policy, question, agent.retriever, agent.config, temperature, seed, told)
    finally:
        agent.close()
    if as_json:
        print(json.dumps(asdict(answer), ensure_ascii=False))
        return
    searches = f"{answer.searches} search" + "es" * (answer.searches != 1)
    shown = answer.answer if answer.answer is not None else "(none)"
    print(printable(f"\nanswer: {shown}  ({searches}, {answer.tokens} tokens)"))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

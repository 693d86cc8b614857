"""`rexrag ask`, `score`, `data`, `doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rexrag.cli.training import JsonOption, SetOption
from rexrag.io import printable

data_app = typer.Typer(help="Make and check data sets.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    for command in (ask, score, doctor):
        app.command()(command)
    app.add_typer(data_app, name="data")


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    config: Annotated[str | None, typer.Option(help="Config with policy, corpus and agent.")] = None,
    policy: Annotated[
        str, typer.Option(help="Run folder, checkpoint, model folder or id; default: the config's.")
    ] = "",
    override: SetOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperature > 0.")] = 0,
) -> None:
    """Answer one question; the trace appears as it is written.

    \b
    Examples:
      rexrag ask "Who is the mayor of the city where … was born?"
      rexrag ask "…" --policy runs/quickstart --set data.world_seed=7
    """
    from rexrag.errors import ConfigError
    from rexrag.evaluation.ask import ask as run
    from rexrag.evaluation.policies import is_endpoint, resolve_config

    if is_endpoint(policy):
        raise ConfigError(f"--policy {policy}: rexrag ask runs local weights; rexrag eval takes an endpoint")
    rollout = run(question, resolve_config(policy, config, override or []), temperature, seed)
    print(printable(f"\nanswer: {rollout.answer if rollout.answer is not None else '(none)'}"))


def score(
    file: Annotated[Path, typer.Argument(help="Traces: rows with question, answers, response.")],
    rows: Annotated[bool, typer.Option("--rows", help="Also print one line a row.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Re-score traces made elsewhere: EM, F1, sub-EM, actions. Recorded scores are compared, not trusted.

    Example: rexrag score traces.jsonl --rows
    """
    from rexrag.cli.display import stdout, table
    from rexrag.evaluation.rescore import score_traces

    scores, totals = score_traces(file)
    if as_json:
        print(json.dumps({"totals": asdict(totals), "rows": [asdict(row) for row in scores]}))
        return
    console = stdout()
    if rows:
        columns = ("row", "EM", "F1", "sub-EM", "searches", "answers", "malformed", "prediction", "disagrees")
        lines = [
            (
                r.row, f"{r.em:.0f}", f"{r.f1:.2f}", f"{r.sub_em:.0f}", r.searches, r.answers, r.malformed,
                "–" if r.prediction is None else r.prediction[:40], ", ".join(r.disagrees) or "–",
            )
            for r in scores
        ]  # fmt: skip
        console.print(table(str(file), columns, lines))
    shown = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in asdict(totals).items()}
    console.print(table("Totals", ("figure", "value"), shown.items()))


@data_app.command("world")
def data_world(
    out: Annotated[Path, typer.Argument(help="Folder for corpus.jsonl, train.jsonl, dev.jsonl.")],
    people: Annotated[int, typer.Option(min=12, help="Size; other entities follow.")] = 120,
    train: Annotated[int, typer.Option(min=1, help="Training questions.")] = 400,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out questions.")] = 200,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write a fictional world as files in the format of your own data.

    Example: rexrag data world worlds/big --people 20000 --train 5000
    """
    from rexrag.data.world.generator import World

    world = World(seed, people)
    world.write(out, train, held_out, seed)
    print(f"{world.entities:,} entities, {train:,} training and {held_out:,} held-out questions: {out}")


@data_app.command("check")
def data_check(
    questions: Annotated[Path, typer.Argument(help="Questions, .jsonl or .parquet.")],
    corpus: Annotated[Path | None, typer.Option(help="A corpus.jsonl to check too.")] = None,
) -> None:
    """Read every row and say what is there, or which row is wrong.

    Example: rexrag data check train.parquet --corpus corpus.jsonl
    """
    from rexrag.data.questions import load_questions, questions_digest
    from rexrag.retrieval.corpus import documents_digest, read_corpus

    loaded = load_questions(questions)
    print(f"{questions}: {len(loaded):,} questions, digest {questions_digest(loaded)[:16]}")
    print(printable(f"first: {loaded[0].text} -> {', '.join(loaded[0].answers)}"))
    if corpus is not None:
        documents = list(read_corpus(corpus))
        print(f"{corpus}: {len(documents):,} documents, digest {documents_digest(documents)[:16]}")


def doctor(as_json: JsonOption = False) -> None:
    """What is installed, what this machine can run, and the command that adds what is missing.

    Example: rexrag doctor --json
    """
    from rexrag.cli.display import stdout, table
    from rexrag.cli.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return
    rows = [(f.what, f.state, f.detail, f.remedy or "–") for f in findings]
    stdout().print(table("rexrag doctor", ("what", "state", "detail", "to add it"), rows, words=True))

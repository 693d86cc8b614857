"""`rexrag data world` and `rexrag data check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Make and check data sets.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(data_app, name="data")


@data_app.command("world")
def data_world(
    out: Annotated[Path, typer.Argument(help="Folder for corpus.jsonl, train.jsonl, dev.jsonl.")],
    people: Annotated[int, typer.Option(min=12, help="People; other entities grow with them.")] = 120,
    train: Annotated[int, typer.Option(min=1, help="Training questions.")] = 400,
    held_out: Annotated[int, typer.Option(min=1, help="Held-out questions.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 0,
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
    questions: Annotated[
        Path,
        typer.Argument(help="Questions: .jsonl, .json, .parquet, .tsv or .csv, compressed or not."),
    ],
    corpus: Annotated[Path | None, typer.Option(help="A corpus.jsonl to check too.")] = None,
) -> None:
    """Check every row: print counts, or the first wrong row.

    Example: rexrag data check train.parquet --corpus corpus.jsonl
    """
    from rexrag.data.questions import load_questions, questions_digest
    from rexrag.io import printable
    from rexrag.retrieval.corpus import documents_digest, read_corpus

    loaded = load_questions(questions)
    print(f"{questions}: {len(loaded):,} questions, digest {questions_digest(loaded)[:16]}")
    print(printable(f"first: {loaded[0].text} -> {', '.join(loaded[0].answers)}"))
    if corpus is not None:
        documents = list(read_corpus(corpus))
        print(f"{corpus}: {len(documents):,} documents, digest {documents_digest(documents)[:16]}")

"""`rexrag`: parse, call, print. Exit codes: 0 done, 1 a failure of ours, 2 bad arguments, config or data."""

from __future__ import annotations

import io
import sys
import traceback

import typer

from rexrag import __version__
from rexrag.cli import ask, config, data, doctor, evaluation, models, score, search, training, warmup
from rexrag.errors import RexragError
from rexrag.io import printable

app = typer.Typer(
    name="rexrag",
    help="Train search agents that explore beyond dead ends (REX-RAG, arXiv 2508.08149).",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (training, evaluation, ask, score, doctor, data, search, warmup, models, config):
    command.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rexrag {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
) -> None:
    """\b
    Examples:
    rexrag train                                the embedded quickstart, no network, no GPU
    rexrag train my.toml --set train.steps=200  your own model and data
    rexrag ask "Who is the mayor of …?"         watch the agent search
    rexrag doctor                               what this machine can run
    """


def main() -> None:
    """Entry point: one line for a user's mistake, a traceback only with --debug or for a bug."""
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII terminal is shown what it can show
    # Accepted anywhere on the line, since that is where people add it.
    sys.argv = [sys.argv[0], *(arg for arg in sys.argv[1:] if arg != "--debug")]
    try:
        app()
    except RexragError as error:
        if debug:
            traceback.print_exc()
        print(f"rexrag: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        if debug:
            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        print(f"rexrag: {printable(f'{where}{error.strerror or error}')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("rexrag: interrupted", file=sys.stderr)
        sys.exit(130)

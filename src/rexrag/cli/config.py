"""`rexrag config`: every setting, its type, default and meaning."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(config)


def config(
    key: Annotated[str, typer.Argument(help="A key, a table, or an algorithm; none: all tables.")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="The whole reference as Markdown.")] = False,
) -> None:
    """Explain settings: type, default, meaning.

    \b
    Examples:
      rexrag config                       all keys
      rexrag config algorithm             the algorithms and what each can be set to
      rexrag config rex-rag-distill       one algorithm
      rexrag config agent.search_turns    one key
    """
    from rich.markup import escape

    from rexrag.cli.display import stdout
    from rexrag.config import reference

    if markdown:
        print(reference.markdown(), end="")
        return
    console = stdout()
    for setting in reference.find(key) if key else reference.settings():
        whose = f"  ({', '.join(setting.whose)})" if setting.whose else ""
        console.print(f"[bold]{escape(setting.key)}[/bold] = {escape(setting.default)}{whose}")
        console.print(f"    {escape(setting.kind)}. {escape(setting.meaning)}", soft_wrap=False)

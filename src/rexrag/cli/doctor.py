"""`rexrag doctor`: what is installed, what this machine can run, and what adds what is missing."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import typer

from rexrag import __version__
from rexrag.cli.training import JsonOption
from rexrag.errors import ModelError

NEEDED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pydantic",
    "bm25s",
    "tantivy",
    "fastapi",
    "plotly",
    "peft",
)
OPTIONAL = {
    "pyseismic-lsr": ("bm25-fast retrieval", "pip install -e '.[fast]'"),
    "sentence-transformers": ("dense and hybrid retrieval: encoders", "pip install -e '.[dense]'"),
    "faiss-cpu": ("dense and hybrid retrieval: vector search", "pip install -e '.[dense]'"),
    "gguf": ("importing GGUF weights", "pip install gguf"),
    "tensorboard": ("logging to TensorBoard", "pip install tensorboard"),
    "verl": ("engine = 'verl': several GPUs", 'pip install -e ".[verl]"'),
    "wandb": ("logging to Weights & Biases", "pip install wandb"),
    "trackio": ("logging to Trackio", "pip install trackio"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    what: str
    state: str
    """ok, missing, or no."""
    detail: str
    remedy: str = ""


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: JsonOption = False) -> None:
    """What is installed, what this machine can run, and the command that adds what is missing.

    Example: rexrag doctor --json
    """
    from rexrag.cli.display import stdout, table

    findings = examine()
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings]))
        return
    rows = [(f.what, f.state, f.detail, f.remedy or "–") for f in findings]
    stdout().print(table("rexrag doctor", ("what", "state", "detail", "to add it"), rows, words=True))


def examine() -> list[Finding]:
    """Look, install nothing, change nothing."""
    findings = [Finding("rexrag", "ok", f"{__version__}, Python {sys.version.split()[0]}")]
    findings += [_package(name, "needed", f"pip install {name}") for name in NEEDED]
    findings += [_package(name, why, remedy) for name, (why, remedy) in OPTIONAL.items()]
    return [*findings, *_machine(), *_checkpoints()]


def _package(name: str, why: str, remedy: str) -> Finding:
    try:
        return Finding(name, "ok", version(name))
    except PackageNotFoundError:
        return Finding(name, "missing", why, remedy)


def _machine() -> list[Finding]:
    import torch

    from rexrag.engine.precision import automatic
    from rexrag.engine.sources import choose_device
    from rexrag.retrieval.index.estimate import available_memory

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(gpus))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    bf16 = torch.backends.cpu.get_cpu_capability()
    available = available_memory() / 2**30
    memory = f"{available:.1f} GiB free" if math.isfinite(available) else "this system does not say"
    precision = automatic(choose_device("auto"))
    return [
        Finding("cpu", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {bf16}"),
        Finding("memory", "ok", f"{memory}, disk {free:.0f} GiB free"),
        Finding("gpu", "ok", names)
        if gpus
        else Finding("gpu", "no", "the quickstart and models up to about 200 M parameters train on the CPU"),
        Finding("precision", "ok", f"policy.precision = auto is {precision.name}: {precision.reason}"),
    ]


SHOWN = ("greedy EM", "hard questions: right by chance")
"""Measurements of a shipped checkpoint (its `start.json`) on which a comparison from it depends."""


def _checkpoints() -> list[Finding]:
    from rexrag.engine.loading import EMBEDDED, resolve

    findings = []
    for name in (n for n in EMBEDDED if n.startswith("tiny-")):
        try:
            facts = json.loads((Path(resolve(name)) / "start.json").read_text(encoding="utf-8"))
            measured = {what: facts["measured"][what]["value"] for what in SHOWN}
            findings.append(
                Finding(name, "ok", ", ".join(f"{w} {100 * v:.1f} %" for w, v in measured.items()))
            )
        except ModelError as error:
            findings.append(Finding(name, "missing", str(error), "reinstall rexrag"))
    return findings

"""What the speed benchmarks share: a workload, the limits of this machine, and how figures are printed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from rexrag.config import presets
from rexrag.config.schema import Config
from rexrag.engine.loading import EMBEDDED, choose_device
from rexrag.retrieval import make_retriever
from rexrag.retrieval.base import Retriever
from rexrag.training.components import load_data
from rexrag.types import Origin, Question, Rollout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# -- arguments and workload --------------------------------------------------------------------------------


def parser(doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every speed benchmark takes; `doc` is its module's docstring."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--model", default="tiny-hard", help="a model folder, or a shipped checkpoint")
    made.add_argument("--data", default="data/2wiki", help="corpus.jsonl, train.jsonl (for a model folder)")
    made.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    made.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    made.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds; medians are shown")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the config")
    made.add_argument("--json", help="also write the figures here")
    return made


def configure(args: argparse.Namespace) -> Config:
    """The quickstart for a shipped checkpoint; else the settings of `smollm2-2wiki`."""
    embedded = args.model in EMBEDDED
    files = [] if embedded else [f"data.{name}={args.data}/{name}.jsonl" for name in ("train", "corpus")]
    fixed = [f"policy.path={args.model}", f"policy.precision={args.dtype}", *files, 'data.dev=""']
    if args.threads:
        torch.set_num_threads(args.threads)
    base = "quickstart" if embedded else "smollm2-2wiki"
    return presets.resolve(base, overrides=[*fixed, *args.set])


def questions_and_retriever(config: Config) -> tuple[list[Question], Retriever]:
    data = load_data(config.data)
    return data.train, make_retriever(config.retriever, data.corpus)


def grouped(questions: Sequence[Question], rollouts: int, group: int, first: int = 0) -> list[Question]:
    """One question for each rollout, `group` of them the same; later rounds begin at `first`."""
    count = -(-rollouts // group)
    asked = [questions[(first + i) % len(questions)] for i in range(count)]
    return [question for question in asked for _ in range(group)][:rollouts]


# -- what a model costs ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters and floating-point operations of a decoder."""

    body: int
    """Parameters of the decoder layers."""
    head: int
    """Parameters of the output layer."""
    pair: int
    """Operations of one query meeting one key in all layers: scores and sum, 4 · heads · size · layers."""
    kv_bytes: int
    """Keys and values of one token."""
    bytes_each: int
    """Of one parameter."""

    @classmethod
    def of(cls, model: Any) -> Size:
        head: nn.Module = model.get_output_embeddings()
        embedding = model.get_input_embeddings().weight.numel()
        body = sum(p.numel() for p in model.base_model.parameters()) - embedding
        text = model.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        bytes_each = next(model.parameters()).element_size()
        return cls(
            body=body,
            head=sum(p.numel() for p in head.parameters()),
            pair=4 * text.num_attention_heads * width * text.num_hidden_layers,
            kv_bytes=2 * text.num_key_value_heads * width * text.num_hidden_layers * bytes_each,
            bytes_each=bytes_each,
        )

    def forward(self, tokens: float, pairs: float, scored: float) -> float:
        """Operations of one forward: tokens through the body, (query, key) pairs, tokens scored."""
        return 2 * self.body * tokens + self.pair * pairs + 2 * self.head * scored


def roofline(size: Size, rows: int, context: float, prefill: float, bandwidth: float, flops: float) -> float:
    """Tokens a second that no sampler can pass: `rows` decode together at a mean length of `context`.

    prefill: prompt and evidence tokens for each generated token. A decode step reads all weights and the
    caches of its rows, or computes, whichever takes longer; prefill computes.
    """
    read = ((size.body + size.head) * size.bytes_each + rows * context * size.kv_bytes) / bandwidth
    compute = rows * size.forward(1, context, 1) / flops
    return rows / (max(read, compute) + rows * prefill * size.forward(1, context, 0) / flops)


# -- what this machine can do ------------------------------------------------------------------------------


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gemm_flops(dtype: torch.dtype, repeats: int = 9) -> float:
    """Floating-point operations a second of a square matrix product; the best of several."""
    device = choose_device("auto")
    size = 1536 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return float(2 * size**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(repeats)))


def memory_bandwidth(repeats: int = 7) -> float:
    """Bytes a second read by a matrix-vector product that no cache holds; the best of several."""
    device = choose_device("auto")
    rows = 1 << (16 if device.type == "cpu" else 18)
    matrix, vector = torch.ones(rows, 4096, device=device), torch.ones(4096, device=device)
    torch.mv(matrix, vector)
    return float(matrix.nbytes / min(seconds(lambda: torch.mv(matrix, vector)) for _ in range(repeats)))


def machine(dtype: str) -> dict[str, Any]:
    """What ran, and the two measured limits of the roofline."""
    return {
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": dtype,
        "gemm_gflops": gemm_flops(DTYPES[dtype]) / 1e9,
        "read_gb_per_s": memory_bandwidth() / 1e9,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def reset_peak() -> None:
    """Forget the process's peak memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Bytes: the process's peak resident memory since `reset_peak` (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


# -- what rollouts cost ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of finished rollouts."""

    rollouts: int
    generated: int
    """Sampled by the policy."""
    appended: int
    """Cue, evidence and notice."""
    prompts: int
    """Prompt tokens, each prompt once."""
    context: float
    """Mean length, prompt included, at which a token was sampled."""
    turns: float
    answered: float
    distinct: float
    """Share of the responses' tokens, those that several have after the same beginning counted once."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> Work:
        places = [len(r.prompt) + t for r in rollouts for t, o in enumerate(r.origins) if o == Origin.POLICY]
        prompts = {r.prompt for r in rollouts}
        beginnings = {key for r in rollouts for key in accumulate(r.tokens, _joined, initial=hash(r.prompt))}
        return cls(
            rollouts=len(rollouts),
            generated=len(places),
            appended=sum(len(r.origins) - r.count(Origin.POLICY) for r in rollouts),
            prompts=sum(map(len, prompts)),
            context=statistics.fmean(places),
            turns=statistics.fmean(len(r.turns) for r in rollouts),
            answered=statistics.fmean(r.answer is not None for r in rollouts),
            distinct=(len(beginnings) - len(prompts)) / sum(len(r.tokens) for r in rollouts),
        )


def _joined(beginning: int, token: int) -> int:
    return hash((beginning, token))


# -- tables ------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Plain text: the first column to the left, the others to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for first, *others in cells:
        columns = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(columns))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> str:
    """Lowest–highest."""
    return f"{_cell(min(values))}–{_cell(max(values))}"


def write(path: str | None, figures: dict[str, Any]) -> None:
    """Figures as JSON; dataclasses as their fields."""
    if path:
        text = json.dumps(figures, indent=1, default=asdict)
        Path(path).write_text(text + "\n", encoding="utf-8")

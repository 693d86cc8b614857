"""Supervised warm-up: a policy that knows the tag grammar and understands a doubt, before any reinforcement.

    python -m rexrag.training.sft OUT [key=value …]      # keys of `Warmup`

From scratch it makes the tiny Llama-architecture starts that are shipped (Muon on matrices, AdamW on the
rest, fresh fictional worlds in every batch); from a folder it goes on training one. `fit` is the same loop
for any causal language model and any demonstrations.
"""

from __future__ import annotations

import json
import math
import random
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rexrag.agent.codec import HFCodec, load_codec
from rexrag.agent.prompts import cue_pool, render_prompt
from rexrag.agent.protocols.tags import NOTICE, render_evidence
from rexrag.config.schema import AgentConfig, Count, Model, PolicyConfig, Positive, Unit
from rexrag.data.demonstrations import (
    Demonstration,
    Setting,
    graded_habits,
    habits,
    world_drafts,
    write,
)
from rexrag.data.world.generator import World
from rexrag.data.world.tokenizer import build_tokenizer, save_tokenizer
from rexrag.engine.learning.muon import muon_and_adamw, set_learning_rate
from rexrag.engine.loading import export_model, load_model
from rexrag.errors import ConfigError, ModelError
from rexrag.io import atomic_folder, write_json
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.types import Origin

QUIET_SECONDS = 10.0
"""Where the output is no terminal, a line of progress this often."""
DOUBTS = "tiny_demo"
"""The cue pool whose wordings are demonstrated; probes use another one."""
COMMAND = ("python", "-m", "rexrag.training.sft")
EMBEDDED_AGENT = AgentConfig(
    template="terse", search_turns=5, turn_tokens=48, evidence_tokens=120, total_tokens=512
)
"""The episode that the embedded starts were made for."""


class Warmup(Model):
    """A warm-up of an embedded start. Everything that the result depends on, the machine aside."""

    seed: int = 0
    steps: Count = 1000
    start: str = ""
    """A model folder to go on from; empty trains a new model."""
    profile: Literal["skill", "hard", "graded"] = "skill"
    """Where the demonstrator gives up: nowhere, on HARD_KINDS, or graded over the kinds."""
    habit: Unit = 1.0
    """hard: how often it gives up on HARD_KINDS. graded: the largest share."""
    other_habit: Unit = 0.03
    """hard: how often it gives up elsewhere. graded: the smallest share."""
    recovery: Unit = 0.25
    """Share of demonstrations that recover from a wrong step."""
    second_thought: Unit = 0.1
    """Weight of the `<think>` that opens a doubt: how likely the policy becomes to doubt by itself."""
    evidence_weight: Unit = 0.1
    """Weight of the language-model loss on evidence tokens."""
    batch: Count = 48
    worlds: Count = 2
    """Fresh worlds in a batch."""
    people: Count = 120
    longer_names: tuple[Unit, ...] = (1.0,)
    """Shares of worlds whose names have 0, 1, 2 more words, as those of larger worlds have."""
    hops: tuple[Unit, ...] = (0.3, 0.4, 0.3)
    """Share of questions with 1, 2, 3 hops."""
    ease_in: Unit = 0.0
    """For this first share of the steps, questions are mostly of one hop."""
    topk: Count = 2
    lr: Positive = 3e-3
    matrix_lr: Positive = 0.02
    decay_from: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.4
    """Share of the steps after which the learning rate falls linearly to 3 %."""
    hidden: Count = 128
    layers: Count = 5
    heads: Count = 4
    intermediate: Count = 352
    threads: Count = 1
    autocast: bool = True
    compile: bool = False
    """Compile the decoder (needs a C++ compiler): about 1.6 times as fast after a minute."""

    @model_validator(mode="after")
    def _check(self) -> Warmup:
        if self.worlds > self.batch:
            raise ValueError(f"worlds = {self.worlds} is more than batch = {self.batch}")
        return self


def warm_up(settings: Warmup, out: str | Path) -> dict[str, Any]:
    """Train a start and write it to `out`, a Hugging Face folder with `start.json`; returns start.json.

    Raises ModelError where `settings.start` is no model folder, ConfigError where something stands at `out`.
    """
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ConfigError(f"{out}: exists and is not empty")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    if settings.start:
        model, codec = load_start(settings.start)
    else:
        codec = HFCodec(embedded_tokenizer())
        model = new_model(settings, len(codec.tokenizer))
    setting = episode_setting(codec, EMBEDDED_AGENT, settings.topk)
    if settings.compile:
        model.base_model.forward = torch.compile(model.base_model.forward, dynamic=True)
    optimizers = muon_and_adamw(model, settings.matrix_lr, settings.lr)
    began, spent = time.perf_counter(), time.process_time()
    torch.set_flush_denormal(True)  # subnormal numbers are slow; the setting is the whole process's
    try:
        losses = fit(
            model,
            optimizers,
            world_batches(settings, setting),
            settings.steps,
            decay_from=settings.decay_from,
            evidence_weight=settings.evidence_weight,
            autocast=settings.autocast,
        )
    finally:
        torch.set_flush_denormal(False)
    facts = {
        "command": shlex.join([*COMMAND, Path(out).name, *_changes(settings)]),
        "settings": settings.model_dump(mode="json"),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - spent, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": round(sum(losses[-50:]) / len(losses[-50:]), 4),
    }
    save_start(model, codec, out, facts)
    return facts


def fit(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Iterator[Sequence[Demonstration]],
    steps: int,
    decay_from: float = 0.4,
    evidence_weight: float = 0.0,
    autocast: bool = False,
    micro_tokens: int = 4096,
) -> list[float]:
    """One optimizer step for each of `steps` batches; returns the policy loss of each (nats a token).

    The learning rate rises over 40 steps, stays, and falls linearly to 3 % from `decay_from` on.
    """
    model.train()
    losses: list[float] = []
    start = said = time.monotonic()
    columns = (TextColumn("warm-up"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("warm-up", total=steps, note="")
        for step in range(steps):
            rise, fall = (step + 1) / min(40, steps), (1 - step / steps) / (1 - decay_from)
            set_learning_rate(optimizers, min(1.0, rise, max(0.03, fall)))
            losses.append(_backward(model, next(batches), evidence_weight, autocast, micro_tokens))
            if not math.isfinite(losses[-1]):
                raise ModelError(f"warm-up step {step}: the loss is {losses[-1]}; a lower lr may help")
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            progress.update(task, advance=1, note=f"step {step + 1} loss {losses[-1]:.3f}")
            now = time.monotonic()
            if not progress.console.is_terminal and now - said > QUIET_SECONDS:
                said, eta = now, (now - start) / (step + 1) * (steps - step - 1)
                recent = losses[-100:]
                note = f"step {step + 1}/{steps} loss {sum(recent) / len(recent):.4f} eta {eta:.0f} s"
                print(note, file=sys.stderr, flush=True)
    return losses


def world_batches(settings: Warmup, setting: Setting) -> Iterator[list[Demonstration]]:
    """Endless batches, each over fresh worlds."""
    rng = random.Random(f"warm-up/{settings.seed}")
    kind_habits = {
        "skill": habits(0.0, 0.0),
        "hard": habits(settings.habit, settings.other_habit),
        "graded": graded_habits(settings.other_habit, settings.habit),
    }[settings.profile]
    doubts = [cue.removeprefix("<think>").strip() for cue in cue_pool(DOUBTS)]
    step = 0
    while True:
        easing = step < settings.ease_in * settings.steps
        hops = (0.75, 0.25, 0.0) if easing else settings.hops
        batch: list[Demonstration] = []
        for _ in range(settings.worlds):
            (longer,) = rng.choices(range(len(settings.longer_names)), settings.longer_names)
            world = World(rng.randrange(10**9), settings.people, longer)
            drafts = world_drafts(
                world, settings.batch // settings.worlds, kind_habits, doubts, rng,
                settings.recovery, settings.second_thought, hops,
            )  # fmt: skip
            batch += write(drafts, setting, BM25Retriever.build(world.documents))
        yield batch
        step += 1


def _backward(
    model: nn.Module,
    batch: Sequence[Demonstration],
    evidence_weight: float,
    autocast: bool,
    micro_tokens: int,
) -> float:
    """Gradient of mean policy loss + evidence_weight · mean evidence loss; returns the policy loss."""
    device = next(model.parameters()).device
    policy_total = sum(sum(d.weights) for d in batch)
    evidence_total = max(1, sum(d.origins.count(int(Origin.EVIDENCE)) for d in batch))
    loss_sum = 0.0
    for rows in _by_length(batch, micro_tokens):
        ids, weights, evidence = (x.to(device) for x in _pad(rows))
        targets, weights, evidence = ids[:, 1:], weights[:, 1:], evidence[:, 1:]
        wanted = (weights > 0) | (evidence if evidence_weight > 0 else torch.zeros_like(evidence))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            hidden = model.base_model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # type: ignore[operator]
            logits = model.get_output_embeddings()(hidden[wanted])  # type: ignore[operator]
        nll = functional.cross_entropy(logits.float(), targets[wanted], reduction="none")
        policy = (nll * weights[wanted]).sum() / policy_total
        loss = policy + evidence_weight * nll[evidence[wanted]].sum() / evidence_total
        loss.backward()  # type: ignore[no-untyped-call]
        loss_sum += policy.item()
    return loss_sum


def _by_length(batch: Sequence[Demonstration], micro_tokens: int) -> list[list[Demonstration]]:
    """Rows sorted by length, in groups of at most `micro_tokens` padded tokens (at least one row)."""
    groups: list[list[Demonstration]] = [[]]
    for row in sorted(batch, key=_length):
        if groups[-1] and (len(groups[-1]) + 1) * _length(row) > micro_tokens:
            groups.append([])
        groups[-1].append(row)
    return groups


def _length(row: Demonstration) -> int:
    return len(row.prompt) + len(row.tokens)


def _pad(rows: Sequence[Demonstration]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, weights, evidence) [B, prompt + T], padded on the right, where causal attention never looks."""
    shape = len(rows), max(map(_length, rows))
    ids = torch.zeros(shape, dtype=torch.long)
    weights = torch.zeros(shape)
    evidence = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        first, end = len(row.prompt), _length(row)
        ids[i, :end] = torch.tensor(row.prompt + row.tokens)
        weights[i, first:end] = torch.tensor(row.weights)
        evidence[i, first:end] = torch.tensor(row.origins) == int(Origin.EVIDENCE)
    return ids, weights, evidence


def embedded_tokenizer() -> Any:
    """The tokenizer of the shipped starts; it knows every word of their cue pools and of the notice."""
    return build_tokenizer([*cue_pool("tiny"), *cue_pool(DOUBTS), NOTICE])


def episode_setting(codec: HFCodec, agent: AgentConfig, topk: int) -> Setting:
    """How an episode under `agent` writes prompts and evidence."""
    return Setting(
        codec=codec,
        instruct=lambda question: render_prompt(agent.template, question),
        render=lambda documents: render_evidence(documents, codec, agent.evidence_tokens),
        topk=topk,
        search_turns=agent.search_turns,
        turn_tokens=agent.turn_tokens,
    )


def new_model(settings: Warmup, vocabulary: int) -> LlamaForCausalLM:
    """A fresh Llama decoder: embeddings N(0, 0.02²), matrices N(0, 1/fan-in), residual ones half.

    Llama and not Qwen2, because transformers loads every Qwen2 folder with Qwen2's own byte-level tokenizer.
    """
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            scale = 0.5 if "o_proj" in name or "down_proj" in name else 1.0
            nn.init.normal_(parameter, 0.0, scale / math.sqrt(parameter.shape[1]))
    model.set_attn_implementation(FLOAT32_ATTENTION)
    return model


FLOAT32_ATTENTION = "rexrag-float32"


def _float32_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                       **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    # Under bfloat16 autocast the CPU kernel's backward pass is five times slower than in float32.
    with torch.autocast(query.device.type, enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **kwargs)
    return out, None


AttentionInterface.register(FLOAT32_ATTENTION, _float32_attention)
AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)


def load_start(folder: str) -> tuple[Any, HFCodec]:
    """(model in float32 on the CPU, codec) of a model folder. Raises ModelError."""
    model, folder = load_model(PolicyConfig(path=folder, device="cpu"))
    model.set_attn_implementation(FLOAT32_ATTENTION)
    return model, load_codec(folder)


def save_start(model: Any, codec: HFCodec, out: str | Path, facts: Mapping[str, Any]) -> None:
    """Write weights (bfloat16), tokenizer and start.json; the folder appears whole or not at all."""
    with atomic_folder(out) as folder:
        export_model(model.to(torch.bfloat16), codec, folder)
        save_tokenizer(codec.tokenizer, folder)
        write_json(folder / "start.json", facts)


def _changes(settings: Warmup) -> list[str]:
    """The settings that differ from the defaults, as key=value."""
    default, chosen = Warmup().model_dump(mode="json"), settings.model_dump(mode="json")
    return [
        f"{key}={json.dumps(value).strip(chr(34))}" for key, value in chosen.items() if value != default[key]
    ]


def parse_settings(pairs: Sequence[str]) -> Warmup:
    """`key=value` arguments. Raises ConfigError."""
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        if not eq or key not in Warmup.model_fields:
            raise ConfigError(f"{pair}: expected key=value with one of {', '.join(Warmup.model_fields)}")
        tree[key] = value.strip("[]").split(",") if value.startswith("[") else value
    try:
        return Warmup.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}"
        ) from None


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m rexrag.training.sft OUT [key=value …]")
    try:
        print(json.dumps(warm_up(parse_settings(sys.argv[2:]), sys.argv[1]), indent=2))
    except (ConfigError, ModelError) as error:
        sys.exit(str(error))

"""How the tiny checkpoints of the package were made: supervised fine-tuning in fictional worlds.

    python -m rexrag.training.make_checkpoint OUT [key=value …]      # keys of `Recipe`

It trains a small Llama from scratch, or goes on from a model folder: Muon on matrices, AdamW on the rest, new
fictional worlds in every batch. The result knows the tag protocol and understands a cue.
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
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rexrag.agent.codec import HFCodec, load_codec
from rexrag.agent.prompts import cue_pool
from rexrag.agent.protocols.tags import NOTICE
from rexrag.config.schema import AgentConfig, Count, Model, PolicyConfig, Positive, Unit
from rexrag.data.demonstrations import Demonstration, Setting, write
from rexrag.data.world.demonstrator import Demonstrator, graded_habits, habits, world_drafts
from rexrag.data.world.generator import World
from rexrag.data.world.tokenizer import build_tokenizer, save_tokenizer
from rexrag.engine.export import export_model
from rexrag.engine.learning.muon import muon_and_adamw
from rexrag.engine.loading import load_model
from rexrag.errors import ConfigError, ModelError
from rexrag.io import atomic_folder, write_json
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.training.sft import episode_setting, fit

DOUBTS = "tiny_demo"
"""The cue pool whose cues are in demonstrations; probes use another one."""
COMMAND = ("python", "-m", "rexrag.training.make_checkpoint")
EMBEDDED_AGENT = AgentConfig(
    template="terse", search_turns=5, turn_tokens=48, evidence_tokens=120, total_tokens=512
)
"""The episode that the shipped checkpoints were made for."""


class Recipe(Model):
    """Everything that a checkpoint depends on, except the machine."""

    seed: int = 0
    steps: Count = 1000
    initial: str = ""
    """Initial checkpoint, a model folder; empty trains a new model. Once called `start`."""
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
    def _check(self) -> Recipe:
        if self.worlds > self.batch:
            raise ValueError(f"worlds = {self.worlds} is more than batch = {self.batch}")
        return self


def make_checkpoint(settings: Recipe, out: str | Path) -> dict[str, Any]:
    """Train a checkpoint and write it to `out`, a model folder with `start.json`; returns start.json.

    Raises ModelError where `settings.initial` is no model folder, ConfigError where `out` is not empty.
    """
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ConfigError(f"{out}: exists and is not empty")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    if settings.initial:
        model, codec = load_initial(settings.initial)
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
    save_checkpoint(model, codec, out, facts)
    return facts


def world_batches(settings: Recipe, setting: Setting) -> Iterator[list[Demonstration]]:
    """Endless batches, each over fresh worlds."""
    rng = random.Random(f"warm-up/{settings.seed}")
    kind_habits = {
        "skill": habits(0.0, 0.0),
        "hard": habits(settings.habit, settings.other_habit),
        "graded": graded_habits(settings.other_habit, settings.habit),
    }[settings.profile]
    doubts = [cue.removeprefix("<think>").strip() for cue in cue_pool(DOUBTS)]
    demonstrator = Demonstrator(kind_habits, doubts, settings.recovery, settings.second_thought)
    step = 0
    while True:
        easing = step < settings.ease_in * settings.steps
        hops = (0.75, 0.25, 0.0) if easing else settings.hops
        batch: list[Demonstration] = []
        for _ in range(settings.worlds):
            (longer,) = rng.choices(range(len(settings.longer_names)), settings.longer_names)
            world = World(rng.randrange(10**9), settings.people, longer)
            drafts = world_drafts(world, settings.batch // settings.worlds, demonstrator, rng, hops)
            batch += write(drafts, setting, BM25Retriever.build(world.documents))
        yield batch
        step += 1


def embedded_tokenizer() -> Any:
    """The tokenizer of the shipped checkpoints; it has every word of their cue pools and of the notice."""
    return build_tokenizer([*cue_pool("tiny"), *cue_pool(DOUBTS), NOTICE])


def new_model(settings: Recipe, vocabulary: int) -> LlamaForCausalLM:
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


def load_initial(folder: str) -> tuple[Any, HFCodec]:
    """(model in float32 on the CPU, codec) of a model folder. Raises ModelError."""
    model, folder = load_model(PolicyConfig(path=folder, device="cpu", precision="float32"))
    model.set_attn_implementation(FLOAT32_ATTENTION)
    return model, load_codec(folder)


def save_checkpoint(model: Any, codec: HFCodec, out: str | Path, facts: Mapping[str, Any]) -> None:
    """Write weights (bfloat16), tokenizer and start.json; the folder appears whole or not at all."""
    with atomic_folder(out) as folder:
        export_model(model.to(torch.bfloat16), codec, folder)
        save_tokenizer(codec.tokenizer, folder)
        write_json(folder / "start.json", facts)


def _changes(settings: Recipe) -> list[str]:
    """The settings that differ from the defaults, as key=value."""
    default, chosen = Recipe().model_dump(mode="json"), settings.model_dump(mode="json")
    return [
        f"{key}={json.dumps(value).strip(chr(34))}" for key, value in chosen.items() if value != default[key]
    ]


def parse_settings(pairs: Sequence[str]) -> Recipe:
    """`key=value` arguments. Raises ConfigError."""
    tree: dict[str, Any] = {}
    for pair in pairs:
        key, eq, value = pair.partition("=")
        key = {"start": "initial"}.get(key, key)
        if not eq or key not in Recipe.model_fields:
            raise ConfigError(f"{pair}: expected key=value with one of {', '.join(Recipe.model_fields)}")
        tree[key] = value.strip("[]").split(",") if value.startswith("[") else value
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}"
        ) from None


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m rexrag.training.make_checkpoint OUT [key=value …]")
    try:
        print(json.dumps(make_checkpoint(parse_settings(sys.argv[2:]), sys.argv[1]), indent=2))
    except (ConfigError, ModelError) as error:
        sys.exit(str(error))

"""Supervised fine-tuning of any causal language model on demonstrations."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from rexrag.agent.codec import HFCodec
from rexrag.agent.prompts import render_prompt
from rexrag.agent.protocols.tags import render_evidence
from rexrag.config.schema import AgentConfig
from rexrag.data.demonstrations import Demonstration, Setting
from rexrag.engine.learning.muon import set_learning_rate
from rexrag.errors import ModelError
from rexrag.types import Origin

QUIET_SECONDS = 10.0
"""Where the output is no terminal, seconds between two lines of progress."""
MICRO_TOKENS = 4096
"""Padded tokens of one forward and backward pass, at most; a longer row goes alone."""


def fit(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    batches: Iterator[Sequence[Demonstration]],
    steps: int,
    decay_from: float = 0.4,
    evidence_weight: float = 0.0,
    autocast: bool = False,
) -> list[float]:
    """One optimizer step for each of `steps` batches; returns the policy loss of each (nats a token).

    The learning rate rises over 40 steps, stays, and falls linearly to 3 % from `decay_from` on, a share of
    the steps. `autocast`: forward passes in bfloat16. Raises ModelError for a loss that is not finite.
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
            losses.append(_backward(model, next(batches), evidence_weight, autocast, MICRO_TOKENS))
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

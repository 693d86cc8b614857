"""Supervised fine-tuning: what it minimises, and that it learns."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from rexrag.agent.codec import HFCodec
from rexrag.data.demonstrations import Demonstration
from rexrag.engine.learning.muon import adamw, muon_and_adamw
from rexrag.errors import ModelError
from rexrag.training.make_checkpoint import EMBEDDED_AGENT, world_batches
from rexrag.training.sft import _backward, _by_length, episode_setting, fit
from tests.training.test_make_checkpoint import codec, model_of, tiny

__all__ = ["codec"]


@pytest.fixture(scope="module")
def batch(codec: HFCodec) -> list[Demonstration]:
    setting = episode_setting(codec, EMBEDDED_AGENT, 2)
    return next(world_batches(tiny(profile="hard", batch=12), setting))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_the_loss_is_a_weighted_mean_whatever_the_padding(codec: HFCodec, batch: list[Demonstration]) -> None:
    model = model_of(codec)
    losses, grads = [], []
    for micro_tokens in (1, 500, 10**6):  # one row at a time, a few, all in one
        model.zero_grad()
        losses.append(_backward(model, batch, 0.1, False, micro_tokens))
        grads.append(gradients(model))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    # The reference: every row alone, no padding, plain log-softmax.
    total = weight = 0.0
    for row in batch:
        ids = torch.tensor([row.prompt + row.tokens])
        with torch.no_grad():
            logp = torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)
        first = len(row.prompt)
        for i, (token, w) in enumerate(zip(row.tokens, row.weights, strict=True)):
            total -= w * float(logp[first + i - 1, token])
            weight += w
    assert losses[0] == pytest.approx(total / weight, rel=1e-4)


def test_evidence_and_mistakes_have_no_part_in_the_policy_loss(codec, batch) -> None:
    model = model_of(codec)
    before = _backward(model, batch, 0.0, False, 4096)
    rng = random.Random(0)
    changed = []
    for row in batch:
        last = max(i for i, w in enumerate(row.weights) if w > 0)
        tail = tuple(
            rng.randrange(3, 400) if i > last and w == 0 else t
            for i, (t, w) in enumerate(zip(row.tokens, row.weights, strict=True))
        )
        changed.append(Demonstration(row.prompt, tail, row.origins, row.weights))
    assert _backward(model, changed, 0.0, False, 4096) == before
    model.zero_grad()
    _backward(model, batch, 0.0, False, 4096)
    without = gradients(model)
    model.zero_grad()
    _backward(model, batch, 0.5, False, 4096)
    with_evidence = gradients(model)
    assert any(not torch.equal(a, b) for a, b in zip(without, with_evidence, strict=True))


def test_rows_are_grouped_by_length(batch: list[Demonstration]) -> None:
    groups = _by_length(batch, 600)
    lengths = [[len(r.prompt) + len(r.tokens) for r in group] for group in groups]
    assert sorted(itertools.chain(*lengths)) == list(itertools.chain(*lengths))
    assert all(len(group) == 1 or len(group) * max(group) <= 600 for group in lengths)
    assert sum(map(len, groups)) == len(batch)


@pytest.mark.parametrize("make", [lambda m: muon_and_adamw(m, 0.02, 3e-3), lambda m: adamw(m, 3e-3)])
def test_a_few_steps_lower_the_loss(codec: HFCodec, batch: list[Demonstration], make) -> None:
    model = model_of(codec)
    losses = fit(model, make(model), itertools.repeat(batch), 15, evidence_weight=0.1)
    assert len(losses) == 15 and losses[-1] < losses[0] - 0.5


def test_bfloat16_autocast_is_close_to_float32(codec: HFCodec, batch: list[Demonstration]) -> None:
    model = model_of(codec)
    exact = _backward(model, batch, 0.1, False, 4096)
    rounded = _backward(model, batch, 0.1, True, 4096)
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact


def test_a_loss_that_is_not_a_number_stops_the_run(codec: HFCodec, batch: list[Demonstration]) -> None:
    model = model_of(codec)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="step 0"):
        fit(model, adamw(model, 1e-3), itertools.repeat(batch), 2)

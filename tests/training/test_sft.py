"""The supervised warm-up: what it minimises, that it repeats, and that what it saves is a start."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.optim import Muon

from rexrag.agent.codec import HFCodec
from rexrag.agent.episode import Episode
from rexrag.config.schema import PolicyConfig
from rexrag.data.demonstrations import HARD_KINDS, Demonstration
from rexrag.data.world.generator import World
from rexrag.engine.learning.muon import adamw, muon_and_adamw, set_learning_rate, split_parameters
from rexrag.engine.loading import EMBEDDED, load_policy, resolve
from rexrag.errors import ConfigError, ModelError
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.training.sft import (
    EMBEDDED_AGENT,
    Warmup,
    _backward,
    _by_length,
    embedded_tokenizer,
    episode_setting,
    fit,
    new_model,
    parse_settings,
    warm_up,
    world_batches,
)
from rexrag.types import Origin

TINY = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 48, "batch": 6, "people": 30}


def tiny(**changes: object) -> Warmup:
    return Warmup.model_validate({**TINY, "steps": 3, "worlds": 2, **changes})


@pytest.fixture(scope="module")
def codec() -> HFCodec:
    return HFCodec(embedded_tokenizer())


@pytest.fixture(scope="module")
def batch(codec: HFCodec) -> list[Demonstration]:
    setting = episode_setting(codec, EMBEDDED_AGENT, 2)
    return next(world_batches(tiny(profile="hard", batch=12), setting))


def model_of(codec: HFCodec, seed: int = 0):
    torch.manual_seed(seed)
    return new_model(tiny(), len(codec.tokenizer))


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


def test_matrices_go_to_muon_and_the_rest_to_adamw(codec: HFCodec) -> None:
    model = model_of(codec)
    matrices, others = split_parameters(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert len(matrices) + len(others) == len(names)
    assert all("proj" in names[id(p)] and p.ndim == 2 for p in matrices)
    assert {names[id(p)].split(".")[1] for p in others} == {"embed_tokens", "layers", "norm"}
    optimizers = muon_and_adamw(model, 0.02, 3e-3)
    assert isinstance(optimizers[0], Muon)
    set_learning_rate(optimizers, 0.5)
    set_learning_rate(optimizers, 0.5)  # a factor of the first rate, not of the last
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.01, 1.5e-3]


def test_a_warm_up_repeats_and_leaves_a_start(tmp_path) -> None:
    facts = warm_up(tiny(seed=3), tmp_path / "a")
    warm_up(tiny(seed=3), tmp_path / "b")
    warm_up(tiny(seed=4), tmp_path / "c")
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    smallest = float.fromhex("0x1p-1074")
    assert smallest * 1.0 > 0.0, "subnormal numbers are there again"
    stored = json.loads((tmp_path / "a" / "start.json").read_text())
    assert stored == facts and stored["settings"]["seed"] == 3 and "seed=3" in stored["command"]
    again = parse_settings(stored["command"].split()[4:])
    assert again == tiny(seed=3), "the stored command gives the same settings"
    assert {p.suffix for p in (tmp_path / "a").iterdir()} == {".json", ".safetensors"}
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_a_start_loads_rolls_out_and_can_be_trained_on(tmp_path) -> None:
    warm_up(tiny(), tmp_path / "first")
    facts = warm_up(tiny(start=str(tmp_path / "first"), profile="graded", steps=2), tmp_path / "second")
    assert facts["settings"]["start"] == str(tmp_path / "first")
    policy = load_policy(PolicyConfig(path=str(tmp_path / "second"), device="cpu"))
    assert policy.codec.tokenizer.get_vocab() == embedded_tokenizer().get_vocab()
    world = World(1)
    episodes = [Episode(q, policy.codec, EMBEDDED_AGENT, 2) for q in world.questions("held-out", 4)]
    session = policy.session()
    session.run(episodes, BM25Retriever.build(world.documents), 1.0, seed=0)
    assert all(e.rollout().count(Origin.POLICY) > 0 for e in episodes)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["steps=0"], "steps = '0'"),
        (["stepz=3"], "expected key=value with one of"),
        (["profile=harsh"], "profile = 'harsh'"),
        (["hops=[0.5,2,0.1]"], r"hops\.1 = '2'"),
    ],
)
def test_bad_settings_are_named(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings(pairs)


def test_a_start_that_is_no_model_folder_is_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        warm_up(tiny(start=str(tmp_path / "missing")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_shipped_starts_are_small_and_know_their_words(name: str) -> None:
    folder = resolve(name)
    policy = load_policy(PolicyConfig(path=name, device="cpu"))
    assert policy.codec.tokenizer.get_vocab() == embedded_tokenizer().get_vocab(), "retrain after a new word"
    size = sum(p.numel() for p in policy.model.parameters())
    files = sum(f.stat().st_size for f in Path(folder).iterdir())
    assert 500_000 < size < 2_000_000 and files < 4_000_000
    facts = json.loads((Path(folder) / "start.json").read_text())
    assert {"command", "settings", "seconds", "measured"} <= set(facts)


def test_the_hard_start_answers_what_it_does_not_give_up_on() -> None:
    policy = load_policy(PolicyConfig(path="tiny-hard", device="cpu"))
    world = World(11)
    questions = [q for q in world.questions("held-out", 80, hops=(1, 1)) if q.kind not in HARD_KINDS]
    episodes = [Episode(q, policy.codec, EMBEDDED_AGENT, 2) for q in questions]
    session = policy.session()
    session.run(episodes, BM25Retriever.build(world.documents), 0.0, seed=0)
    rollouts = [e.rollout() for e in episodes]
    assert sum(r.em for r in rollouts) / len(rollouts) > 0.7

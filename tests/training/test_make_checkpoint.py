"""The shipped checkpoints: how they are made, and what they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.optim import Muon

from rexrag.agent.codec import HFCodec
from rexrag.agent.episode import Episode
from rexrag.config.schema import PolicyConfig
from rexrag.data.world.demonstrator import HARD_KINDS
from rexrag.data.world.generator import World
from rexrag.engine.learning.muon import muon_and_adamw, set_learning_rate, split_parameters
from rexrag.engine.loading import EMBEDDED, load_policy, resolve
from rexrag.errors import ConfigError, ModelError
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.training.make_checkpoint import (
    EMBEDDED_AGENT,
    Recipe,
    embedded_tokenizer,
    make_checkpoint,
    new_model,
    parse_settings,
)
from rexrag.types import Origin

TINY = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 48, "batch": 6, "people": 30}


def tiny(**changes: object) -> Recipe:
    return Recipe.model_validate({**TINY, "steps": 3, "worlds": 2, **changes})


@pytest.fixture(scope="module")
def codec() -> HFCodec:
    return HFCodec(embedded_tokenizer())


def model_of(codec: HFCodec, seed: int = 0):
    torch.manual_seed(seed)
    return new_model(tiny(), len(codec.tokenizer))


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


def test_making_a_checkpoint_repeats_bit_for_bit(tmp_path) -> None:
    facts = make_checkpoint(tiny(seed=3), tmp_path / "a")
    make_checkpoint(tiny(seed=3), tmp_path / "b")
    make_checkpoint(tiny(seed=4), tmp_path / "c")
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


def test_a_checkpoint_loads_rolls_out_and_can_be_the_initial_one_of_another(tmp_path) -> None:
    make_checkpoint(tiny(), tmp_path / "first")
    facts = make_checkpoint(
        tiny(initial=str(tmp_path / "first"), profile="graded", steps=2), tmp_path / "second"
    )
    assert facts["settings"]["initial"] == str(tmp_path / "first")
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


def test_an_initial_checkpoint_that_is_no_model_folder_is_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        make_checkpoint(tiny(initial=str(tmp_path / "missing")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_shipped_checkpoints_are_small_and_know_their_words(name: str) -> None:
    folder = resolve(name)
    policy = load_policy(PolicyConfig(path=name, device="cpu"))
    assert policy.codec.tokenizer.get_vocab() == embedded_tokenizer().get_vocab(), "retrain after a new word"
    size = sum(p.numel() for p in policy.model.parameters())
    files = sum(f.stat().st_size for f in Path(folder).iterdir())
    assert 500_000 < size < 2_000_000 and files < 4_000_000
    facts = json.loads((Path(folder) / "start.json").read_text())
    assert {"command", "settings", "seconds", "measured"} <= set(facts)


def test_the_hard_checkpoint_answers_what_it_does_not_give_up_on() -> None:
    policy = load_policy(PolicyConfig(path="embedded", device="cpu"))
    world = World(11)
    questions = [q for q in world.questions("held-out", 80, hops=(1, 1)) if q.kind not in HARD_KINDS]
    episodes = [Episode(q, policy.codec, EMBEDDED_AGENT, 2) for q in questions]
    session = policy.session()
    session.run(episodes, BM25Retriever.build(world.documents), 0.0, seed=0)
    rollouts = [e.rollout() for e in episodes]
    assert sum(r.em for r in rollouts) / len(rollouts) > 0.7

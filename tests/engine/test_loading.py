"""A policy and a learner built from a model folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rexrag.agent.episode import State
from rexrag.config.algorithms import Grpo
from rexrag.config.files import parse_config
from rexrag.config.schema import PolicyConfig
from rexrag.engine.loading import (
    choose_trained,
    load_engine,
    load_model,
    load_policy,
)
from rexrag.engine.sampling.policy import LocalPolicy
from rexrag.errors import ModelError
from rexrag.types import Sample
from tests.engine.learning.test_learner import samples
from tests.engine.sampling.test_policy import Library, config, episodes
from tests.support.scripted import MAKERS, VOCABULARY, llama, qwen2


def test_a_sampler_in_bfloat16_is_the_model_that_is_loaded_in_bfloat16(folder: Path) -> None:
    config = parse_config({}, [f"policy.path={folder}", "policy.precision=bfloat16"])
    sampler, learner = load_engine(config)
    loaded = load_policy(config.policy)
    rows = [([1, 2, 3], [4 + i % 20 for i in range(400)])]
    assert torch.equal(sampler.score(rows, 1.0)[0], loaded.score(rows, 1.0)[0])
    assert learner.mirror is sampler.model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_is_visible_to_the_sampler(folder, dtype):
    policy, learner = load_engine(config(folder, precision=dtype))
    assert next(policy.model.parameters()).dtype == getattr(torch, dtype)
    assert all(p.dtype == torch.float32 for p in learner.trained.values())
    rows = [((1, 2, 3), (4, 5, 6, 7))]
    before = policy.score(rows, 1.0)[0]
    sample = Sample(*rows[0], mask=(True,) * 4, behaviour_logp=tuple(before.tolist()), advantage=1.0)
    for _ in range(8):  # warm-up, and bfloat16's coarse steps
        learner.update([sample], Grpo(clip_high=10.0), 1.0)
    after = policy.score(rows, 1.0)[0]
    assert after.sum() > before.sum() + 0.01
    running = episodes(policy, 4)
    policy.session().run(running, Library(), 1.0, seed=0)
    assert all(e.state is State.DONE for e in running)


def test_initial_lora_weights_follow_the_seed_and_leave_global_randomness_alone():
    def initial(seed: int) -> dict[str, torch.Tensor]:
        model = qwen2()
        torch.manual_seed(9)
        choose_trained(model, PolicyConfig(lora_rank=2), seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(9)))
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    one, same, other = initial(1), initial(1), initial(2)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_model_folders_that_cannot_be_used_are_named(folder, tmp_path):
    def refused(path: Path | str, expected: str) -> None:
        with pytest.raises(ModelError, match=expected) as caught:
            load_policy(PolicyConfig(path=str(path), device="cpu"))
        assert "\n" not in str(caught.value)

    refused(tmp_path / "none", "no such model folder")
    refused("./none", "no such model folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, r"no config\.json")
    (empty / "config.json").write_text((folder / "config.json").read_text())
    refused(empty, r"no weights; expected \*\.safetensors")
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x04K\x00.")
    refused(empty, r"pickled \(pytorch_model\.bin\); expected \*\.safetensors")
    (empty / "model.safetensors").write_bytes(b"nonsense")
    refused(empty, "no usable causal language model")
    weights = load_file(folder / "model.safetensors")
    lacking = {name: value for name, value in weights.items() if "mlp.up" not in name}
    save_file(lacking, empty / "model.safetensors", {"format": "pt"})
    refused(empty, "the weights lack model.layers.0.mlp.up_proj.weight")
    save_file(weights, empty / "model.safetensors", {"format": "pt"})
    refused(empty, "tokenizer")
    (empty / "config.json").write_text('{"model_type": "of-nobody"}')
    refused(empty, "no usable causal language model")


def test_a_tokenizer_that_the_model_does_not_know_is_refused(folder, tmp_path):
    made = shutil.copytree(folder, tmp_path / "small")
    llama(vocab_size=20).save_pretrained(made)
    with pytest.raises(ModelError, match=r"its tokenizer has an id [0-9]+, its model 20 tokens"):
        load_policy(config(made).policy)


def test_special_tokens_that_are_never_written_may_lack_a_row(folder, tmp_path):
    made = shutil.copytree(folder, tmp_path / "image")
    tokenizer = load_policy(config(folder).policy).codec.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(str(made))
    assert len(tokenizer) == VOCABULARY + 1
    policy = load_policy(config(made).policy)
    assert max(policy.codec.encode("w1 <image_soft_token> w2")) < VOCABULARY


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_bfloat16_models_load_and_score_near_float32(name, tmp_path):
    MAKERS[name]().save_pretrained(str(tmp_path))
    rows = [(s.prompt, s.tokens) for s in samples()]
    scores = {}
    for dtype in ("float32", "bfloat16"):
        model, _ = load_model(PolicyConfig(path=str(tmp_path), precision=dtype, device="cpu"))
        assert model.dtype == getattr(torch, dtype)
        scores[dtype] = torch.cat(LocalPolicy(model, codec=None).score(rows, 1.0))
    assert (scores["float32"] - scores["bfloat16"]).abs().mean() < 0.1

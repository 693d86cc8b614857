"""Model folders written from a policy and from checkpoints."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rexrag.config.algorithms import Grpo
from rexrag.config.schema import PolicyConfig
from rexrag.engine.export import export_model
from rexrag.engine.loading import (
    load_engine,
    load_policy,
)
from tests.engine.learning.test_learner import samples
from tests.engine.sampling.test_policy import config


@pytest.mark.parametrize("change", [{}, {"lora_rank": 4}])
def test_an_exported_model_scores_like_the_trained_one(folder, tmp_path, change):
    policy, learner = load_engine(config(folder, **change))
    learner.config = learner.config.model_copy(update={"lr": 0.01})
    rows = [(s.prompt, s.tokens) for s in samples()]
    start = policy.score(rows, 1.0)
    for _ in range(3):
        learner.update([dataclasses.replace(s, advantage=1.0) for s in samples()], Grpo(), 1.0)
    export_model(learner.model, policy.codec, tmp_path / "out")
    loaded = load_policy(PolicyConfig(path=str(tmp_path / "out"), device="cpu"))
    trained, again = policy.score(rows, 1.0), loaded.score(rows, 1.0)
    assert torch.allclose(torch.cat(trained), torch.cat(again), atol=1e-4)
    assert not torch.allclose(torch.cat(trained), torch.cat(start), atol=0.01)
    assert loaded.codec.encode("w1 w2") == policy.codec.encode("w1 w2")


@pytest.mark.parametrize("change", [{"lora_rank": 2}, {}])
def test_a_local_checkpoint_is_exported_as_a_model(folder, tmp_path, change):
    """A LoRA is merged into its base; moments are no weights of the model."""
    from rexrag.config.files import dump_toml
    from rexrag.verl.export import export

    settings = config(folder, **change)
    policy, learner = load_engine(settings)
    learner.config = learner.config.model_copy(update={"lr": 0.01})
    for _ in range(2):
        learner.update([dataclasses.replace(s, advantage=1.0) for s in samples()], Grpo(), 1.0)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    learner.save(checkpoint)
    policy.codec.tokenizer.save_pretrained(checkpoint)
    (tmp_path / "run" / "config.toml").write_text(dump_toml(settings))
    facts = export(tmp_path / "run", tmp_path / "out")
    loaded = load_policy(PolicyConfig(path=str(tmp_path / "out"), device="cpu"))
    assert facts["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    rows = [(s.prompt, s.tokens) for s in samples()]
    trained, again = policy.score(rows, 1.0), loaded.score(rows, 1.0)
    assert torch.allclose(torch.cat(trained), torch.cat(again), atol=1e-4)

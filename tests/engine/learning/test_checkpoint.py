"""Checkpoints of the learner: a resume is bit for bit the same, and what does not fit changes nothing."""

from __future__ import annotations

import pytest
import torch

from rexrag.engine.learning.checkpoint import full_weights
from rexrag.engine.learning.learner import LocalLearner
from rexrag.engine.loading import choose_trained
from rexrag.errors import CheckpointError
from tests.engine.learning.test_learner import GRPO, VARIANTS, learner, samples
from tests.support.scripted import llama, qwen2


@pytest.mark.parametrize("policy", VARIANTS, ids=["all", "lora", "last"])
def test_two_and_two_updates_equal_four_bit_for_bit(policy, tmp_path):
    options = {"minibatches": 2, "warmup_steps": 3, "weight_decay": 0.01, "micro_tokens": 60}

    def fresh() -> LocalLearner:
        model = qwen2()
        choose_trained(model, policy, seed=1)
        return learner(model, seed=5, grad_clip=1.0, **options)

    straight, first, second = fresh(), fresh(), fresh()
    steps = [samples(12, seed=i) for i in range(4)]
    expected = [straight.update(rows, GRPO, 1.0) for rows in steps]
    found = [first.update(rows, GRPO, 1.0) for rows in steps[:2]]
    first.save(tmp_path / "checkpoint")
    assert not [f for f in (tmp_path / "checkpoint").iterdir() if f.suffix not in (".safetensors", ".json")]
    second.load(tmp_path / "checkpoint")
    found += [second.update(rows, GRPO, 1.0) for rows in steps[2:]]
    assert expected == found
    assert all(torch.equal(p, second.trained[name]) for name, p in straight.trained.items())
    assert second.progress.updates == 8 and second.progress.steps == 4


def test_a_checkpoint_of_all_weights_is_a_hugging_face_model(tmp_path):
    trainer = learner(qwen2(), seed=5)
    trainer.update(samples(), GRPO, 1.0)
    trainer.save(tmp_path)
    again = type(trainer.model).from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(p, full_weights(again)[n]) for n, p in full_weights(trainer.model).items())


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    trainer = learner()
    trainer.update(samples(), GRPO, 1.0)
    trainer.save(tmp_path / "good")
    wider = learner(qwen2(intermediate_size=64))
    before = {name: p.clone() for name, p in wider.trained.items()}
    with pytest.raises(CheckpointError, match="mlp"):
        wider.load(tmp_path / "good")
    assert all(torch.equal(p, before[name]) for name, p in wider.trained.items())
    with pytest.raises(CheckpointError, match="other parameters"):
        learner(llama()).load(tmp_path / "good")
    with pytest.raises(CheckpointError, match="no finished learner checkpoint"):
        learner().load(tmp_path / "nothing")
    (tmp_path / "good" / "optimizer.safetensors").write_bytes(b"\x80\x04K\x00.")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        learner().load(tmp_path / "good")
    for text in ("{}", "not json", '{"format": "other", "generator": ""}'):
        (tmp_path / "good" / "learner.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"learner\.json"):
            learner().load(tmp_path / "good")

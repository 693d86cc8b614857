"""Scores of a policy, and a policy and learner built from a model folder, driving real episodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rexrag.agent.episode import Episode
from rexrag.config.files import parse_config
from rexrag.config.schema import AgentConfig, Config, PolicyConfig
from rexrag.engine.attention import use_packed_attention
from rexrag.engine.learning.packing import pack_rows
from rexrag.engine.loading import (
    load_engine,
    load_policy,
)
from rexrag.engine.sampling import policy as policy_module
from rexrag.engine.sampling.policy import LocalPolicy
from rexrag.errors import ConfigError, ModelError
from rexrag.training.components import check_window
from rexrag.types import Document, Origin, Question
from tests.engine.learning.test_learner import naive_logps, samples
from tests.engine.sampling.test_sampler import largest_error
from tests.support.scripted import SIZES, Echo, Script, prompts, qwen2, spread


def test_scores_under_autocast_are_what_the_learner_starts_from(folder: Path) -> None:
    policy, learner = load_engine(config(folder, precision="bfloat16"))
    own = LocalPolicy(learner.model, policy.codec, autocast=True)
    rows = [([1, 2, 3], [4 + i % 20 for i in range(60)])]
    with torch.autocast("cpu", torch.bfloat16):
        (pack,) = pack_rows(rows, [0], 8192)
        expected = pack.logps(learner.model, 1.0)
    assert torch.equal(own.score(rows, 1.0)[0], expected.detach())
    assert not torch.equal(own.score(rows, 1.0)[0], policy.score(rows, 1.0)[0])


class Library:
    digest = "library"

    def search(self, queries, topk):
        return [[Document(str(i), f'"w{i}"\nw{i} w{i + 1}') for i in range(topk)] for _ in queries]


def config(folder: Path, **policy: object) -> Config:
    return parse_config({"policy": {"path": str(folder), "device": "cpu", **policy}, "seed": 3})


def question(i: int) -> Question:
    return Question(id=str(i), text=f"w{i} w{i + 1}?", answers=(f"w{i}",))


def episodes(policy: LocalPolicy, n: int = 24) -> list[Episode]:
    agent = AgentConfig(turn_tokens=40, evidence_tokens=20, total_tokens=400, search_turns=3)
    return [Episode(question(i // 4), policy.codec, agent, topk=2) for i in range(n)]


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_scores_are_log_probs_of_a_full_forward(model, temperature, monkeypatch):
    monkeypatch.setattr(policy_module, "SCORE_TOKENS", 60)
    policy = LocalPolicy(model, codec=None)
    rows = [*samples(14), dataclasses.replace(samples(1)[0], tokens=())]
    scores = policy.score([(row.prompt, row.tokens) for row in rows], temperature)
    assert [len(score) for score in scores] == [len(row.tokens) for row in rows]
    with torch.no_grad():
        for row, score in zip(rows, scores, strict=True):
            assert score.dtype == torch.float32 and not score.requires_grad
            assert torch.allclose(score, naive_logps(model, row, temperature or 1.0), atol=1e-5)
    assert policy.score([], 1.0) == []


def test_scores_of_a_windowed_model_look_back_as_far_as_the_model_does():
    model = qwen2(use_sliding_window=True, sliding_window=4, max_window_layers=0)
    use_packed_attention(model)
    # Responses of two tokens feed one token after a shared prompt; longer ones feed several.
    rows = [((1, 2, 3, 4, 5, 6, 7), tuple(range(9, 9 + size))) for size in (1, 2, 5, 9)] + [
        ((8,) * 9, (3, 4))
    ]
    scores = LocalPolicy(model, codec=None).score(rows, 1.0)
    with torch.no_grad():
        for (prompt, response), score in zip(rows, scores, strict=True):
            ids = torch.tensor([[*prompt, *response]])
            logp = model(ids, use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            assert torch.allclose(score, logp.gather(1, ids[0, len(prompt) :, None])[:, 0], atol=1e-5)


def test_rollouts_of_real_episodes_are_scored_as_they_were_sampled(folder):
    policy = load_policy(PolicyConfig(path=str(folder), device="cpu"))
    running = episodes(policy)
    session = policy.session()
    session.run(running, Library(), 1.0, seed=1)
    probes = [e.fork(policy.codec.encode("<think> w1 w2"), 0) for e in running]
    session.run(probes, Library(), 1.0, seed=2)
    session.close()
    rollouts = [e.rollout() for e in running + probes]
    assert any(r.answer is not None for r in rollouts)
    assert {o for r in rollouts for o in r.origins} == set(Origin)
    scores = policy.score([(r.prompt, r.tokens) for r in rollouts], 1.0)
    for rollout, score in zip(rollouts, scores, strict=True):
        ours = torch.tensor(rollout.origins) <= int(Origin.CUE)
        assert torch.allclose(score[ours], torch.tensor(rollout.logps)[ours], atol=1e-5)


def test_a_window_too_short_for_a_rollout_is_refused(folder):
    policy = load_policy(config(folder).policy)
    fits, longer = (
        parse_config({}, [f"policy.path={folder}", f"agent.total_tokens={tokens}"]) for tokens in (512, 513)
    )
    check_window(policy, fits)
    policy.model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    assert policy.window is None, "scaled positions reach further"
    policy.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ConfigError, match=r"agent.total_tokens = 513: .* reads 512 tokens at most"):
        check_window(policy, longer)


def test_an_architecture_with_other_logits_is_refused():
    model = qwen2()
    model.register_forward_hook(lambda *args: args[2].__setitem__("logits", args[2]["logits"].tanh()))
    with pytest.raises(ModelError, match="not supported by the local engine"):
        use_packed_attention(model)


def built(kind: str):
    """A small random model of an architecture that the library knows."""
    sizes = {**SIZES, "head_dim": 8}
    if kind == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4}
    elif kind == "gpt_oss":
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    return spread(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "mistral", "qwen3", "gemma", "phi3", "smollm3"])
def test_other_architectures_run_unchanged(kind):
    model = built(kind)
    use_packed_attention(model)
    rows = samples(6)
    policy = LocalPolicy(model, codec=None)
    scores = policy.score([(row.prompt, row.tokens) for row in rows], 1.0)
    with torch.no_grad():
        for row, score in zip(rows, scores, strict=True):
            assert torch.allclose(score, naive_logps(model, row), atol=1e-5)
    running = [Script(prompt) for prompt in prompts(3)]
    policy.session().run(running, Echo(), 1.0, 0)
    assert largest_error(model, running) < 1e-5


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("cohere", "other logits"), ("bloom", "packed attention")],
)
def test_architectures_that_attend_or_score_otherwise_are_refused(kind, reason):
    with pytest.raises(ModelError, match=reason):
        use_packed_attention(built(kind))

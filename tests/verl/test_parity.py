"""The same rollouts give the same streams, loss and gradient norm locally and through verl, in float32."""

from __future__ import annotations

import importlib
import io
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
import zstandard
from safetensors.torch import load_file

from rexrag.config.files import load_config
from rexrag.data.world.generator import World
from rexrag.engine.loading import load_engine
from rexrag.method.objective import aggregation_normalizer, clipped_surrogate
from rexrag.method.probing import with_probes
from rexrag.training.components import load_cues
from rexrag.training.step import correct_groups, scorer
from rexrag.types import Origin, Probe, Rollout, RolloutGroup, StopReason
from tests.verl.conftest import needs_verl

pytestmark = [pytest.mark.verl, needs_verl, pytest.mark.filterwarnings("ignore")]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def verl_side(run):
    """(config, metrics row, rollouts as logged, streams as verl trained on them by response) of step 1."""
    config = load_config(run / "config.toml")
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    with zstandard.open(io.BytesIO((run / "rollouts.jsonl.zst").read_bytes()), "rt") as file:
        traces = [trace for trace in map(json.loads, file) if trace["step"] == 1]
    flat = load_file(run / "updates" / "step-1.safetensors")
    streams = {}
    for i in {name.split("/")[0] for name in flat}:
        one = {name.split("/")[1]: value for name, value in flat.items() if name.startswith(f"{i}/")}
        if one["response_mask"].any():
            streams[tuple(one["responses"].tolist())] = one
    return config, row, traces, streams


@pytest.fixture(scope="module")
def local_side(verl_side):
    """The same rollouts, scored, filtered, corrected and learned from by the local engine."""
    config, _, traces, _ = verl_side
    policy, learner = load_engine(config)
    trie = load_cues(config, policy.codec)
    prompts = {
        question.text: tuple(policy.codec.prompt(_prompt(config, question.text)))
        for question in World(config.data.world_seed, config.data.world_people).questions(
            "train", config.data.world_questions
        )
    }
    kinds = {kind: sorted((t for t in traces if t["kind"] == kind), key=lambda t: t["index"])
             for kind in ("base", "probe")}  # fmt: skip

    def rollouts(kind):
        chosen = kinds[kind]
        pairs = [(prompts[t["question"]["text"]], t["tokens"]) for t in chosen]
        scored = policy.score(pairs, config.agent.temperature)
        return [_rollout(t, prompt, logp) for t, (prompt, _), logp in zip(chosen, pairs, scored, strict=True)]

    base = rollouts("base")
    by_group = {}
    for trace, rollout in zip(kinds["base"], base, strict=True):
        by_group.setdefault(trace["group"], []).append(rollout)
    drawn = [RolloutGroup(members[0].question, tuple(members)) for members in by_group.values()]
    probes = [
        Probe(rollout, base[t["parent"]], t["cut"], t["cue"], t["origins"].count(int(Origin.CUE)))
        for t, rollout in zip(kinds["probe"], rollouts("probe"), strict=True)
    ]
    groups = with_probes(drawn, probes)
    corrected = correct_groups(groups, config, trie, torch.Generator(), scorer(policy))
    scored = policy.score([(s.prompt, s.tokens) for s in corrected.samples], config.agent.temperature)
    learned = learner.update(corrected.samples, config.algorithm, config.agent.temperature)
    return SimpleNamespace(corrected=corrected, kinds=kinds, learned=learned, logps=scored)


def _prompt(config, text):
    from rexrag.agent.prompts import render_prompt

    return render_prompt(config.agent.template, text)


def _rollout(trace, prompt, logp):
    from rexrag.data.questions import Question

    model = torch.tensor([o in (Origin.POLICY, Origin.CUE) for o in trace["origins"]])
    question = trace["question"]
    return Rollout(
        question=Question(question["id"], question["text"], tuple(question["answers"])),
        prompt=prompt, tokens=tuple(trace["tokens"]), origins=tuple(trace["origins"]),
        logps=tuple(torch.where(model, logp, 0.0).tolist()), turns=(), stop=StopReason(trace["stop"]),
        answer=trace["answer"], reward=trace["reward"], em=trace["em"], correct=trace["correct"],
    )  # fmt: skip


def test_the_filter_keeps_the_same_probes(verl_side, local_side):
    kept = [probe.kept for probe in local_side.corrected.probes]
    assert kept == [t["kept"] for t in local_side.kinds["probe"]]
    assert 0 < sum(kept) < len(kept)


def test_streams_and_ratios_agree(verl_side, local_side):
    streams = verl_side[3]
    assert len(streams) == len({s.tokens for s in local_side.corrected.samples})
    ratios = []
    for sample, logp in zip(local_side.corrected.samples, local_side.logps, strict=True):
        verl = streams[sample.tokens]
        mask = torch.tensor(sample.mask)
        assert verl["response_mask"].bool().equal(mask)
        ours = (logp - torch.tensor(sample.behaviour_logp))[mask].exp()
        theirs = (logp - verl["old_log_probs"])[mask].exp()
        torch.testing.assert_close(theirs, ours, **CLOSE)
        advantage = torch.full((int(mask.sum()),), sample.advantage)
        torch.testing.assert_close(verl["advantages"][mask], advantage, **CLOSE)
        ratios.append(ours)
    assert torch.cat(ratios).std() > 1e-3, "the mixture moves ratios, so that agreeing means something"


def test_loss_and_gradient_norm_agree(verl_side, local_side):
    row = verl_side[1]
    assert abs(row["loss"]) > 1e-3 and row["grad_norm"] > 1e-2, "there is something to compare"
    for name in ("loss", "grad_norm", "kl"):
        assert row[name] == pytest.approx(local_side.learned[name], rel=1e-5, abs=1e-5), name


@pytest.fixture(scope="module")
def verl_loss():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("verl.trainer.ppo.core_algos").compute_policy_loss_vanilla


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_verl_s_own_loss_is_ours(verl_loss, aggregation, weighted, held):
    """Through the mapping: clip ranges, no dual clip, aggregation, weights; ratios far outside the clips."""
    from rexrag.verl.mapping import AGGREGATIONS, NO_DUAL_CLIP

    generator = torch.Generator().manual_seed(0)
    shape = (7, 11)
    logp = torch.randn(shape, generator=generator).requires_grad_()
    behaviour = torch.randn(shape, generator=generator)
    advantages = torch.randn(shape[0], generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[3] = False
    weight = torch.rand(shape, generator=generator) if weighted else None
    normalizer = aggregation_normalizer(mask, aggregation)
    truncated = torch.rand(shape, generator=generator) < 0.4 if held else None
    ours, _ = clipped_surrogate(
        logp, behaviour, advantages, mask, 0.2, 0.28,
        weight=weight, truncated=truncated, aggregation=aggregation,
    )  # fmt: skip
    if truncated is not None:
        weight = torch.ones(shape) if weight is None else weight
        weight = torch.where(truncated, -weight, weight)
        verl_loss = importlib.import_module("rexrag.verl.loss").policy_loss
    (gradient,) = torch.autograd.grad(ours, logp)
    config = _ActorConfig(
        clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=NO_DUAL_CLIP,
        global_batch_info={"dp_size": 1, "batch_num_tokens": int(mask.sum()),
                           "global_batch_size": int(normalizer), "loss_scale_factor": None},
    )  # fmt: skip
    theirs, _ = verl_loss(
        behaviour, logp, advantages[:, None].expand(shape), mask, AGGREGATIONS[aggregation], config, weight
    )
    torch.testing.assert_close(theirs, ours, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(theirs, logp)[0], gradient, **CLOSE)


class _ActorConfig(SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)

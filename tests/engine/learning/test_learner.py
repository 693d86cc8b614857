"""The learner: additive micro-batches, who is trained, and a resume that is bit for bit the same."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rexrag.config.algorithms import Grpo, Shared
from rexrag.config.schema import LearnerConfig, PolicyConfig
from rexrag.engine.attention import token_logps, use_packed_attention
from rexrag.engine.learning.learner import LocalLearner, refresh
from rexrag.engine.loading import choose_trained
from rexrag.errors import ConfigError
from rexrag.types import Sample, Segment
from tests.support.scripted import MAKERS, VOCABULARY, llama, qwen2

Grads = dict[str, torch.Tensor]
GRPO = Grpo()


def packed(model):
    use_packed_attention(model)
    return model


def learner(model=None, **options) -> LocalLearner:
    settings = {"grad_clip": 1e9, "warmup_steps": 0, "lr": 1e-3}
    settings |= {k: options.pop(k) for k in list(options) if k in LearnerConfig.model_fields}
    return LocalLearner(packed(model or qwen2()), LearnerConfig(**settings), **options)


def samples(n: int = 9, seed: int = 0, groups: int = 3, streams: bool = True) -> list[Sample]:
    """Random rows in groups that share a prompt; some advantages are zero."""
    rng = random.Random(seed)
    heads = [tuple(rng.choices(range(VOCABULARY), k=rng.randint(2, 9))) for _ in range(groups)]
    rows = []
    for i in range(n):
        size = rng.choice([1, 2, 5, 13])
        rows.append(
            Sample(
                prompt=heads[i % groups],
                tokens=tuple(rng.choices(range(VOCABULARY), k=size)),
                mask=tuple(rng.random() < 0.7 for _ in range(size)),
                behaviour_logp=tuple(rng.uniform(-9, 0) for _ in range(size)),
                advantage=rng.choice([-1.3, 0.0, 0.4, 1.0]),
                weight=tuple(rng.uniform(0.2, 2) for _ in range(size)) if streams and i % 2 else (),
                truncated=tuple(rng.random() < 0.5 for _ in range(size)) if streams and i % 3 else (),
                segment=tuple(rng.randrange(len(Segment)) for _ in range(size)),
            )
        )
    return rows


def near_policy(model, rows: Sequence[Sample], noise: float = 0.3) -> list[Sample]:
    """The rows with behaviour log-probs near the model's own, so that ratios lie around the clip range."""
    rng = random.Random(1)
    with torch.no_grad():
        own = [naive_logps(model, row) for row in rows]
    return [
        dataclasses.replace(row, behaviour_logp=tuple(x + rng.uniform(-noise, noise) for x in logp.tolist()))
        for row, logp in zip(rows, own, strict=True)
    ]


def gradients(trainer: LocalLearner, rows, algorithm=GRPO, temperature=1.0) -> tuple[Grads, dict[str, float]]:
    """The gradient of one update that moves nothing."""
    found: Grads = {}
    step = trainer.optimizer.step

    def keep(*_: object) -> None:
        found.update({name: p.grad.clone() for name, p in trainer.trained.items() if p.grad is not None})

    trainer.optimizer.step = keep
    try:
        metrics = trainer.update(rows, algorithm, temperature)
    finally:
        trainer.optimizer.step = step
    return found, metrics


def distance(a: Grads, b: Grads) -> float:
    """Largest difference relative to the largest gradient."""
    assert a.keys() == b.keys()
    scale = max(float(g.abs().max()) for g in a.values()) or 1.0
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a) / scale


def naive_logps(model, row: Sample, temperature: float = 1.0) -> torch.Tensor:
    ids = torch.tensor([[*row.prompt, *row.tokens]])
    logits = model(ids, use_cache=False).logits[0] / temperature
    start = len(row.prompt)
    return logits[start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])[:, 0]


def naive_loss(model, rows: Sequence[Sample], algorithm: Shared, temperature: float) -> torch.Tensor:
    """PPO's surrogate token by token, one row at a time, with the model's own forward."""
    total = torch.zeros((), dtype=torch.float64)
    tokens = sum(sum(row.mask) for row in rows)
    active = sum(any(row.mask) for row in rows)
    for row in rows:
        own = torch.zeros((), dtype=torch.float64)
        for t, logp in enumerate(naive_logps(model, row, temperature)):
            if not row.mask[t]:
                continue
            ratio = (logp - row.behaviour_logp[t]).exp()
            low, high = 1 - algorithm.clip_low, 1 + algorithm.clip_high
            value = torch.minimum(ratio * row.advantage, ratio.clamp(low, high) * row.advantage)
            if row.truncated and row.truncated[t]:
                value = ratio.detach().clamp(max=1.0) * logp * row.advantage
            own = own + value * (row.weight[t] if row.weight else 1.0)
        total = total - own
    return total / (tokens if algorithm.aggregation == "token-mean" else active)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-sum"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_gradient_is_that_of_a_naive_loop_in_float64(name, aggregation):
    algorithm = Grpo(aggregation=aggregation, clip_low=0.1, clip_high=0.15)
    reference = MAKERS[name]().double()
    rows = near_policy(reference, samples(24))
    loss = naive_loss(reference, rows, algorithm, 0.8)
    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for double, tolerance in ((True, 1e-6), (False, 1e-4)):
        # token_logps computes in float32 whatever the weights are.
        trainer = learner(MAKERS[name]().double() if double else MAKERS[name](), micro_tokens=40)
        found, metrics = gradients(trainer, rows, algorithm, 0.8)
        assert metrics["micro_batches"] > 1
        assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
        assert distance(expected, found) < tolerance


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(micro_tokens=st.integers(1, 400), order=st.randoms(use_true_random=False), seed=st.integers(0, 50))
def test_split_order_and_padding_change_nothing(micro_tokens, order, seed):
    rows = near_policy(packed(qwen2()), samples(seed=seed))
    whole, metrics = gradients(learner(micro_tokens=10_000), rows)
    # A longer row without a trained token would widen every padded stream.
    shuffled = [*rows, dataclasses.replace(rows[0], tokens=(1,) * 50, mask=(False,) * 50,
                behaviour_logp=(0.0,) * 50, advantage=1.0, weight=(), truncated=(), segment=())]  # fmt: skip
    order.shuffle(shuffled)
    parts, other = gradients(learner(micro_tokens=micro_tokens), shuffled)
    if not whole:
        assert not parts and metrics["updates"] == other["updates"] == 0
        return
    assert distance(whole, parts) < 1e-5
    same = ("loss", "grad_norm", "trained_tokens", "ratio/all", "clip/all")
    assert all(other[key] == pytest.approx(metrics[key], rel=1e-4, abs=1e-6) for key in same)


def test_masked_tokens_have_no_gradient_whatever_they_are_weighed():
    rows = [dataclasses.replace(row, advantage=1.0) for row in samples(6)]

    def scramble(row: Sample) -> Sample:
        pairs = list(zip(row.mask, row.behaviour_logp, strict=True))
        return dataclasses.replace(
            row,
            behaviour_logp=tuple(b if m else -math.inf for m, b in pairs),
            weight=tuple(w if m else 1e30 for m, w in zip(row.mask, row.weight, strict=True))
            if row.weight
            else (),
        )

    plain, _ = gradients(learner(), rows)
    scrambled, metrics = gradients(learner(), [scramble(row) for row in rows])
    assert all(torch.equal(plain[name], scrambled[name]) for name in plain)
    assert metrics["nonfinite_tokens"] == 0


def test_a_token_that_follows_the_last_trained_one_does_not_matter():
    row = samples(1)[0]
    short = dataclasses.replace(row, tokens=(3, 4, 5), mask=(True, True, False), behaviour_logp=(-1.0,) * 3,
                                advantage=1.0, weight=(), truncated=(), segment=())  # fmt: skip
    other = dataclasses.replace(short, tokens=(3, 4, 9))
    a, _ = gradients(learner(), [short])
    b, _ = gradients(learner(), [other])
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_rows_without_advantage_are_counted_but_not_run():
    rows = [dataclasses.replace(row, mask=(True,) * len(row.tokens)) for row in samples(8)]
    quiet = [dataclasses.replace(row, advantage=0.0) for row in rows]
    loud = [dataclasses.replace(row, advantage=1.0) for row in rows]
    alone, few = gradients(learner(), loud)
    diluted, many = gradients(learner(), loud + quiet)
    assert few["rows_skipped"] == 0 and many["rows_skipped"] == 8
    assert many["trained_tokens"] == 2 * few["trained_tokens"]
    assert distance({name: grad / 2 for name, grad in alone.items()}, diluted) < 1e-6
    _, with_kl = gradients(learner(reference=True), loud + quiet, Grpo(kl=0.1))
    assert with_kl["rows_skipped"] == 0


def test_a_step_without_a_trainable_sample_moves_nothing():
    trainer = learner(weight_decay=0.1)
    trainer.update(samples(), GRPO, 1.0)
    before = {name: p.clone() for name, p in trainer.trained.items()}
    quiet = [dataclasses.replace(row, advantage=0.0) for row in samples()]
    for rows in (quiet, []):
        metrics = trainer.update(rows, GRPO, 1.0)
        assert metrics["updates"] == 0 and metrics["updates_skipped"] >= 1
        assert all(torch.equal(p, before[name]) for name, p in trainer.trained.items())


def test_the_number_of_updates_is_fixed_and_every_row_is_used_once():
    for rows in (samples(6), samples(13), samples(40)):
        rows = [dataclasses.replace(row, advantage=1.0) for row in rows]
        metrics = learner(minibatches=3).update(rows, GRPO, 1.0)
        assert metrics["updates"] + metrics["updates_skipped"] == 3
        assert metrics["rows"] == len(rows)
        assert metrics["trained_tokens"] == sum(sum(row.mask) for row in rows)


def test_base_and_probe_rows_mix_in_the_mini_batches():
    trainer = learner(minibatches=2)
    base, probes = samples(20, seed=1), samples(20, seed=2)
    seen: list[list[bool]] = []
    trainer._minibatch = lambda rows, *_: seen.append([row in probes for row in rows])
    trainer.update(base + probes, GRPO, 1.0)
    assert all(3 < sum(batch) < 17 for batch in seen)
    again: list[list[bool]] = []
    trainer._minibatch = lambda rows, *_: again.append([row in probes for row in rows])
    trainer.update(base + probes, GRPO, 1.0)
    assert again != seen


def test_the_rate_warms_up_over_steps_and_stays():
    trainer = learner(warmup_steps=4, lr=1e-4, minibatches=2)
    rates = [trainer.update(samples(), GRPO, 1.0)["lr"] for _ in range(6)]
    assert rates == pytest.approx([0.25e-4, 0.5e-4, 0.75e-4, 1e-4, 1e-4, 1e-4])


def test_the_gradient_is_clipped_and_its_norm_reported_before():
    rows = [dataclasses.replace(row, advantage=5.0) for row in samples()]
    free, metrics = gradients(learner(), rows)
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in free.values()))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    clipped, metrics = gradients(learner(grad_clip=norm / 10), rows)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert distance({name: grad / 10 for name, grad in free.items()}, clipped) < 1e-4


def test_a_gradient_that_is_not_finite_is_counted_and_not_applied():
    trainer = learner()
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = math.inf
    before = {name: p.clone() for name, p in trainer.trained.items()}
    row = dataclasses.replace(samples(1)[0], mask=(True,) * len(samples(1)[0].tokens), advantage=1.0)
    metrics = trainer.update([row], GRPO, 1.0)
    assert metrics["nonfinite_updates"] == trainer.progress.nonfinite_updates == 1
    assert metrics["updates"] == trainer.progress.updates == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.trained.items())


def test_segments_are_reported_apart():
    model = packed(qwen2())
    rows = near_policy(model, [dataclasses.replace(r, advantage=1.0) for r in samples(30, streams=False)])
    _, metrics = gradients(learner(), rows)
    with torch.no_grad():
        logps = [naive_logps(model, row) for row in rows]
    for segment in Segment:
        ratios = [
            math.exp(logp - row.behaviour_logp[t])
            for row, own in zip(rows, logps, strict=True)
            for t, logp in enumerate(own.tolist())
            if row.mask[t] and row.segment[t] == segment
        ]
        name = segment.name.lower()
        assert metrics[f"ratio/{name}"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
        assert metrics[f"clip/{name}"] == pytest.approx(sum(r > 1.2 for r in ratios) / len(ratios))
    assert 0 < metrics["clip/all"] < 1


def test_kl_pulls_towards_the_weights_of_the_start():
    trainer = learner(reference=True, lr=1e-2)
    algorithm = Grpo(kl=1.0)
    rows = [dataclasses.replace(row, mask=(True,) * len(row.tokens)) for row in samples()]
    assert trainer.update(rows, algorithm, 1.0)["kl"] == pytest.approx(0.0, abs=1e-6)
    # Pull and push differ: with advantages of zero, only the pull is left.
    quiet = [dataclasses.replace(row, advantage=0.0) for row in rows]
    for group in trainer.optimizer.param_groups:
        group["betas"] = (0.0, 0.95)
    kls = [trainer.update(quiet, algorithm, 1.0)["kl"] for _ in range(12)]
    assert kls[0] > 1e-3 and kls[-1] < 0.5 * kls[0]
    with pytest.raises(ConfigError, match="reference"):
        learner().update(rows, algorithm, 1.0)


def test_a_reference_that_is_not_finite_is_counted_and_pulls_at_nothing():
    trainer = learner(reference=True, lr=1e-2)
    with torch.no_grad():
        next(trainer.reference.parameters())[:] = math.nan
    rows = [dataclasses.replace(row, mask=(True,) * len(row.tokens)) for row in samples()]
    metrics = trainer.update(rows, Grpo(kl=1.0), 1.0)
    trained = sum(len(row.tokens) for row in rows)  # a row without an advantage is still pulled
    assert metrics["nonfinite_kl_tokens"] == trained > 0 and metrics["kl"] == 0.0
    assert metrics["nonfinite_tokens"] == metrics["nonfinite_updates"] == 0 and metrics["updates"] == 1
    assert all(bool(torch.isfinite(p).all()) for p in trainer.trained.values())


def test_autocast_stays_near_float32_and_keeps_float32_weights():
    rows = near_policy(packed(llama()), [dataclasses.replace(r, advantage=1.0) for r in samples(20)])
    exact, _ = gradients(learner(llama()), rows, Grpo(clip_low=1.0, clip_high=100.0))
    trainer = learner(llama(), autocast=True)
    rough, _ = gradients(trainer, rows, Grpo(clip_low=1.0, clip_high=100.0))
    flat = [torch.cat([g.flatten() for g in x.values()]) for x in (exact, rough)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98
    assert all(p.dtype == torch.float32 for p in trainer.trained.values())


def test_large_vocabularies_are_scored_in_chunks(monkeypatch):
    from rexrag.engine import attention

    rows = [dataclasses.replace(r, advantage=1.0) for r in samples(20)]
    whole, _ = gradients(learner(), rows)
    monkeypatch.setattr(attention, "CHUNK_LOGITS", 5 * VOCABULARY)
    chunked, _ = gradients(learner(), rows)
    assert distance(whole, chunked) < 1e-6
    head, hidden = torch.nn.Linear(4, VOCABULARY), torch.randn(23, 4)
    targets = torch.arange(23)
    expected = head(hidden).log_softmax(-1)[torch.arange(23), targets]
    assert torch.allclose(token_logps(head, hidden, targets, 1.0), expected)


@pytest.mark.parametrize("name", sorted(MAKERS))
@pytest.mark.parametrize("last", [1, 2])
def test_last_layers_train_alone(name, last):
    model = MAKERS[name](num_hidden_layers=3)
    choose_trained(model, PolicyConfig(train_last_layers=last), seed=0)
    trainer = learner(model)
    allowed = ("model.norm.", *(f"model.layers.{i}." for i in range(3 - last, 3)))
    assert set(trainer.trained) == {n for n, _ in model.named_parameters() if n.startswith(allowed)}
    _assert_only_trained_moves(trainer)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_lora_trains_its_adapters_alone(name):
    model, plain = MAKERS[name](), packed(MAKERS[name]())
    choose_trained(model, PolicyConfig(lora_rank=4), seed=0)
    trainer = learner(model, reference=True)
    assert trainer.trained and all("lora_" in n for n in trainer.trained)
    # A fresh adapter changes nothing, and its reference shares the frozen weights.
    rows = near_policy(plain, samples())
    with torch.no_grad():
        assert torch.allclose(naive_logps(model, rows[0]), naive_logps(plain, rows[0]), atol=1e-5)
    own, ref = dict(model.named_parameters()), dict(trainer.reference.named_parameters())
    assert all((own[n] is ref[n]) == (n not in trainer.trained) for n in own)
    _assert_only_trained_moves(trainer)
    assert trainer.update(rows, Grpo(kl=0.1), 1.0)["kl"] > 0


def _assert_only_trained_moves(trainer: LocalLearner) -> None:
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    rows = [dataclasses.replace(row, advantage=1.0) for row in samples(20)]
    for _ in range(2):  # a LoRA's A moves only once its B has
        trainer.update(rows, GRPO, 1.0)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trainer.trained), name


def test_settings_that_cannot_be_trained_are_refused():
    with pytest.raises(ConfigError, match="2 layers"):
        choose_trained(qwen2(), PolicyConfig(train_last_layers=3), seed=0)
    with pytest.raises(ConfigError, match="choose one"):
        choose_trained(qwen2(), PolicyConfig(train_last_layers=1, lora_rank=2), seed=0)


VARIANTS = [PolicyConfig(), PolicyConfig(lora_rank=3), PolicyConfig(train_last_layers=1)]


def test_the_sampler_model_follows_the_master_weights():
    model = qwen2()
    mirror = packed(qwen2()).to(torch.bfloat16)
    trainer = learner(model, mirror=mirror)
    rows = [dataclasses.replace(row, advantage=1.0) for row in samples()]
    trainer.update(rows, GRPO, 1.0)
    moved = dict(mirror.named_parameters())
    start = dict(qwen2().to(torch.bfloat16).named_parameters())
    for name, parameter in trainer.trained.items():
        assert torch.equal(moved[name], parameter.to(torch.bfloat16))
    assert any(not torch.equal(moved[name], start[name]) for name in moved)
    refresh(mirror, dict(qwen2().named_parameters()))
    assert all(torch.equal(moved[name], start[name]) for name in moved)


def test_gradient_norms_by_segment_are_those_of_its_tokens_and_nothing_moves():
    trainer = learner()
    before = {name: p.detach().clone() for name, p in trainer.trained.items()}
    rows = near_policy(trainer.model, samples(streams=False))
    norms = trainer.gradient_norms(rows, GRPO, 1.0)
    assert trainer.progress.updates == 0 and all(p.grad is None for p in trainer.trained.values())
    assert set(norms) == {segment.name.lower() for segment in Segment}
    parts = []
    for segment in Segment:
        only = [
            dataclasses.replace(
                row, mask=tuple(m and s == segment for m, s in zip(row.mask, row.segment, strict=True))
            )
            for row in rows
        ]
        share = sum(sum(row.mask) for row in only) / sum(sum(row.mask) for row in rows)
        grads, _ = gradients(trainer, only)
        parts.append({name: share * g.double() for name, g in grads.items()})  # the mean over all tokens
        own = math.sqrt(sum(float(g.square().sum()) for g in parts[-1].values()))
        assert norms[segment.name.lower()] == pytest.approx(own, rel=1e-4)
    whole, _ = gradients(trainer, rows)
    assert distance(whole, {name: sum(part[name] for part in parts) for name in whole}) < 1e-4
    assert all(torch.equal(p, before[name]) for name, p in trainer.trained.items())

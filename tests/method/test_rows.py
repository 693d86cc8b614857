"""The whole correction on real-looking batches: METHOD §4's identities 1, 3 and 5, and every switch."""

import math
from dataclasses import replace

import pytest
import torch

from rexrag.config.schema import MethodConfig
from rexrag.errors import AlphaError, CueError, CutError
from rexrag.method import CueTrie, clipped_surrogate, group_advantages
from rexrag.method.rows import Row, correct, make_samples, pad, row_of, splice, with_tail_logp
from rexrag.types import Origin, Question, Rollout, Segment, StopReason, Turn

P, C, E, N = (int(o) for o in (Origin.POLICY, Origin.CUE, Origin.EVIDENCE, Origin.NOTICE))
TRIE = CueTrie([[20, 21], [20, 22, 23], [20, 22, 24]])
CONFIG = MethodConfig(allow_large_alpha=True)


def rows(probes=True, seed=0):
    """Six base rollouts of two questions and, optionally, a probe for each question."""
    g = torch.Generator().manual_seed(seed)

    def row(origins, **kw):
        logp = (-torch.rand(len(origins), generator=g) * 3).tolist()
        logp = [v if o in (P, C) else 0.0 for v, o in zip(logp, origins, strict=True)]
        return Row((1, 2), tuple(range(3, 3 + len(origins))), tuple(origins), tuple(logp), **kw)

    base = [row([P] * (3 + i) + [E, E, N] + [P] * 2) for i in range(6)]
    kept = [
        row([P, P, E, P, C, C, P, P, E, P], cut=4, cue=0, cue_length=2),
        row([P, P, C, C, C, P], cut=2, cue=1, cue_length=3),
    ]
    groups, right = [0, 0, 0, 1, 1, 1], [True, False, False, False, False, False]
    if not probes:
        return base, groups, right
    return base + kept, [*groups, 0, 1], [*right, False, True]


def loss_and_gradient(rows_groups_right, config, trie=TRIE):
    rows_, groups, right = rows_groups_right
    batch = pad(rows_, groups, right)
    streams = correct(batch, config, trie)
    logp = (batch.policy_logp + 0.1).requires_grad_(True)
    advantages = group_advantages(batch.right.float(), batch.groups)
    loss, _ = clipped_surrogate(
        logp,
        streams.behaviour_logp,
        advantages,
        streams.mask,
        weight=streams.weight,
        truncated=streams.truncated,
    )
    return loss.detach(), torch.autograd.grad(loss, logp)[0], streams


@pytest.mark.parametrize("realignment", ["paper", "trajectory", "internalize", "none"])
@pytest.mark.parametrize("tail", ["one", "truncated", "unclipped"])
def test_without_probes_every_variant_is_plain_grpo_bit_for_bit(realignment, tail):
    config = MethodConfig(realignment=realignment, tail=tail)
    rows_, groups, right = rows(probes=False)
    loss, gradient, _ = loss_and_gradient((rows_, groups, right), config)
    batch = pad(rows_, groups, right)
    logp = (batch.policy_logp + 0.1).requires_grad_(True)
    advantages = group_advantages(batch.right.float(), batch.groups)
    plain, _ = clipped_surrogate(logp, batch.policy_logp, advantages, batch.origin == P)
    assert torch.equal(loss, plain.detach())
    assert torch.equal(gradient, torch.autograd.grad(plain, logp)[0])


@pytest.mark.parametrize("realignment", ["paper", "trajectory"])
def test_alpha_to_zero_is_the_same_limit(realignment):
    """Copies of the base rollouts dilute two probes: their gradients approach plain GRPO's."""
    base, groups, right = rows(probes=False)
    probes, probe_groups, probe_right = (x[6:] for x in rows())
    config = MethodConfig(realignment=realignment)
    gaps = []
    for copies in (4, 40, 400):
        many = (base * copies + probes, groups * copies + probe_groups, right * copies + probe_right)
        _, _, streams = loss_and_gradient(many, config)
        batch = pad(*many)
        ratio = torch.exp(batch.policy_logp - streams.behaviour_logp) * streams.weight
        gaps.append(float((ratio[:6][streams.mask[:6]] - 1).abs().max()))
        assert streams.alpha == pytest.approx(2 / (6 * copies + 2))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3


@pytest.mark.parametrize("realignment", ["paper", "trajectory", "internalize", "none"])
def test_evidence_and_notices_get_exactly_zero_gradient_whatever_they_say(realignment):
    rows_, groups, right = rows()
    noisy = [
        Row(
            r.prompt,
            tuple(20 if o in (E, N) else t for t, o in zip(r.tokens, r.origins, strict=True)),
            r.origins,
            tuple(-500.0 if o in (E, N) else v for v, o in zip(r.policy_logp, r.origins, strict=True)),
            r.cut,
            r.cue,
            r.cue_length,
        )
        for r in rows_
    ]
    config = CONFIG.model_copy(update={"realignment": realignment})
    loss, gradient, _ = loss_and_gradient((rows_, groups, right), config)
    again, noisy_gradient, _ = loss_and_gradient((noisy, groups, right), config)
    inserted = (pad(rows_, groups, right).origin == E) | (pad(rows_, groups, right).origin == N)
    assert inserted.any() and bool((gradient[inserted] == 0).all())
    assert torch.equal(loss, again) and torch.equal(gradient, noisy_gradient)


@pytest.mark.parametrize("realignment", ["paper", "trajectory", "internalize", "none"])
def test_order_and_padding_change_nothing(realignment):
    rows_, groups, right = rows()
    config = CONFIG.model_copy(update={"realignment": realignment})
    loss, gradient, _ = loss_and_gradient((rows_, groups, right), config)
    order = [7, 3, 0, 6, 5, 2, 1, 4]
    shuffled = tuple([x[i] for i in order] for x in (rows_, groups, right))
    again, moved, _ = loss_and_gradient(shuffled, config)
    assert float(again) == pytest.approx(float(loss), abs=1e-7)
    assert torch.allclose(moved, gradient[order], atol=1e-7)
    samples = make_samples(rows_, groups, correct(pad(rows_, groups, right), config, TRIE), torch.zeros(8))
    alone = make_samples(
        rows_[:7], groups[:7], correct(pad(rows_, groups, right), config, TRIE), torch.zeros(7)
    )
    assert samples[:7] == alone


def test_paper_masks_and_segments():
    *_, streams = loss_and_gradient(rows(), CONFIG)
    B, F, U, S = (int(s) for s in (Segment.BASE, Segment.PREFIX, Segment.CUE, Segment.SUFFIX))
    assert streams.segment[6, :10].tolist() == [F, F, F, F, U, U, S, S, S, S]
    assert streams.mask[6, :10].tolist() == [True, True, False, True, True, True, True, True, False, True]
    assert streams.segment[0, :8].tolist() == [B] * 8
    assert not streams.mask[0, 8:].any()
    assert streams.failure_rate == pytest.approx(5 / 6) and streams.alpha == pytest.approx(2 / 8)
    assert 0.0 < streams.ess <= 1.0


def test_cue_loss_trains_all_first_or_none_of_the_cue():
    trained = {}
    for switch in ("all", "first", "none"):
        *_, streams = loss_and_gradient(rows(), CONFIG.model_copy(update={"cue_loss": switch}))
        trained[switch] = streams.mask[7, 2:5].tolist()
    assert trained == {"all": [True] * 3, "first": [True, False, False], "none": [False] * 3}


@pytest.mark.parametrize("realignment", ["paper", "trajectory", "internalize", "none"])
def test_prefix_loss_leaves_a_probe_s_prefix_to_its_base_rollout(realignment):
    config = CONFIG.model_copy(update={"realignment": realignment})
    _, whole, streams = loss_and_gradient(rows(), config)
    _, without, masked = loss_and_gradient(rows(), config.model_copy(update={"prefix_loss": "none"}))
    prefix = streams.segment == int(Segment.PREFIX)
    prefix[:6] = False
    assert streams.mask[prefix].any() and not masked.mask[prefix].any()
    assert torch.equal(masked.mask[~prefix], streams.mask[~prefix])
    assert bool((without[prefix] == 0).all()) and torch.equal(masked.behaviour_logp, streams.behaviour_logp)
    # The others keep their direction; the mean is over fewer tokens.
    share = streams.mask.sum() / masked.mask.sum()
    assert torch.allclose(without[~prefix], whole[~prefix] * share, atol=1e-7)


def test_paper_densities_reach_the_streams():
    rows_, groups, right = rows()
    _, _, streams = loss_and_gradient((rows_, groups, right), CONFIG)
    row, alpha, z = rows_[6], 2 / 8, 5 / 6
    prefix = math.log(z) / 3
    logp = torch.tensor(row.policy_logp, dtype=torch.float64)
    probe = logp.clone()
    probe[[0, 1, 3]] -= prefix
    probe[4], probe[5] = 0.0, math.log(1 / 3)
    expected = torch.log((1 - alpha) * logp.exp() + alpha * probe.exp())
    assert torch.allclose(streams.behaviour_logp[6, :10].double(), expected, atol=1e-6)
    assert torch.allclose(
        streams.behaviour_logp[0, :3], torch.tensor(rows_[0].policy_logp[:3]) + math.log(0.75)
    )


def test_alpha_per_group_and_z_per_question():
    config = CONFIG.model_copy(update={"alpha": "group", "failure_rate": "question"})
    rows_, groups, right = rows()
    _, _, streams = loss_and_gradient((rows_[:7], groups[:7], right[:7]), config)
    logp = torch.tensor([r.policy_logp[0] for r in rows_[:7]])
    assert torch.allclose(streams.behaviour_logp[:3, 0], logp[:3] + math.log(3 / 4))
    assert torch.equal(streams.behaviour_logp[3:6, 0], logp[3:6])
    probe = float(logp[6]) - math.log(2 / 3) / 3
    expected = math.log(0.75 * math.exp(float(logp[6])) + 0.25 * math.exp(probe))
    assert float(streams.behaviour_logp[6, 0]) == pytest.approx(expected, abs=1e-6)


def test_trajectory_weights_are_one_number_a_rollout_and_recognise_spoken_cues():
    rows_, groups, right = rows()
    spoken = Row((1,), (9, 20, 21, 9), (P,) * 4, (-1.0, -2.0, -3.0, -1.0))
    rows_ = [spoken, *[Row((1,), tuple(r.tokens), r.origins, r.policy_logp) for r in rows_[1:6]]]
    probe = Row((1,), (9, 20, 21, 9), (P, C, C, P), (-1.0, -2.0, -3.0, -1.0), 1, 0, 2)
    batch = pad([*rows_, probe], [*groups[:6], 0], [*right[:6], False])
    streams = correct(batch, CONFIG.model_copy(update={"realignment": "trajectory"}), TRIE)
    r = math.exp(math.log(1 / 3) + 5.0) / (5 / 6)
    assert streams.weight[0].unique().tolist() == pytest.approx([1 / (6 / 7 + r / 7)])
    assert streams.weight[6].tolist() == pytest.approx(streams.weight[0].tolist())
    assert streams.weight[1].unique().tolist() == pytest.approx([7 / 6])
    assert torch.equal(streams.behaviour_logp, batch.policy_logp)


def test_trajectory_takes_each_group_s_alpha_and_each_question_s_z():
    rows_, groups, right = rows()
    plain = [Row((1,), tuple(r.tokens), r.origins, r.policy_logp) for r in rows_[:6]]
    probe = Row((1,), (9, 20, 21, 9), (P, C, C, P), (-1.0, -2.0, -3.0, -1.0), 1, 0, 2)
    batch = pad([*plain, probe], [*groups[:6], 0], [*right[:6], False])
    own = {"realignment": "trajectory", "alpha": "group", "failure_rate": "question"}
    weight = correct(batch, CONFIG.model_copy(update=own), TRIE).weight[:, 0]
    r = math.exp(math.log(1 / 3) + 5.0) / (2 / 3)
    assert weight[:3].tolist() == pytest.approx([4 / 3] * 3)
    assert weight[3:6].tolist() == pytest.approx([1.0] * 3)
    assert float(weight[6]) == pytest.approx(1 / (3 / 4 + r / 4))
    behind = replace(probe, last_cut=0)
    late = pad([*plain, behind], [*groups[:6], 0], [*right[:6], False])
    assert float(correct(late, CONFIG.model_copy(update=own), TRIE).weight[6, 0]) == pytest.approx(4 / 3)


QUESTION = Question("q", "Who?", ("x",))


def rollout(tokens, origins, turns, **kw):
    return Rollout(
        QUESTION,
        (1,),
        tuple(tokens),
        tuple(origins),
        tuple(-0.1 * t for t in range(len(tokens))),
        tuple(turns),
        StopReason.ANSWER,
        "y",
        0.0,
        **kw,
    )


PARENT = rollout(
    [10, 11, 12, 13, 14, 15], [P] * 6, [Turn(0, 6, "answer", "y", action_start=4, thought_end=3)]
)
PROBE = rollout(
    [10, 11, 12, 13, 20, 21, 30, 31],
    [P] * 4 + [C, C, P, E],
    [Turn(0, 8)],
    parent=0,
    cut=4,
    cue=0,
    cue_length=2,
)


def test_splice_drops_the_closing_tag_and_the_cue():
    row = splice(PROBE, PARENT)
    assert row.tokens == (10, 11, 12, 30, 31)
    assert row.origins == (P, P, P, P, E)
    assert row.cut == 3 and row.cue_length == 0
    assert row.policy_logp == pytest.approx((0.0, -0.1, -0.2, -0.6, -0.7))
    open_thought = rollout(PARENT.tokens, PARENT.origins, [Turn(0, 6, "answer", "y", action_start=4)])
    assert splice(PROBE, open_thought).tokens == (10, 11, 12, 13, 30, 31)
    with pytest.raises(CutError, match="only a probe"):
        splice(PARENT, PARENT)


def test_internalize_tails():
    row = splice(PROBE, PARENT)
    own = with_tail_logp(row, [-9.0] * 5)
    assert own.policy_logp == pytest.approx((0.0, -0.1, -0.2, -9.0, -0.7))
    base = [row_of(PARENT, CONFIG)] * 6
    batch = pad([*base, row], [0] * 7, [False] * 7)
    truncated = correct(batch, MethodConfig(realignment="internalize", tail="truncated"), TRIE)
    assert truncated.truncated[6].tolist() == [False, False, False, True, True, True]
    assert not truncated.truncated[:6].any()
    one = correct(batch, MethodConfig(realignment="internalize"), TRIE)
    assert not one.truncated.any() and torch.equal(one.behaviour_logp, batch.policy_logp)
    assert one.mask[6].tolist() == [True, True, True, True, False, False]


def test_row_of_keeps_every_token_as_sampled():
    row = row_of(PROBE, CONFIG)
    assert (row.tokens, row.origins, row.policy_logp) == (PROBE.tokens, PROBE.origins, PROBE.logps)
    assert (row.cut, row.cue, row.cue_length) == (4, 0, 2)
    assert row_of(PARENT, CONFIG).cut == -1
    assert row_of(PARENT, CONFIG).last_cut == 4
    forced = replace(PARENT, forced_last_turn=True)
    assert row_of(forced, CONFIG).last_cut == -1
    allowed = CONFIG.model_copy(update={"probe_forced_turn": True})
    assert row_of(forced, allowed).last_cut == 4


def test_guard_and_cueless_trajectory_are_refused():
    with pytest.raises(AlphaError, match="allow_large_alpha"):
        loss_and_gradient(rows(), MethodConfig())
    with pytest.raises(CueError, match="needs cues"):
        loss_and_gradient(rows(), CONFIG.model_copy(update={"realignment": "trajectory"}), trie=None)


def test_a_continuation_without_a_cue_spreads_z_and_nothing_else():
    row = Row((1,), (3, 4, 5), (P, P, P), (-1.0, -2.0, -3.0), cut=2)
    base = rows(probes=False)[0]
    batch = pad([*base, row], [0] * 7, [True] + [False] * 6)
    streams = correct(batch, MethodConfig(), None)
    ratio = torch.exp(batch.policy_logp - streams.behaviour_logp)[6, :3]
    expected = 1 / (6 / 7 + 1 / 7 * (5 / 6) ** -0.5)
    assert ratio.tolist() == pytest.approx([expected, expected, 1.0])


def test_samples_carry_the_streams_cut_to_their_length():
    rows_, groups, right = rows()
    streams = correct(pad(rows_, groups, right), CONFIG, TRIE)
    samples = make_samples(rows_, groups, streams, torch.arange(8.0))
    for i, sample in enumerate(samples):
        n = len(rows_[i].tokens)
        assert sample.tokens == rows_[i].tokens and sample.advantage == float(i)
        assert len(sample.mask) == len(sample.behaviour_logp) == len(sample.segment) == n
        assert sample.behaviour_logp == pytest.approx(streams.behaviour_logp[i, :n].tolist())
        assert sample.weight == () and sample.truncated == ()

"""The paper's correction: densities reach the streams, every switch does what it says, the guard."""

import math
from dataclasses import replace

import pytest
import torch

from rexrag.config.algorithms import RexRag
from rexrag.errors import AlphaError
from rexrag.method.corrections import correction_of
from rexrag.method.rows import importance_ess, pad, segments
from rexrag.types import Probe, RolloutGroup, Segment
from tests.support.rollouts import QUESTION, TRIE, P, loss_and_gradient, rollout, two_groups

ALGORITHM = RexRag(allow_large_alpha=True)


def streams_of(groups, trie=TRIE, **changes):
    correction = correction_of(ALGORITHM.model_copy(update=changes), trie)
    rows = correction.rows(groups)
    return rows, pad(rows), correction.streams(pad(rows))


def test_alpha_to_zero_is_the_limit_without_probes():
    """Copies of the base rollouts dilute two probes: base ratios approach 1."""
    groups = two_groups()
    plain = tuple(replace(group, probes=()) for group in groups)
    gaps = []
    for copies in (4, 40, 400):
        many = groups + plain * (copies - 1)
        _, _, streams = loss_and_gradient(many, RexRag())
        _, batch, _ = streams_of(many)
        ratio = torch.exp(batch.policy_logp - streams.behaviour_logp) * streams.weight
        gaps.append(float((ratio[:6][streams.mask[:6]] - 1).abs().max()))
        assert streams.alpha == pytest.approx(2 / (6 * copies + 2))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3


def test_masks_and_segments():
    _, batch, streams = streams_of(two_groups())
    B, F, U, S = (int(s) for s in (Segment.BASE, Segment.PREFIX, Segment.CUE, Segment.SUFFIX))
    assert segments(batch)[6, :10].tolist() == [F, F, F, F, U, U, S, S, S, S]
    assert streams.mask[6, :10].tolist() == [True, True, False, True, True, True, True, True, False, True]
    assert segments(batch)[0, :8].tolist() == [B] * 8
    assert streams.mask[0].tolist()[:8] == [True] * 3 + [False] * 3 + [True] * 2
    assert not streams.mask[0, 8:].any() and not streams.truncated.any()
    assert 0.0 < importance_ess(batch, streams) < 1.0


def test_cue_loss_trains_all_first_or_none_of_the_cue():
    trained = {
        switch: streams_of(two_groups(), cue_loss=switch)[2].mask[7, 2:5].tolist()
        for switch in ("all", "first", "none")
    }
    assert trained == {"all": [True] * 3, "first": [True, False, False], "none": [False] * 3}


def test_fine_and_coarse_densities_reach_the_streams():
    alpha, z = 2 / 8, 5 / 6
    for kind, cue in (("fine", [0.0, math.log(1 / 3)]), ("coarse", [math.log(1 / 3), 0.0])):
        rows, _, streams = streams_of(two_groups(), cue_density=kind)
        logp = torch.tensor(rows[6].policy_logp, dtype=torch.float64)
        probe = logp.clone()
        probe[[0, 1, 3]] -= math.log(z) / 3
        probe[[4, 5]] = torch.tensor(cue, dtype=torch.float64)
        expected = torch.log((1 - alpha) * logp.exp() + alpha * probe.exp())
        assert torch.allclose(streams.behaviour_logp[6, :10].double(), expected, atol=1e-6)
        base = torch.tensor(rows[0].policy_logp[:3]) + math.log(0.75)
        assert torch.allclose(streams.behaviour_logp[0, :3], base)


def test_alpha_per_group_and_z_per_question():
    first, second = two_groups()
    groups = (first, replace(second, probes=()))
    rows, _, streams = streams_of(groups, alpha="group", failure_rate="question")
    logp = torch.tensor([row.policy_logp[0] for row in rows])
    assert torch.allclose(streams.behaviour_logp[:3, 0], logp[:3] + math.log(3 / 4))
    assert torch.equal(streams.behaviour_logp[3:6, 0], logp[3:6])
    probe = float(logp[6]) - math.log(2 / 3) / 3
    expected = math.log(0.75 * math.exp(float(logp[6])) + 0.25 * math.exp(probe))
    assert float(streams.behaviour_logp[6, 0]) == pytest.approx(expected, abs=1e-6)


def test_a_share_that_clips_every_base_token_is_refused():
    with pytest.raises(AlphaError, match=r"algorithm\.keep_ratio.*algorithm\.allow_large_alpha"):
        streams_of(two_groups(), allow_large_alpha=False)


def test_a_continuation_without_a_cue_spreads_z_and_nothing_else():
    logps = [-1.0, -2.0, -3.0]
    parent = rollout([P] * 4)
    probe = Probe(rollout([P] * 3, logps), parent, cut=2, kept=True)
    base = [rollout([P] * 3, logps, correct=i == 0) for i in range(5)]
    _, batch, streams = streams_of((RolloutGroup(QUESTION, (*base, parent), (probe,)),), trie=None)
    ratio = torch.exp(batch.policy_logp - streams.behaviour_logp)[6, :3]
    expected = 1 / (6 / 7 + 1 / 7 * (5 / 6) ** -0.5)
    assert ratio.tolist() == pytest.approx([expected, expected, 1.0])

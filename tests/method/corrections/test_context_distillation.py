"""A probe trained without its cue: the spliced row, and how the tokens after the cue are weighted."""

from dataclasses import replace

import pytest
import torch

from rexrag.config.algorithms import RexRagDistill
from rexrag.errors import CutError
from rexrag.method import clipped_surrogate
from rexrag.method.corrections import correction_of
from rexrag.method.corrections.context_distillation import splice
from rexrag.method.rows import pad, with_suffix_logp
from rexrag.types import Probe, RolloutGroup, Turn
from tests.support.rollouts import QUESTION, TRIE, C, E, P, rollout

PARENT = rollout(
    [P] * 6, tokens=range(10, 16), turns=(Turn(0, 6, "answer", "y", action_start=4, thought_end=3),)
)
PROBE = Probe(
    rollout([P] * 4 + [C, C, P, E], tokens=[10, 11, 12, 13, 20, 21, 30, 31], turns=(Turn(0, 8),)),
    PARENT,
    cut=4,
    cue=0,
    cue_length=2,
    kept=True,
)
GROUPS = (RolloutGroup(QUESTION, (PARENT,) * 6, (PROBE,)),)


def streams_of(suffix_weight):
    correction = correction_of(RexRagDistill(suffix_weight=suffix_weight), TRIE)
    rows = correction.rows(GROUPS)
    return rows, pad(rows), correction.streams(pad(rows))


def test_splice_drops_the_closing_tag_and_the_cue():
    row = splice(PROBE, group=2)
    assert row.tokens == (10, 11, 12, 30, 31)
    assert row.origins == (P, P, P, P, E)
    assert (row.cut, row.cue, row.cue_length, row.group) == (3, -1, 0, 2)
    assert row.policy_logp == pytest.approx((0.0, -0.1, -0.2, -0.6, -0.7))
    assert row.source is PROBE.rollout


def test_a_thought_that_is_still_open_keeps_its_words():
    still_open = replace(PARENT, turns=(Turn(0, 6, "answer", "y", action_start=4),))
    assert splice(replace(PROBE, parent=still_open), 0).tokens == (10, 11, 12, 13, 30, 31)
    late = replace(PARENT, turns=(Turn(0, 6, "answer", "y", action_start=4, thought_end=5),))
    assert splice(replace(PROBE, parent=late), 0).tokens == (10, 11, 12, 13, 30, 31)


def test_a_cut_outside_the_probe_is_named():
    with pytest.raises(CutError, match=r"cut = 9: outside a probe of 8 tokens"):
        splice(replace(PROBE, cut=9), 0)


@pytest.mark.parametrize(
    ("suffix_weight", "scored", "truncated"),
    [("clipped", True, False), ("unclipped", True, True), ("truncated-is", False, True)],
)
def test_suffix_weights(suffix_weight, scored, truncated):
    rows, batch, streams = streams_of(suffix_weight)
    # truncated-is keeps the density that wrote the tokens; the others need that of this row.
    assert [row.score_suffix for row in rows] == [False] * 6 + [scored]
    assert streams.truncated[6].tolist() == [False] * 3 + [truncated] * 3
    assert not streams.truncated[:6].any()
    assert torch.equal(streams.behaviour_logp, batch.policy_logp)
    assert streams.mask[6].tolist() == [True, True, True, True, False, False]


def test_the_row_is_held_against_its_own_density_after_the_cut():
    own = with_suffix_logp(splice(PROBE, 0), [-9.0] * 5)
    assert own.policy_logp == pytest.approx((0.0, -0.1, -0.2, -9.0, -0.7))


def test_unclipped_goes_on_where_clipped_stops():
    """log π has risen by a half: the clip holds a good token back, the held ratio does not."""
    gradients = {}
    for suffix_weight in ("clipped", "unclipped"):
        _, batch, streams = streams_of(suffix_weight)
        logp = (batch.policy_logp + 0.5).requires_grad_(True)
        loss, _ = clipped_surrogate(
            logp, streams.behaviour_logp, torch.ones(7), streams.mask, truncated=streams.truncated
        )
        gradients[suffix_weight] = torch.autograd.grad(loss, logp)[0]
    tokens = 6 * 6 + 4
    assert gradients["clipped"][6, 3] == 0.0
    assert float(gradients["unclipped"][6, 3]) == pytest.approx(-1 / tokens)
    assert bool((gradients["unclipped"][:6] == 0).all())

"""Without a correction every token is held against the policy itself."""

import pytest
import torch

from rexrag.config.algorithms import Dapo, Grpo, RexRag
from rexrag.method.corrections import correction_of
from rexrag.method.corrections.none import Uncorrected
from rexrag.method.rows import importance_ess, pad
from tests.support.rollouts import TRIE, two_groups


@pytest.mark.parametrize(
    ("cue_loss", "cue"), [("all", [True] * 3), ("first", [True, False, False]), ("none", [False] * 3)]
)
def test_probes_are_trained_as_if_the_policy_had_drawn_them(cue_loss, cue):
    algorithm = RexRag(correction="none", cue_loss=cue_loss)
    correction = correction_of(algorithm, TRIE)
    batch = pad(correction.rows(two_groups()))
    streams = correction.streams(batch)
    assert torch.equal(streams.behaviour_logp, batch.policy_logp)
    assert bool((streams.weight == 1).all()) and not streams.truncated.any()
    assert streams.mask[7, :6].tolist() == [True, True, *cue, True]
    assert importance_ess(batch, streams) == pytest.approx(1.0)


def test_algorithms_without_probes_need_no_correction():
    assert correction_of(Grpo(), None) == correction_of(Dapo(), TRIE) == Uncorrected()


def test_a_large_share_of_probes_is_no_fault_where_nothing_is_mixed():
    correction = correction_of(RexRag(correction="none", allow_large_alpha=False), TRIE)
    assert correction.streams(pad(correction.rows(two_groups()))).alpha == 0.25

"""Rollouts as rows, rows as tensors, tensors as samples."""

import pytest
import torch

from rexrag.config.algorithms import RexRag
from rexrag.method.corrections import correction_of
from rexrag.method.corrections.base import on_policy, rows_as_written, trained_tokens
from rexrag.method.rows import (
    PADDING,
    make_samples,
    pad,
    probe_row,
    row_of,
    sampler_weight,
    with_logp,
    with_suffix_logp,
)
from rexrag.types import Probe
from tests.support.rollouts import TRIE, C, E, N, P, rollout, two_groups

PARENT = rollout([P] * 6)
PROBE = Probe(rollout([P, E, P, P, C, C, P, N]), PARENT, cut=4, cue=0, cue_length=2, kept=True)


def test_a_row_keeps_every_token_as_sampled():
    row = probe_row(PROBE, 3)
    made = PROBE.rollout
    assert (row.tokens, row.origins, row.policy_logp) == (made.tokens, made.origins, made.logps)
    assert (row.cut, row.cue, row.cue_length, row.group) == (4, 0, 2, 3)
    assert row.prompt == made.prompt and row.source is made
    assert row_of(PARENT, 1).cut == row_of(PARENT, 1).cue == -1
    assert probe_row(Probe(made, PARENT, cut=4), 0).cue == -1


def test_other_log_probs_replace_those_of_what_the_policy_wrote():
    row = probe_row(PROBE, 0)
    new = [-9.0] * 8
    assert with_logp(row, new).policy_logp == pytest.approx((-9.0, -0.1, *[-9.0] * 5, -0.7))
    assert with_suffix_logp(row, new).policy_logp == pytest.approx(
        (0.0, -0.1, -0.2, -0.3, -0.4, -0.5, -9.0, -0.7)
    )


def test_padding_is_no_origin_and_no_log_prob():
    batch = pad([row_of(PARENT, 0), probe_row(PROBE, 0)])
    assert batch.origin[0].tolist() == [P] * 6 + [PADDING] * 2
    assert batch.policy_logp[0, 6:].tolist() == [0.0, 0.0]
    assert batch.is_probe.tolist() == [False, True] and batch.correct.tolist() == [False, False]


def test_the_sampler_s_numerics_never_weigh_a_cue():
    sampled = pad([probe_row(PROBE, 0)])
    learned = pad([with_logp(probe_row(PROBE, 0), [v + 3.0 for v in PROBE.rollout.logps])])
    assert sampler_weight(learned, sampled, cap=2.0)[0].tolist() == pytest.approx(
        [2.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 1.0]
    )


def test_samples_carry_the_streams_cut_to_their_length():
    rows = rows_as_written(two_groups())
    batch = pad(rows)
    streams = correction_of(RexRag(allow_large_alpha=True), TRIE).streams(batch)
    samples = make_samples(rows, batch, streams, torch.arange(8.0))
    for i, sample in enumerate(samples):
        n = len(rows[i].tokens)
        assert sample.tokens == rows[i].tokens and sample.advantage == float(i)
        assert len(sample.mask) == len(sample.behaviour_logp) == len(sample.segment) == n
        assert sample.behaviour_logp == pytest.approx(streams.behaviour_logp[i, :n].tolist())
        assert sample.policy_logp == rows[i].policy_logp and sample.source is rows[i].source
        assert sample.weight == () and sample.truncated == ()


def test_weights_and_truncation_are_written_out_where_there_are_any():
    rows = rows_as_written(two_groups())
    batch = pad(rows)
    streams = on_policy(batch, trained_tokens(batch))
    streams.weight[0, 0], streams.truncated[1, 1] = 0.5, True
    samples = make_samples(rows, batch, streams, torch.zeros(8))
    assert samples[0].weight == (0.5, *[1.0] * 7) and samples[1].weight == (1.0,) * 6
    assert samples[1].truncated == (False, True, False, False, False, False)

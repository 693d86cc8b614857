"""What holds of every correction: METHOD §4's identities 1, 3 and 5."""

from dataclasses import replace

import pytest
import torch

from rexrag.config.algorithms import Dapo, Grpo, RexRag, RexRagDistill
from rexrag.method import clipped_surrogate, group_advantages
from rexrag.method.corrections import correction_of
from rexrag.method.corrections.base import base_rows, rows_as_written
from rexrag.method.rows import PADDING, make_samples, pad, segments
from rexrag.types import RolloutGroup, Segment
from tests.support.rollouts import TRIE, E, N, P, loss_and_gradient, rollout, two_groups

VARIANTS = {
    "mixture": RexRag(allow_large_alpha=True),
    "none": RexRag(correction="none"),
    "clipped": RexRagDistill(suffix_weight="clipped"),
    "truncated-is": RexRagDistill(suffix_weight="truncated-is"),
    "unclipped": RexRagDistill(suffix_weight="unclipped"),
}
PROBING = pytest.mark.parametrize("algorithm", VARIANTS.values(), ids=VARIANTS)
EVERY = pytest.mark.parametrize(
    "algorithm", [Grpo(), Dapo(), *VARIANTS.values()], ids=["grpo", "dapo", *VARIANTS]
)


def without_probes(groups):
    return tuple(replace(group, probes=()) for group in groups)


@EVERY
def test_without_probes_every_algorithm_is_plain_grpo_bit_for_bit(algorithm):
    groups = without_probes(two_groups())
    loss, gradient, _ = loss_and_gradient(groups, algorithm)
    batch = pad(base_rows(groups))
    logp = (batch.policy_logp + 0.1).requires_grad_(True)
    advantages = group_advantages(batch.correct.float(), batch.groups)
    plain, _ = clipped_surrogate(logp, batch.policy_logp, advantages, batch.origin == P)
    assert torch.equal(loss, plain.detach())
    assert torch.equal(gradient, torch.autograd.grad(plain, logp)[0])


@EVERY
def test_probes_that_are_not_kept_change_nothing(algorithm):
    groups = two_groups()
    dropped = tuple(
        replace(group, probes=tuple(replace(p, kept=False) for p in group.probes)) for group in groups
    )
    loss, gradient, streams = loss_and_gradient(dropped, algorithm)
    plain, without, _ = loss_and_gradient(without_probes(groups), algorithm)
    assert torch.equal(loss, plain) and torch.equal(gradient, without) and streams.alpha == 0.0


@PROBING
def test_evidence_and_notices_get_exactly_zero_gradient_whatever_they_say(algorithm):
    def noisy(made):
        inserted = [origin in (E, N) for origin in made.origins]
        return replace(
            made,
            tokens=tuple(20 if i else t for t, i in zip(made.tokens, inserted, strict=True)),
            logps=tuple(-500.0 if i else v for v, i in zip(made.logps, inserted, strict=True)),
        )

    groups = two_groups()
    shouting = tuple(
        replace(
            group,
            rollouts=tuple(map(noisy, group.rollouts)),
            probes=tuple(replace(p, rollout=noisy(p.rollout)) for p in group.probes),
        )
        for group in groups
    )
    loss, gradient, _ = loss_and_gradient(groups, algorithm)
    again, noisy_gradient, _ = loss_and_gradient(shouting, algorithm)
    origin = pad(correction_of(algorithm, TRIE).rows(groups)).origin
    inserted = (origin == E) | (origin == N)
    assert inserted.any() and bool((gradient[inserted] == 0).all())
    assert torch.equal(loss, again) and torch.equal(gradient, noisy_gradient)


@PROBING
def test_order_changes_nothing(algorithm):
    groups = two_groups()
    moved = tuple(replace(g, rollouts=g.rollouts[1:] + g.rollouts[:1]) for g in groups[::-1])
    loss, gradient, _ = loss_and_gradient(groups, algorithm)
    again, other, _ = loss_and_gradient(moved, algorithm)
    place = {id(row.source): i for i, row in enumerate(correction_of(algorithm, TRIE).rows(moved))}
    rows = correction_of(algorithm, TRIE).rows(groups)
    order = [place[id(row.source)] for row in rows]
    assert sorted(order) == list(range(8)) != order
    assert float(again) == pytest.approx(float(loss), abs=1e-7)
    assert torch.allclose(other[order], gradient, atol=1e-7)


@PROBING
def test_padding_changes_nothing(algorithm):
    correction = correction_of(algorithm, TRIE)
    rows = correction.rows(two_groups())
    batch = pad(rows)
    wide = replace(
        batch,
        origin=torch.nn.functional.pad(batch.origin, (0, 4), value=PADDING),
        policy_logp=torch.nn.functional.pad(batch.policy_logp, (0, 4)),
    )
    narrow, padded = correction.streams(batch), correction.streams(wide)
    width = batch.origin.shape[1]
    assert torch.equal(padded.mask[:, :width], narrow.mask) and not padded.mask[:, width:].any()
    assert torch.equal(padded.behaviour_logp[:, :width], narrow.behaviour_logp)
    samples = make_samples(rows, batch, narrow, torch.zeros(8))
    assert make_samples(rows[:7], batch, narrow, torch.zeros(7)) == samples[:7]
    assert make_samples(rows, wide, padded, torch.zeros(8)) == samples


@PROBING
def test_prefix_loss_leaves_a_probe_s_prefix_to_its_base_rollout(algorithm):
    batch = pad(correction_of(algorithm, TRIE).rows(two_groups()))
    _, whole, streams = loss_and_gradient(two_groups(), algorithm)
    _, without, masked = loss_and_gradient(two_groups(), algorithm.model_copy(update={"prefix_loss": "none"}))
    prefix = segments(batch) == int(Segment.PREFIX)
    assert streams.mask[prefix].any() and not masked.mask[prefix].any()
    assert torch.equal(masked.mask[~prefix], streams.mask[~prefix])
    assert bool((without[prefix] == 0).all()) and torch.equal(masked.behaviour_logp, streams.behaviour_logp)
    # The others keep their direction; the mean is over fewer tokens.
    share = streams.mask.sum() / masked.mask.sum()
    assert torch.allclose(without[~prefix], whole[~prefix] * share, atol=1e-7)


@EVERY
def test_alpha_and_z_are_counted_over_the_batch(algorithm):
    *_, streams = loss_and_gradient(two_groups(), algorithm)
    assert (streams.alpha, streams.failure_rate) == (pytest.approx(2 / 8), pytest.approx(5 / 6))


def test_base_rollouts_come_first_then_kept_probes():
    groups = two_groups()
    rows = rows_as_written(groups)
    assert [row.source for row in rows[:6]] == [r for group in groups for r in group.rollouts]
    assert [row.source for row in rows[6:]] == [p.rollout for group in groups for p in group.probes]
    assert [row.group for row in rows] == [0, 0, 0, 1, 1, 1, 0, 1]
    assert [(row.cut, row.cue, row.cue_length) for row in rows[5:]] == [(-1, -1, 0), (4, 0, 2), (2, 1, 3)]


def test_a_step_without_rollouts_has_no_rows():
    assert base_rows(()) == rows_as_written((RolloutGroup(rollout([P]).question, ()),)) == []

"""The filter keeps the most plausible probes, and how many of them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rexrag.config.algorithms import Grpo, RexRag, RexRagDistill
from rexrag.errors import MethodError, NonFiniteError, ShapeError
from rexrag.method import keep_probes
from rexrag.method.filters import cue_scores, filter_probes, groups_with_signal, keep_count
from rexrag.types import Origin, RolloutGroup
from tests.support.rollouts import QUESTION, P, probe_of, rollout, two_groups

scores = st.lists(st.floats(-50, 0, width=32), max_size=30)


@given(scores, st.integers(0, 40))
def test_keeps_the_best_and_no_more(values, keep):
    kept = keep_probes(torch.tensor(values), keep)
    assert kept.dtype == torch.bool and int(kept.sum()) == min(keep, len(values))
    inside = [v for v, k in zip(values, kept.tolist(), strict=True) if k]
    outside = [v for v, k in zip(values, kept.tolist(), strict=True) if not k]
    assert not inside or not outside or min(inside) >= max(outside)


@given(scores.filter(bool), st.integers(1, 10), st.randoms(use_true_random=False))
def test_order_does_not_matter_without_ties(values, keep, random):
    values = sorted(set(values))
    order = list(range(len(values)))
    random.shuffle(order)
    kept = keep_probes(torch.tensor(values), keep)
    shuffled = keep_probes(torch.tensor([values[i] for i in order]), keep)
    assert [bool(kept[i]) for i in order] == shuffled.tolist()


def test_the_earlier_of_equal_scores_wins():
    assert keep_probes(torch.tensor([-1.0, -1.0, -1.0]), 2).tolist() == [True, True, False]


@given(
    st.lists(st.tuples(st.floats(-50, 0, width=32), st.booleans(), st.integers(0, 3)), max_size=30),
    st.integers(0, 12),
    st.integers(0, 3),
)
def test_no_probe_that_may_not_be_kept_and_no_more_of_a_group_than_asked(probes, keep, per_group):
    values = torch.tensor([score for score, _, _ in probes])
    allowed, groups = [may for _, may, _ in probes], [group for _, _, group in probes]
    kept = keep_probes(values, keep, allowed, groups, per_group).tolist()
    of_group = [sum(k for k, g in zip(kept, groups, strict=True) if g == group) for group in range(4)]
    possible = [sum(a for a, g in zip(allowed, groups, strict=True) if g == group) for group in range(4)]
    room = [min(n, per_group) if per_group else n for n in possible]
    assert not any(k and not a for k, a in zip(kept, allowed, strict=True))
    assert all(n <= most for n, most in zip(of_group, room, strict=True))
    assert sum(kept) == min(keep, sum(room))
    for i, (score, _, group) in enumerate(probes):
        if allowed[i] and not kept[i] and room[group]:
            rivals = groups if of_group[group] == room[group] else [group] * len(probes)
            assert all(probes[j][0] >= score for j in range(len(probes)) if kept[j] and rivals[j] == group)


def test_score_is_the_mean_over_cue_tokens_only():
    origin = torch.tensor([[0, 1, 1, 2, 0], [0, 0, 0, 0, 0]])
    logp = torch.tensor([[-9.0, -1.0, -3.0, float("nan"), -9.0], [-1.0] * 5])
    assert cue_scores(logp, origin).tolist() == [-2.0, 0.0]


@pytest.mark.parametrize(
    ("n", "ratio", "kept"), [(2560, 0.08, 204), (100, 0.29, 29), (5, 0.08, 0), (0, 0.5, 0)]
)
def test_keep_count_is_the_floor(n, ratio, kept):
    assert keep_count(n, ratio) == kept


def failed_groups(*corrects):
    """A group of four wrong base rollouts for each argument, with probes that are correct or not.

    The k-th probe of the batch has cue log-probs of −k.
    """
    made, count = [], 0
    for group in corrects:
        base = tuple(rollout([P] * 4) for _ in range(4))
        probes = []
        for parent, correct in zip(base, group, strict=False):
            probes.append(probe_of(parent, 0, [P], [-float(count)] * 3, correct=correct))
            count += 1
        made.append(RolloutGroup(QUESTION, base, tuple(replace(p, kept=False) for p in probes)))
    return tuple(made)


def kept(groups, algorithm, seed=0):
    filtered = filter_probes(groups, algorithm, torch.Generator().manual_seed(seed))
    return [[p.kept for p in group.probes] for group in filtered]


def test_the_paper_keeps_the_best_scored_of_the_batch():
    groups = failed_groups([False, True], [True, False, True])
    assert kept(groups, RexRag(keep_ratio=0.25)) == [[True, True], [False] * 3]  # ⌊0.25·8⌋ = 2
    filtered = filter_probes(groups, RexRag(), torch.Generator())
    scores = [p.score for group in filtered for p in group.probes]
    assert scores == [0.0, -1.0, -2.0, -3.0, -4.0]
    assert [p.rollout for g in filtered for p in g.probes] == [p.rollout for g in groups for p in g.probes]


def test_right_keeps_only_correct_probes_and_no_more_of_a_question_than_asked():
    groups = failed_groups([False, True, True], [True], [False])
    # Three correct ones, ranked by chance: which of the first question's two is kept is a coin.
    seen = {str(kept(groups, RexRagDistill(keep_ratio=1.0), seed)[0]) for seed in range(20)}
    assert seen == {"[False, True, False]", "[False, False, True]"}
    assert all(kept(groups, RexRagDistill(keep_ratio=1.0), s)[1:] == [[True], [False]] for s in range(20))
    everyone = RexRagDistill(keep_ratio=1.0, keep_per_group=0)
    assert kept(groups, everyone) == [[False, True, True], [True], [False]]


def test_none_keeps_every_probe():
    groups = failed_groups([False, True], [False])
    assert kept(groups, RexRag(filter="none", keep_ratio=0.0)) == [[True, True], [True]]


def test_probes_without_a_cue_are_ranked_by_chance():
    base = tuple(rollout([P] * 4) for _ in range(4))
    probes = tuple(replace(probe_of(parent, None, [P], [-1.0]), kept=False) for parent in base)
    groups = (RolloutGroup(QUESTION, base, probes),)
    assert len({str(kept(groups, RexRag(keep_ratio=0.25), seed)) for seed in range(40)}) == 4


def test_without_probes_the_groups_stay_as_they_are():
    groups = two_groups()
    assert filter_probes(groups, Grpo(), torch.Generator()) == groups
    assert filter_probes((), RexRag(), torch.Generator()) == ()


def test_groups_with_signal_are_counted_after_the_filter_and_leave_the_generator():
    groups = failed_groups([True], [False], [True])
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    assert groups_with_signal(groups, RexRagDistill(keep_ratio=1.0), generator) == 2
    assert groups_with_signal(groups, RexRagDistill(keep_ratio=0.1), generator) == 1
    assert groups_with_signal(groups, RexRagDistill(keep_ratio=0.0), generator) == 0
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: keep_probes(torch.tensor([0.0, float("nan")]), 1), NonFiniteError, r"scores\[1\] = nan"),
        (lambda: keep_probes(torch.zeros(2), -1), MethodError, "keep = -1, expected >= 0"),
        (lambda: keep_probes(torch.zeros(2, 2), 1), ShapeError, r"scores has shape \(2, 2\)"),
        (lambda: keep_count(10, 1.5), MethodError, "keep_ratio = 1.5"),
        (
            lambda: cue_scores(torch.tensor([[float("inf")]]), torch.tensor([[int(Origin.CUE)]])),
            NonFiniteError,
            r"policy_logp\[0, 0\] = inf",
        ),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()

"""The filter keeps the most plausible probes, and how many of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import MethodError, NonFiniteError, ShapeError
from rexrag.method import keep_probes
from rexrag.method.filters import (
    adaptive_keep_ratio,
    cue_scores,
    keep_count,
    update_probe_accuracy,
)
from rexrag.types import Origin

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


def test_adaptive_ratio_follows_accuracy_between_floor_and_cap():
    mean = 0.08
    for _ in range(200):
        mean = update_probe_accuracy(mean, right=0, kept=5)
    assert adaptive_keep_ratio(mean, keep_ratio=0.08, floor=0.02) == 0.02
    assert update_probe_accuracy(mean, right=0, kept=0) == mean
    for _ in range(20):
        mean = update_probe_accuracy(mean, right=4, kept=5)
    assert adaptive_keep_ratio(mean, keep_ratio=0.08, floor=0.02) == 0.08
    assert update_probe_accuracy(0.5, right=1, kept=2, momentum=0.1) == pytest.approx(0.5)
    assert update_probe_accuracy(0.0, right=1, kept=2, momentum=0.1) == pytest.approx(0.05)
    assert adaptive_keep_ratio(0.05, keep_ratio=0.08, floor=0.02) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: keep_probes(torch.tensor([0.0, float("nan")]), 1), NonFiniteError, r"scores\[1\] = nan"),
        (lambda: keep_probes(torch.zeros(2), -1), MethodError, "keep = -1, expected >= 0"),
        (lambda: keep_probes(torch.zeros(2, 2), 1), ShapeError, r"scores has shape \(2, 2\)"),
        (lambda: keep_count(10, 1.5), MethodError, "keep_ratio = 1.5"),
        (lambda: adaptive_keep_ratio(0.1, 0.05, 0.1), MethodError, "floor = 0.1"),
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

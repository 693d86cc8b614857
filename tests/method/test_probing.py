"""Which dead ends are probed, and how often, as probes prove to be worth it or not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rexrag.config.algorithms import Grpo, RexRag, RexRagDistill
from rexrag.errors import CueError, MethodError
from rexrag.method.probing import (
    HALF_LIFE,
    adaptive_probability,
    plan,
    plan_probes,
    update_probe_success,
    with_probes,
)
from tests.support.rollouts import P, rollout, two_groups


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def test_plans_follow_the_generator_and_the_probability():
    dead_ends = [rollout([P] * 3) for _ in range(2000)]
    number = {id(made): i for i, made in enumerate(dead_ends)}

    def planned(probability, pool=10, seed=3):
        return [
            (number[id(p.parent)], p.cue) for p in plan_probes(dead_ends, probability, pool, seeded(seed))
        ]

    assert planned(0.2) == planned(0.2) != planned(0.2, seed=4)
    assert planned(0.0) == [] and [parent for parent, _ in planned(1.0)] == list(range(2000))
    share = len(planned(0.2)) / 2000
    assert 0.2 - 4 * 0.009 < share < 0.2 + 4 * 0.009
    counts = torch.bincount(torch.tensor([cue for _, cue in planned(1.0)]), minlength=10)
    assert int(counts.min()) > 140 and int(counts.max()) < 260
    # One coin each: raising p only adds probes.
    assert set(planned(0.1)) <= set(planned(0.3))
    assert all(cue is None for _, cue in planned(1.0, pool=None))


def test_an_algorithm_without_probes_plans_none_and_draws_nothing():
    generator = seeded()
    before = generator.get_state()
    assert plan(two_groups(), Grpo(), 3, generator) == []
    assert torch.equal(generator.get_state(), before)


def test_a_plan_follows_the_algorithm():
    first, second = two_groups()
    everywhere = plan((first, second), RexRag(probe_probability=1.0), 3, seeded())
    assert [id(p.parent) for p in everywhere] == [id(r) for r in (*first.rollouts[1:], *second.rollouts)]
    failed = plan((first, second), RexRagDistill(probe_probability=1.0), 3, seeded())
    assert [id(p.parent) for p in failed] == [id(r) for r in second.rollouts]
    judged = RexRag(probe_probability=1.0, dead_ends="judge", dead_end_judge="a:b")
    called = plan((first, second), judged, None, seeded(), lambda rollouts: [0.9] + [0.1] * 5)
    assert [(id(p.parent), p.cue) for p in called] == [(id(first.rollouts[0]), None)]


def test_each_probe_is_put_in_the_group_of_its_parent():
    first, second = two_groups()
    bare = tuple(replace(group, probes=()) for group in (first, second))
    put = with_probes(bare, [*second.probes, *first.probes])
    assert [group.probes for group in put] == [first.probes, second.probes]
    assert [group.probes for group in with_probes(bare, [])] == [(), ()]


def test_a_success_counts_half_after_its_half_life():
    assert update_probe_success(1.0, right=0, drawn=HALF_LIFE) == pytest.approx(0.5)
    assert update_probe_success(0.0, right=HALF_LIFE, drawn=HALF_LIFE) == pytest.approx(0.5)
    assert update_probe_success(0.3, right=0, drawn=0) == 0.3


@given(st.floats(0, 1), st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_steps_may_be_cut_anywhere_if_their_success_is_the_same(mean, a, b, rate):
    """What matters is how many probes were drawn, not in how many steps."""
    share = rate / 40
    at_once = update_probe_success(mean, share * (a + b), a + b)  # type: ignore[arg-type]
    in_two = update_probe_success(update_probe_success(mean, share * a, a), share * b, b)  # type: ignore[arg-type]
    assert in_two == pytest.approx(at_once)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.01, 1))
def test_p_falls_in_proportion_below_the_target_and_never_to_zero(probability, success, target):
    p = adaptive_probability(probability, success, target)
    assert probability / 8 <= p <= probability
    if success >= target:
        assert p == probability
    elif success >= target / 8:
        assert p == pytest.approx(probability * success / target)


def test_without_a_target_p_stays():
    assert adaptive_probability(0.3, 0.0, 0.0) == 0.3


def test_bad_input_is_named():
    with pytest.raises(MethodError, match=r"probability = 1\.5"):
        plan_probes([], 1.5, 2, torch.Generator())
    with pytest.raises(CueError, match="pool_size = 0"):
        plan_probes([], 0.2, 0, torch.Generator())
    with pytest.raises(MethodError, match="right = 3"):
        update_probe_success(0.5, 3, 2)
    with pytest.raises(MethodError, match=r"success = 2\.0"):
        adaptive_probability(0.5, 2.0, 0.1)

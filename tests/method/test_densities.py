"""Densities segment by segment, the mixture's bounds and limits, trajectory weights, alpha and z."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import AlphaError, CutError, FailureRateError, MethodError, NonFiniteError, ShapeError
from rexrag.method import CueTrie, mixture_log_density, probe_log_density, trajectory_weight
from rexrag.method.densities import (
    effective_sample_size,
    explanation_log_ratios,
    failure_rates,
    guard_alpha,
    mismatch_weights,
    mixture_densities,
    mixture_shares,
    probe_log_densities,
    trajectory_weights,
)
from rexrag.types import Origin

P, C, E, N = (int(o) for o in (Origin.POLICY, Origin.CUE, Origin.EVIDENCE, Origin.NOTICE))
LOGP = torch.tensor([-1.0, -2.0, -0.5, -0.1, -6.0, -7.0, -0.3, -0.4], dtype=torch.float64)
ORIGIN = torch.tensor([P, P, E, P, C, C, P, P])
TRIE = CueTrie([[5, 6], [5, 7], [5, 7]])
logps = st.floats(-30, 0)


def test_fine_density_segment_by_segment():
    got = probe_log_density(LOGP, ORIGIN, 4, TRIE.log_prob([5, 7]), failure_rate=0.25)
    spread = math.log(0.25) / 3  # |o'| counts POLICY tokens: 0, 1 and 3
    expected = [-1 - spread, -2 - spread, -0.5, -0.1 - spread, 0.0, math.log(2 / 3), -0.3, -0.4]
    assert got.tolist() == pytest.approx(expected)


def test_coarse_density_differs_only_in_the_cue():
    cue = TRIE.log_prob([5, 7])
    fine = probe_log_density(LOGP, ORIGIN, 4, cue, 0.25)
    coarse = probe_log_density(LOGP, ORIGIN, 4, cue, 0.25, kind="coarse", pool_size=3)
    assert coarse[4:6].tolist() == [-math.log(3), 0.0]
    assert torch.equal(coarse[:4], fine[:4]) and torch.equal(coarse[6:], fine[6:])


@given(st.floats(0.001, 1.0), st.integers(0, 6), st.integers(0, 10_000))
def test_a_probe_s_density_is_that_of_the_process_that_made_it(z, prefix, seed):
    """Sum over POLICY and CUE tokens = log π(o′) − log z + log q(h) + log π(o″)."""
    g = torch.Generator().manual_seed(seed)
    length = prefix + 2 + 3
    logp = -torch.rand(length, generator=g, dtype=torch.float64) * 5
    origin = torch.full((length,), P)
    origin[prefix : prefix + 2] = C
    got = probe_log_density(logp, origin, prefix, TRIE.log_prob([5, 6]), z)
    ours = origin == P
    expected = float(logp[ours].sum()) + math.log(1 / 3) - (math.log(z) if prefix else 0.0)
    assert float(got.sum()) == pytest.approx(expected)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.floats(0.01, 1.0)), min_size=1, max_size=6)
)
def test_batched_equals_one_by_one(rows):
    trie = CueTrie([[1, 2], [1, 3, 4], [2]])
    length, g = 10, torch.Generator().manual_seed(len(rows))
    logp = -torch.rand(len(rows), length, generator=g, dtype=torch.float64)
    origin = torch.zeros(len(rows), length, dtype=torch.int64)
    for i, (cut, cue, _) in enumerate(rows):
        origin[i, cut : cut + len(trie.cues[cue])] = C
        origin[i, -1] = N
    lengths = torch.tensor([len(trie.cues[cue]) for _, cue, _ in rows])
    table = trie.table()[torch.tensor([cue for _, cue, _ in rows])]
    rates = torch.tensor([z for *_, z in rows], dtype=torch.float64)
    cuts = torch.tensor([cut for cut, *_ in rows])
    for kind in ("fine", "coarse"):
        batched = probe_log_densities(logp, origin, cuts, table, lengths, rates, kind, 3)
        for i, (cut, cue, z) in enumerate(rows):
            alone = probe_log_density(logp[i], origin[i], cut, trie.log_prob(trie.cues[cue]), z, kind, 3)
            assert torch.allclose(batched[i], alone)


@given(logps, logps, st.floats(0, 0.99))
def test_mixture_lies_between_its_parts(policy, probe, alpha):
    got = float(mixture_log_density(torch.tensor([policy]), torch.tensor([probe]), alpha)[0])
    assert min(policy, probe) - 1e-4 <= got <= max(policy, probe) + 1e-4


@given(logps, logps, st.floats(0, 0.9), st.floats(0, 0.09))
def test_mixture_is_monotone_in_alpha(policy, probe, alpha, more):
    def at(a):
        p = torch.tensor([policy], dtype=torch.float64)
        return float(mixture_log_density(p, torch.tensor([probe], dtype=torch.float64), a)[0])

    low, high = at(alpha), at(alpha + more)
    assert low <= high + 1e-12 if probe >= policy else high <= low + 1e-12


@given(st.lists(logps, min_size=1, max_size=8), st.floats(0, 0.99))
def test_base_rollouts_lose_exactly_the_share_of_probes(values, alpha):
    policy = torch.tensor(values, dtype=torch.float64)
    got = mixture_log_density(policy, torch.full_like(policy, -math.inf), alpha)
    assert torch.allclose(got, policy + math.log1p(-alpha))


def test_alpha_zero_is_the_policy_bit_for_bit():
    policy = -torch.rand(50)
    assert torch.equal(mixture_log_density(policy, -torch.rand(50), 0.0), policy)
    assert torch.equal(mixture_log_density(policy, torch.full((50,), -math.inf), 0.0), policy)


def test_a_float32_mixture_survives_an_alpha_near_one():
    base = mixture_log_density(torch.tensor([-1.0]), torch.tensor([-math.inf]), 1 - 1e-9)
    assert float(base) == pytest.approx(-1 + math.log(1e-9), rel=1e-6)


def test_mixture_equals_the_plain_formula_and_has_its_gradient():
    policy = -torch.rand(20, dtype=torch.float64)
    probe = -torch.rand(20, dtype=torch.float64)
    plain = torch.log(0.7 * policy.exp() + 0.3 * probe.exp())
    assert torch.allclose(mixture_log_density(policy, probe, 0.3), plain)
    inputs = (policy.requires_grad_(True), probe.requires_grad_(True))
    assert torch.autograd.gradcheck(lambda a, b: mixture_log_density(a, b, 0.3), inputs)


def test_mixture_of_a_batch_equals_the_full_computation():
    policy, rows = -torch.rand(6, 9), torch.tensor([1, 4])
    probe = policy[rows].double() - torch.rand(2, 9).double()
    full = torch.full((6, 9), -math.inf, dtype=torch.float64)
    full[rows] = probe
    alpha = torch.tensor([0.0, 0.2, 0.2, 0.1, 0.5, 0.3], dtype=torch.float64)
    got = mixture_densities(policy, rows, probe, alpha)
    assert torch.allclose(got.double(), mixture_log_density(policy.double(), full, alpha[:, None]), atol=1e-6)
    assert torch.equal(mixture_densities(policy, rows[:0], probe[:0], 0.0), policy)


def test_trajectory_weight_by_hand():
    cue_policy, cue = torch.tensor([-3.0, -2.0]), TRIE.log_prob([5, 6])
    r = math.exp(math.log(1 / 3) + 5.0) / 0.4
    assert trajectory_weight(cue_policy, cue, 0.4, 0.1) == pytest.approx(1 / (0.9 + 0.1 * r), rel=1e-6)
    assert trajectory_weight(None, None, 0.4, 0.1) == pytest.approx(1 / 0.9)
    assert trajectory_weight(None, None, 0.0, 0.0) == 1.0


def test_p_fail_divides_z_and_may_push_it_above_one():
    cue_policy, cue = torch.tensor([-3.0, -2.0]), TRIE.log_prob([5, 6])
    r = 0.25 * math.exp(math.log(1 / 3) + 5.0) / 0.4
    assert trajectory_weight(cue_policy, cue, 0.4 / 0.25, 0.1) == pytest.approx(1 / (0.9 + 0.1 * r), rel=1e-6)


@given(st.floats(-60, 60), st.floats(0, 0.99))
def test_trajectory_weight_never_exceeds_that_of_a_base_rollout(log_r, alpha):
    weight = float(trajectory_weights(torch.tensor([log_r]), alpha)[0])
    assert 0.0 <= weight <= 1 / (1 - alpha) + 1e-9


def test_explanations_are_found_where_a_cue_stands_word_for_word():
    trie = CueTrie([[5, 6], [5, 7], [5, 7]])
    tokens = torch.tensor([[1, 5, 6, 2, 5, 7], [5, 6, 0, 0, 0, 0], [1, 2, 3, 5, 2, 6]])
    origin = torch.tensor([[P, C, C, P, P, P], [E, E, P, -1, -1, -1], [P] * 6])
    logp = torch.full((3, 6), -1.0)
    z = torch.full((3,), 0.5, dtype=torch.float64)
    anywhere = torch.full((3,), 99)
    tokens = torch.nn.functional.pad(tokens, (0, 1), value=3)
    origin = torch.cat([origin, torch.tensor([[P], [-1], [P]])], dim=1)
    logp = torch.nn.functional.pad(logp, (0, 1), value=-1.0)
    got = explanation_log_ratios(tokens, logp, origin, trie.cues, trie.table(), z, anywhere)
    both = (1 / 3 + 2 / 3) * math.exp(2.0) / 0.5
    assert got.tolist() == pytest.approx([math.log(both), -math.inf, -math.inf])


def explained(last_cut, length=6, logp=None):
    """log r of one rollout `1 5 6 2 5 7 …` of `length` tokens, with z = 1 and two cues."""
    trie = CueTrie([[5, 6], [5, 7]])
    tokens = torch.tensor([[1, 5, 6, 2, 5, 7, 3]])
    origin = torch.where(torch.arange(7) < length, P, -1)[None]
    logp = torch.full((1, 7), -1.0) if logp is None else logp
    one = torch.ones(1, dtype=torch.float64)
    where = torch.tensor([last_cut])
    return float(explanation_log_ratios(tokens, logp, origin, trie.cues, trie.table(), one, where)[0])


def test_words_behind_the_last_possible_cut_explain_nothing():
    each = 2.0 + math.log(1 / 2)
    both = each + math.log(2)
    assert explained(99, length=7) == pytest.approx(both)
    assert explained(4, length=7) == pytest.approx(both)
    assert explained(3, length=7) == explained(1, length=7) == pytest.approx(each)
    assert explained(0, length=7) == explained(-1, length=7) == -math.inf
    # A probe goes on after its cue: one that ends with it was not given it.
    assert explained(99, length=6) == pytest.approx(each)
    assert explained(99, length=3) == -math.inf


def test_a_log_prob_that_is_not_finite_is_named_and_evidence_is_not_looked_at():
    broken = torch.full((1, 7), -1.0)
    broken[0, 0] = -math.inf
    with pytest.raises(NonFiniteError, match=r"policy_logp\[0, 0\] = -inf"):
        explained(99, length=7, logp=broken)
    trie = CueTrie([[5, 6]])
    tokens, origin = torch.tensor([[9, 5, 6, 2]]), torch.tensor([[E, P, P, P]])
    logp = torch.tensor([[math.nan, -1.0, -1.0, -1.0]])
    one = torch.ones(1, dtype=torch.float64)
    got = explanation_log_ratios(tokens, logp, origin, trie.cues, trie.table(), one, torch.tensor([3]))
    assert float(got[0]) == pytest.approx(2.0)


def test_alpha_and_z_per_batch_and_per_question():
    probe = torch.tensor([False, False, False, False, True])
    groups = torch.tensor([0, 0, 1, 1, 1])
    assert mixture_shares(probe, groups).tolist() == pytest.approx([0.2] * 5)
    assert mixture_shares(probe, groups, "group").tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3])
    right = torch.tensor([True, False, False, False])
    assert failure_rates(right, groups[:4]).tolist() == pytest.approx([0.75] * 4)
    assert failure_rates(right, groups[:4], "question").tolist() == pytest.approx([0.5, 0.5, 1.0, 1.0])
    assert float(failure_rates(torch.ones(3), torch.zeros(3))[0]) > 0.0
    assert len(failure_rates(torch.ones(0), torch.zeros(0))) == 0


def test_guard_refuses_by_name_unless_allowed():
    guard_alpha(torch.tensor([0.1666]), 0.2)
    guard_alpha(torch.tensor([0.5]), 0.2, allow=True)
    with pytest.raises(AlphaError, match=r"alpha = 0\.1700 is above .*0\.1667.*allow_large_alpha"):
        guard_alpha(torch.tensor([0.05, 0.17]), 0.2)


def test_effective_sample_size_and_mismatch_weight():
    assert effective_sample_size(torch.full((8,), 3.0)) == pytest.approx(8.0)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_sample_size(torch.zeros(3)) == 0.0
    got = mismatch_weights(torch.tensor([0.0, 5.0, -1.0]), torch.zeros(3), cap=2.0)
    assert got.tolist() == pytest.approx([1.0, 2.0, math.exp(-1.0)])


def density(**change):
    good = {
        "policy_logp": LOGP,
        "origin": ORIGIN,
        "cut": 4,
        "cue_logp": TRIE.log_prob([5, 6]),
        "failure_rate": 0.5,
    }
    return probe_log_density(**{**good, **change})


NAN = LOGP.clone()
NAN[1] = float("nan")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: density(cut=-1), CutError, "cut = -1"),
        (lambda: density(cut=7), CutError, "cut = 7"),
        (lambda: density(cut=3), CutError, r"cut = 3: origin\[3\] is 0, expected Origin.CUE"),
        (
            lambda: density(policy_logp=LOGP[:5], origin=torch.tensor([P, C, C, C, P]), cut=1),
            ShapeError,
            r"cue_length\[0\] = 2, but row 0 of origin has 3 CUE tokens",
        ),
        (
            lambda: probe_log_densities(
                LOGP[None], ORIGIN[None], torch.tensor([4]), torch.zeros(1, 1), torch.tensor([2]), 0.5
            ),
            ShapeError,
            "cue_logp has 1 columns, cue_length goes to 2",
        ),
        (lambda: density(failure_rate=0.0), FailureRateError, "failure_rate = 0.0, expected 0 < z <= 1"),
        (lambda: density(failure_rate=-0.5), FailureRateError, "failure_rate = -0.5"),
        (lambda: density(failure_rate=float("nan")), FailureRateError, "failure_rate = NaN"),
        (lambda: density(failure_rate=1.5), FailureRateError, "failure_rate = 1.5"),
        (lambda: density(origin=ORIGIN[:-1]), ShapeError, r"origin has shape \(7,\), expected \(8,\)"),
        (lambda: density(policy_logp=LOGP[None]), ShapeError, "policy_logp has shape"),
        (lambda: density(cue_logp=torch.zeros(1, 2)), ShapeError, "cue_logp has shape"),
        (lambda: density(policy_logp=NAN), NonFiniteError, r"policy_logp\[0, 1\] = nan"),
        (lambda: density(kind="coarse"), MethodError, "pool_size = None"),
        (lambda: density(kind="middle"), MethodError, "kind = 'middle'"),
        (lambda: mixture_log_density(LOGP, LOGP, 1.0), AlphaError, "alpha = 1.0, expected 0 <= alpha < 1"),
        (lambda: mixture_log_density(LOGP, LOGP, -0.1), AlphaError, "alpha = -0.1"),
        (lambda: mixture_log_density(LOGP, LOGP, float("nan")), AlphaError, "alpha = nan"),
        (lambda: mixture_log_density(LOGP, LOGP[:3], 0.1), ShapeError, "probe_logp has shape"),
        (lambda: mixture_log_density(NAN, LOGP, 0.1), NonFiniteError, r"policy_logp\[1\] = nan"),
        (lambda: mixture_log_density(LOGP, NAN, 0.1), NonFiniteError, r"probe_logp\[1\] = nan"),
        (lambda: trajectory_weight(LOGP[:2], None, 0.5, 0.1), MethodError, "both or neither"),
        (lambda: trajectory_weight(LOGP[:2], LOGP[:3], 0.5, 0.1), ShapeError, "cue_logp has shape"),
        (lambda: trajectory_weight(LOGP[:2], LOGP[:2], 0.0, 0.1), FailureRateError, "failure_rate = 0.0"),
        (lambda: trajectory_weight(NAN[:2], LOGP[:2], 0.5, 0.1), NonFiniteError, "cue_policy_logp"),
        (lambda: trajectory_weight(None, None, float("nan"), 0.1), FailureRateError, "failure_rate = nan"),
        (lambda: trajectory_weight(None, None, 0.5, 1.0), AlphaError, "alpha = 1.0"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()

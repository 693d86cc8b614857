"""Densities segment by segment, the mixture's bounds and limits, alpha and z."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import AlphaError, CutError, FailureRateError, MethodError, NonFiniteError, ShapeError
from rexrag.method import CueTrie, mixture_log_density, probe_log_density
from rexrag.method.densities import (
    cue_density,
    failure_rates,
    guard_alpha,
    mixture_densities,
    mixture_shares,
    probe_log_densities,
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
        batched = probe_log_densities(logp, origin, cuts, cue_density(table, kind, 3), lengths, rates)
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
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()

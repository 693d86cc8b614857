"""Weights of whole rollouts by hand and at their limits, the sampler's numerics, effective sample size."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import AlphaError, FailureRateError, MethodError, NonFiniteError, ShapeError
from rexrag.method import CueTrie, trajectory_weight
from rexrag.method.weights import effective_sample_size, mismatch_weights, probe_log_ratio, trajectory_weights

TRIE = CueTrie([[5, 6], [5, 7], [5, 7]])
LOGP = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
NAN = torch.tensor([-1.0, math.nan])


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


@given(st.floats(-60, 60))
def test_without_probes_every_rollout_weighs_one(log_r):
    assert float(trajectory_weights(torch.tensor([log_r]), 0.0)[0]) == 1.0


def test_alpha_to_zero_is_the_limit_without_probes():
    log_r = torch.tensor([-math.inf, -2.0, 0.0, 3.0])
    gaps = [float((trajectory_weights(log_r, alpha) - 1).abs().max()) for alpha in (0.1, 0.01, 1e-4)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-2


def test_each_rollout_may_have_its_own_alpha():
    alpha = torch.tensor([0.25, 0.0, 0.25], dtype=torch.float64)
    log_r = torch.tensor([-math.inf, -math.inf, math.log(3.0)])
    assert trajectory_weights(log_r, alpha).tolist() == pytest.approx([4 / 3, 1.0, 1 / 1.5])


def test_the_ratio_of_one_explanation_by_hand():
    assert probe_log_ratio(torch.tensor([-3.0, -2.0]), TRIE.log_prob([5, 7]), 0.5) == pytest.approx(
        math.log(2 / 3) + 5.0 - math.log(0.5)
    )


def test_effective_sample_size_and_mismatch_weight():
    assert effective_sample_size(torch.full((8,), 3.0)) == pytest.approx(8.0)
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert effective_sample_size(torch.zeros(3)) == 0.0
    got = mismatch_weights(torch.tensor([0.0, 5.0, -1.0]), torch.zeros(3), cap=2.0)
    assert got.tolist() == pytest.approx([1.0, 2.0, math.exp(-1.0)])


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: trajectory_weight(LOGP[:2], None, 0.5, 0.1), MethodError, "both or neither"),
        (lambda: trajectory_weight(LOGP[:2], LOGP[:3], 0.5, 0.1), ShapeError, "cue_logp has shape"),
        (lambda: trajectory_weight(LOGP[:2], LOGP[:2], 0.0, 0.1), FailureRateError, "failure_rate = 0.0"),
        (lambda: trajectory_weight(NAN[:2], LOGP[:2], 0.5, 0.1), NonFiniteError, "cue_policy_logp"),
        (lambda: trajectory_weight(None, None, float("nan"), 0.1), FailureRateError, "failure_rate = nan"),
        (lambda: trajectory_weight(None, None, 0.5, 1.0), AlphaError, "alpha = 1.0"),
        (lambda: trajectory_weights(NAN, 0.1), NonFiniteError, r"log_r\[1\] = nan"),
        (lambda: mismatch_weights(LOGP, LOGP[:2], 2.0), ShapeError, "sampler_logp has shape"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()

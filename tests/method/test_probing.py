"""How often dead ends are probed, as probes prove to be worth it or not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import MethodError
from rexrag.method.probing import HALF_LIFE, adaptive_probability, plan_probes, update_probe_success


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
        plan_probes([0], 1.5, 2, torch.Generator())
    with pytest.raises(MethodError, match="right = 3"):
        update_probe_success(0.5, 3, 2)
    with pytest.raises(MethodError, match=r"success = 2\.0"):
        adaptive_probability(0.5, 2.0, 0.1)

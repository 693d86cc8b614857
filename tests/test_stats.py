"""Errors of samples, averages over sets, memory."""

import numpy as np
import pytest

from rexrag import stats as intervals
from rexrag.stats import differs, interval, macro_interval, paired_p, sampled_error, score_interval, share


def test_the_error_of_a_sample_is_the_spread_of_many_samples():
    """Stratified and plain samples of a finite set, drawn many times, against the formula's mean."""
    rng = np.random.default_rng(0)
    strata = [rng.random(60) < 0.9, rng.random(40) < 0.2]
    sizes, drawn = [60, 40], [12, 8]
    means, errors = [], []
    for _ in range(4000):
        parts = [rng.choice(s.astype(float), n, replace=False) for s, n in zip(strata, drawn, strict=True)]
        means.append(np.concatenate(parts).mean())
        errors.append(sampled_error([(list(p), size) for p, size in zip(parts, sizes, strict=True)]) ** 2)
    assert np.sqrt(np.mean(errors)) == pytest.approx(np.std(means), rel=0.05)


def test_nothing_is_uncertain_where_everything_was_drawn():
    assert sampled_error([([0.0, 1.0, 1.0], 3)]) == 0.0
    assert sampled_error([]) == sampled_error([([1.0], 9)]) == 0.0
    plain = [0.0, 1.0, 0.0, 1.0]
    assert sampled_error([(plain, 10**9)]) == pytest.approx(np.std(plain, ddof=1) / 2, rel=1e-6)


def test_a_macro_average_weighs_groups_alike():
    rng = np.random.default_rng(1)
    groups = [list((rng.random(n) < p).astype(float)) for n, p in ((400, 0.2), (50, 0.7))]
    found = macro_interval(groups)
    means = [np.mean(group) for group in groups]
    assert found["value"] == pytest.approx(np.mean(means)) and found["n"] == 2
    error = 0.5 * np.sqrt(sum(np.var(group) / len(group) for group in groups))
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert macro_interval([]) == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 0}
    with pytest.raises(ValueError, match="every group"):
        macro_interval([[1.0], []])


def test_resampling_in_parts_changes_nothing(monkeypatch):
    values = list((np.random.default_rng(2).random(200) < 0.4).astype(float))
    differences = list(np.random.default_rng(3).choice([-1.0, 0.0, 1.0], 50))
    whole = interval(values), paired_p(differences), macro_interval([values])
    monkeypatch.setattr(intervals, "MEMORY", 20_000)
    parts = interval(values), paired_p(differences), macro_interval([values])
    for one, other in zip(whole, parts, strict=True):
        assert one == pytest.approx(other, abs=0.01)


def test_a_difference_needs_an_interval_without_zero_and_a_small_p():
    few = [0.02, 0.03, 0.05, 0.01, 0.04]
    many = [*few, 0.02, 0.03]
    told = [interval(values) | {"p": paired_p(values)} for values in (few[:1], few[:2], few, many)]
    assert all(row["low"] > 0 for row in told)
    assert [differs(row) for row in told] == [False, False, False, True], "five pairs have p = .0625 at least"
    assert differs({"value": 0.1, "low": 0.05, "high": 0.2, "n": 2}), "a macro average has no p"
    assert not differs({"value": 0.1, "low": -0.05, "high": 0.2, "n": 9, "p": 0.01})


def test_values_equal_but_for_rounding_have_no_spread():
    values = [0.13000000000000003, 0.13, 0.13]
    found = interval(values)
    assert found["low"] == found["value"] == found["high"] == pytest.approx(0.13)


def test_all_wrong_does_not_prove_that_the_rate_is_zero():
    assert score_interval([0.0] * 100) == share(0, 100)
    assert score_interval([0.0] * 100)["high"] == pytest.approx(0.037, abs=1e-3)
    assert score_interval([1.0] * 8)["low"] < 0.7
    mixed = [0.0, 1.0, 0.5, 1.0]
    assert score_interval(mixed) == interval(mixed)
    assert score_interval([]) == interval([])

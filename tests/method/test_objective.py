"""The surrogate against a scalar loop, its gradient, its aggregation, and what it drops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.errors import MethodError, NonFiniteError, ShapeError
from rexrag.method import clipped_surrogate, k3_kl
from rexrag.method.objective import aggregate, aggregation_normalizer, kl_penalty, ratio_by_label


def streams(rows, length, seed):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(rows, length, generator=g, dtype=torch.float64) * 3
    behaviour = logp + torch.randn(rows, length, generator=g, dtype=torch.float64) * 0.4
    advantages = torch.randn(rows, generator=g, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=g) < 0.7
    return logp, behaviour, advantages, mask


def scalar_reference(logp, behaviour, advantages, mask, low, high, weight, aggregation):
    rows, tokens = [], 0
    for i in range(len(logp)):
        terms = []
        for t in range(len(logp[i])):
            if not mask[i][t]:
                continue
            ratio = math.exp(logp[i][t] - behaviour[i][t])
            clipped = min(max(ratio, 1 - low), 1 + high)
            terms.append(min(ratio * advantages[i], clipped * advantages[i]) * weight[i][t])
        tokens += len(terms)
        if terms:
            rows.append(sum(terms))
    if not rows:
        return 0.0
    if aggregation == "token-mean":
        return -sum(rows) / tokens
    return -sum(rows) / len(rows)


@settings(max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 10_000),
    st.floats(0.05, 0.5),
    st.floats(0.05, 0.5),
    st.sampled_from(["token-mean", "sequence-sum"]),
)
def test_equals_a_scalar_loop(rows, length, seed, low, high, aggregation):
    logp, behaviour, advantages, mask = streams(rows, length, seed)
    weight = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss, metrics = clipped_surrogate(
        logp, behaviour, advantages, mask, low, high, weight=weight, aggregation=aggregation
    )
    lists = [x.tolist() for x in (logp, behaviour, advantages, mask)]
    assert float(loss) == pytest.approx(
        scalar_reference(*lists, low, high, weight.tolist(), aggregation), abs=1e-12
    )
    assert metrics["tokens"] == int(mask.sum())


def test_gradient_is_the_numerical_one():
    logp, behaviour, advantages, mask = streams(3, 5, 1)
    logp.requires_grad_(True)

    def loss(x):
        return clipped_surrogate(x, behaviour, advantages, mask, aggregation="sequence-sum")[0]

    assert torch.autograd.gradcheck(loss, logp)
    assert torch.autograd.gradcheck(lambda x: k3_kl(x, behaviour), logp)


def test_gradient_at_the_start_is_plain_reinforce():
    logp, _, advantages, mask = streams(3, 5, 2)
    logp.requires_grad_(True)
    loss, metrics = clipped_surrogate(logp, logp.detach(), advantages, mask)
    (got,) = torch.autograd.grad(loss, logp)
    assert torch.allclose(got, -(advantages[:, None] * mask) / mask.sum())
    assert metrics["ratio_mean"] == 1.0 and metrics["clip_share"] == 0.0


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-sum"])
def test_micro_batches_sum_to_the_whole(aggregation):
    logp, behaviour, advantages, mask = streams(6, 7, 3)
    normalizer = aggregation_normalizer(mask, aggregation)
    whole, _ = clipped_surrogate(logp, behaviour, advantages, mask, aggregation=aggregation)
    parts = sum(
        clipped_surrogate(
            logp[i], behaviour[i], advantages[i], mask[i], aggregation=aggregation, normalizer=normalizer
        )[0]
        for i in (slice(0, 1), slice(1, 4), slice(4, 6))
    )
    assert float(parts) == pytest.approx(float(whole), abs=1e-14)
    assert normalizer == sum(aggregation_normalizer(mask[i : i + 1], aggregation) for i in range(6))


def test_padding_and_order_do_not_change_the_loss():
    logp, behaviour, advantages, mask = streams(5, 6, 4)
    whole, _ = clipped_surrogate(logp, behaviour, advantages, mask)
    order = torch.randperm(5)
    padded = [torch.nn.functional.pad(x[order], (0, 4), value=v) for x, v in ((logp, 7.0), (behaviour, -3.0))]
    wide = torch.nn.functional.pad(mask[order], (0, 4))
    again, _ = clipped_surrogate(*padded, advantages[order], wide)
    assert float(again) == pytest.approx(float(whole), abs=1e-14)


def test_a_masked_token_has_exactly_no_gradient_whatever_it_says():
    logp, behaviour, advantages, mask = streams(4, 6, 5)
    logp = torch.where(mask, logp, torch.tensor(float("nan"), dtype=torch.float64)).requires_grad_(True)
    loss, metrics = clipped_surrogate(logp, behaviour, advantages, mask)
    (got,) = torch.autograd.grad(loss, logp)
    assert bool((got[~mask] == 0).all()) and bool(torch.isfinite(got).all())
    assert metrics["nonfinite_tokens"] == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_a_non_finite_token_is_dropped_and_counted(bad):
    logp, behaviour, advantages, _ = streams(2, 3, 6)
    mask = torch.ones(2, 3, dtype=torch.bool)
    broken = behaviour.clone()
    broken[0, 1] = bad
    logp.requires_grad_(True)
    loss, metrics = clipped_surrogate(logp, broken, advantages, mask)
    (got,) = torch.autograd.grad(loss, logp)
    assert metrics["nonfinite_tokens"] == 1.0 and metrics["tokens"] == 5.0
    keep = mask.clone()
    keep[0, 1] = False
    expected, _ = clipped_surrogate(logp.detach(), behaviour, advantages, keep, normalizer=6.0)
    assert float(loss.detach()) == pytest.approx(float(expected))
    assert got[0, 1] == 0.0 and bool(torch.isfinite(got).all())


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-sum"])
def test_micro_batches_sum_to_the_whole_when_tokens_are_dropped(aggregation):
    logp, behaviour, advantages, mask = streams(4, 5, 3)
    mask[:2] = True
    behaviour[0, 1], behaviour[1] = -math.inf, math.nan
    normalizer = aggregation_normalizer(mask, aggregation)
    whole, _ = clipped_surrogate(logp, behaviour, advantages, mask, aggregation=aggregation)
    whole_kl, dropped = kl_penalty(logp, behaviour, mask, aggregation)
    parts, parts_kl = torch.zeros(()).double(), torch.zeros(()).double()
    for i in range(4):
        row = (logp[i : i + 1], behaviour[i : i + 1])
        parts += clipped_surrogate(
            *row, advantages[i : i + 1], mask[i : i + 1], aggregation=aggregation, normalizer=normalizer
        )[0]
        parts_kl += kl_penalty(*row, mask[i : i + 1], aggregation, normalizer)[0]
    assert dropped == 6
    assert float(parts) == pytest.approx(float(whole)) and float(parts_kl) == pytest.approx(float(whole_kl))


def test_a_reference_that_is_not_finite_costs_a_token_not_the_gradient():
    logp, reference, _, mask = streams(2, 4, 1)
    mask[0, 2] = True
    reference[0, 2] = -math.inf
    logp.requires_grad_(True)
    loss, dropped = kl_penalty(logp, reference, mask)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert dropped == 1 and bool(torch.isfinite(gradient).all()) and gradient[0, 2] == 0.0


def test_ratios_are_bounded():
    logp = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    loss, _ = clipped_surrogate(
        logp,
        torch.full((1, 1), -900.0, dtype=torch.float64),
        -torch.ones(1),
        torch.ones(1, 1, dtype=torch.bool),
    )
    assert float(loss.detach()) == pytest.approx(math.exp(20.0))


def test_truncated_tokens_use_the_capped_ratio_as_a_constant():
    logp = torch.tensor([[math.log(0.6), math.log(0.1)]], dtype=torch.float64, requires_grad=True)
    behaviour = torch.log(torch.tensor([[0.2, 0.4]], dtype=torch.float64))
    on = torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = clipped_surrogate(
        logp, behaviour, torch.tensor([2.0]), on, truncated=on, aggregation="sequence-sum"
    )
    (got,) = torch.autograd.grad(loss, logp)
    assert got.tolist()[0] == pytest.approx([-2.0 * 1.0, -2.0 * 0.25])
    assert metrics["clip_share"] == 0.0


def test_k3_is_zero_at_equality_and_never_negative():
    logp = -torch.rand(4, 4, dtype=torch.float64)
    assert bool((k3_kl(logp, logp) == 0).all())
    reference = logp + torch.randn(4, 4, dtype=torch.float64)
    assert bool((k3_kl(logp, reference) >= 0).all())
    d = reference - logp
    assert torch.allclose(k3_kl(logp, reference), d.exp() - d - 1)


def test_diagnostics_by_label_count_every_trained_token_once():
    logp, behaviour, advantages, mask = streams(3, 8, 8)
    label = torch.randint(0, 3, (3, 8))
    table = ratio_by_label(logp, behaviour, advantages, mask, label)
    _, metrics = clipped_surrogate(logp, behaviour, advantages, mask)
    assert table[:, 0].sum() == mask.sum() and table[3, 0] == 0
    assert float(table[:, 1].sum() / table[:, 0].sum()) == pytest.approx(metrics["ratio_mean"])
    assert float(table[:, 2].sum() / table[:, 0].sum()) == pytest.approx(metrics["clip_share"])
    held = torch.rand(3, 8) < 0.5
    table = ratio_by_label(logp, behaviour, advantages, mask, label, truncated=held)
    _, metrics = clipped_surrogate(logp, behaviour, advantages, mask, truncated=held)
    assert float(table[:, 2].sum() / table[:, 0].sum()) == pytest.approx(metrics["clip_share"])


def test_nothing_trained_is_a_zero_loss():
    logp, behaviour, advantages, mask = streams(2, 3, 9)
    logp.requires_grad_(True)
    loss, _ = clipped_surrogate(logp, behaviour, advantages, torch.zeros_like(mask))
    assert float(loss.detach()) == 0.0
    assert bool((torch.autograd.grad(loss, logp)[0] == 0).all())
    assert float(aggregate(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))) == 0.0


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (
            {"behaviour_logp": torch.zeros(2, 2)},
            ShapeError,
            r"behaviour_logp has shape \(2, 2\), expected \(2, 3\)",
        ),
        ({"advantages": torch.zeros(3)}, ShapeError, r"advantages has shape \(3,\), expected \(2,\)"),
        ({"mask": torch.ones(2, 3)}, MethodError, "mask has dtype"),
        ({"clip_low": 1.5}, MethodError, "clip_low = 1.5"),
        ({"advantages": torch.tensor([0.0, float("nan")])}, NonFiniteError, r"advantages\[1\] = nan"),
        (
            {"aggregation": "token_mean"},
            MethodError,
            "aggregation = 'token_mean', expected one of token-mean",
        ),
        ({"aggregation": "mean", "normalizer": 3.0}, MethodError, "aggregation = 'mean'"),
        ({"weight": torch.ones(2)}, ShapeError, "weight has shape"),
        ({"weight": torch.full((2, 3), math.nan)}, NonFiniteError, r"weight\[0, 0\] = nan"),
        (
            {"truncated": torch.ones(2, 3, dtype=torch.bool), "truncation_cap": math.nan},
            MethodError,
            "truncation_cap = nan, expected > 0",
        ),
        ({"logp": torch.zeros(3)}, ShapeError, r"logp has shape \(3,\), expected \[B, T\]"),
    ],
)
def test_bad_input_is_named(change, error, says):
    good = {
        "logp": torch.zeros(2, 3),
        "behaviour_logp": torch.zeros(2, 3),
        "advantages": torch.zeros(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(error, match=says):
        clipped_surrogate(**{**good, **change})


def test_the_normalizer_of_an_unknown_aggregation_is_refused():
    with pytest.raises(MethodError, match="aggregation = 'sum'"):
        aggregation_normalizer(torch.ones(1, 1, dtype=torch.bool), "sum")

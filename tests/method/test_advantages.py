"""Group-relative advantages against a plain loop, and their corner cases."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import MethodError, NonFiniteError, ShapeError
from rexrag.method import group_advantages

batches = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.integers(0, 4)), min_size=1, max_size=25
)


def reference(rows, scale, baseline):
    out = []
    for i, (reward, group) in enumerate(rows):
        members = [r for r, g in rows if g == group]
        others = [r for j, (r, g) in enumerate(rows) if g == group and j != i]
        if len(members) == 1 or len(set(members)) == 1:
            out.append(0.0)
            continue
        value = reward - statistics.mean(members if baseline == "mean" else others)
        out.append(value / (statistics.stdev(members) + 1e-6) if scale == "std" else value)
    return out


@given(batches, st.sampled_from(["std", "none"]), st.sampled_from(["mean", "leave-one-out"]))
def test_equals_a_plain_loop_on_ragged_groups(rows, scale, baseline):
    rewards = torch.tensor([r for r, _ in rows], dtype=torch.float64)
    groups = torch.tensor([g for _, g in rows])
    got = group_advantages(rewards, groups, scale, baseline)
    assert got.tolist() == pytest.approx(reference(rows, scale, baseline), abs=1e-9)


@given(batches)
def test_sums_to_zero_in_each_group(rows):
    rewards, groups = torch.tensor([r for r, _ in rows]), torch.tensor([g for _, g in rows])
    got = group_advantages(rewards.double(), groups)
    for group in groups.unique():
        assert float(got[groups == group].sum()) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out"])
def test_a_group_of_one_and_a_group_of_equals_get_exactly_zero(scale, baseline):
    rewards = torch.tensor([0.7, 0.1, 0.1, 0.1])
    got = group_advantages(rewards, torch.tensor([5, 9, 9, 9]), scale, baseline)
    assert got.tolist() == [0.0] * 4


def test_order_does_not_matter():
    rewards, groups = torch.rand(20, dtype=torch.float64), torch.arange(20) % 3
    order = torch.randperm(20)
    assert torch.allclose(
        group_advantages(rewards, groups)[order], group_advantages(rewards[order], groups[order])
    )


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: group_advantages(torch.zeros(3), torch.zeros(2)), ShapeError, "groups has shape"),
        (lambda: group_advantages(torch.zeros(1, 3), torch.zeros(3)), ShapeError, "rewards has shape"),
        (
            lambda: group_advantages(torch.tensor([float("nan")]), torch.zeros(1)),
            NonFiniteError,
            r"rewards\[0\] = nan",
        ),
        (lambda: group_advantages(torch.zeros(1), torch.zeros(1), scale="max"), MethodError, "scale = 'max'"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()

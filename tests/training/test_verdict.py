"""The verdict on a run: learned, or the first reason that explains why not."""

import pytest

from rexrag.training.verdict import NONFINITE_LIMIT, NonFiniteWatch, dropped_line, judge, weights_changed


def evaluation(right, n=300, unanswered=0.0):
    return {"em_by_question": [1.0] * right + [0.0] * (n - right), "unanswered": unanswered}


def step(number=1, updates=8.0, dropped=0.0, **more):
    row = {
        "step": number,
        "updates": updates,
        "nonfinite_updates": dropped,
        "groups/no_signal": 0.5,
        "lr": 3e-4,
    }
    return row | more


def silent(**more):
    """A step in which no group had a signal."""
    return step(updates=0.0, **{"groups/no_signal": 1.0, "em/train": 0.0, "dead_ends/unanswered": 0.0} | more)


GOOD = [step(i) for i in range(1, 11)]


def test_a_rise_whose_interval_is_above_0_is_learned():
    verdict = judge([evaluation(100), evaluation(160)], GOOD)
    assert verdict.kind == "learned" and verdict.line.startswith("Learned: held-out EM rose by 20.0 points")
    assert verdict.cause == verdict.change == ""


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({}, "all wrong"),
        ({"em/train": 1.0}, "all right"),
        ({"dead_ends/unanswered": 0.9}, "90 % of the rollouts gave no answer"),
    ],
)
def test_a_run_without_a_signal_says_that_no_weight_changed_and_why(more, cause):
    verdict = judge([evaluation(100), evaluation(100)], [silent(**more)] * 3)
    assert verdict.kind == "no-signal"
    assert verdict.sentence == "No group had a signal in 3 of 3 steps, so no weight changed."
    assert cause in verdict.cause and verdict.change


def test_a_run_whose_weights_did_not_change_is_never_called_learned():
    """A sampler that is not deterministic may answer better by chance."""
    verdict = judge([evaluation(100), evaluation(200)], [silent()] * 3)
    assert verdict.kind == "no-signal" and not weights_changed([silent()])


def test_a_learner_that_counts_no_updates_is_judged_by_its_groups():
    rows = [{"step": 1, "groups/no_signal": 1.0}, {"step": 2, "groups/no_signal": 0.9}]
    assert weights_changed(rows) and not weights_changed(rows[:1])


def test_updates_of_a_kl_term_alone_are_no_signal():
    rows = [step(**{"groups/no_signal": 1.0, "em/train": 0.0, "dead_ends/unanswered": 0.0})] * 4
    verdict = judge([evaluation(100), evaluation(100)], rows)
    assert verdict.kind == "no-signal" and "nothing but the KL term" in verdict.sentence


def test_dropped_updates_are_named_before_the_missing_signal_that_they_cause():
    """A learning rate of 10: the first updates destroy the policy, and then nobody answers."""
    rows = [step(lr=10.0, updates=4.0, dropped=4.0), *[silent(nonfinite_updates=8.0, lr=10.0)] * 7]
    verdict = judge([evaluation(100), evaluation(0, unanswered=1.0)], rows)
    assert verdict.kind == "not-finite" and verdict.sentence.startswith("60 of 64 updates were dropped")
    assert "learning rate 10" in verdict.cause and "learner.lr" in verdict.change


def test_one_dropped_update_of_many_explains_nothing():
    rows = [*GOOD, step(dropped=1.0)]
    assert judge([evaluation(100), evaluation(100)], rows).kind == "no-change"


def test_a_format_that_collapsed_is_told_from_one_that_never_was():
    assert judge([evaluation(100), evaluation(20, unanswered=0.9)], GOOD).kind == "format-collapsed"
    before, after = evaluation(20, unanswered=0.85), evaluation(20, unanswered=0.9)
    assert judge([before, after], GOOD).kind == "no-change"


def test_a_fall_is_worse_and_not_no_change():
    assert judge([evaluation(160), evaluation(100)], GOOD).kind == "worse"


def test_few_held_out_questions_cannot_tell():
    verdict = judge([evaluation(3, n=12), evaluation(4, n=12)], GOOD)
    assert verdict.kind == "too-few-questions" and "12" in verdict.sentence
    assert judge([], GOOD).kind == "too-few-questions"
    swapped = {"em_by_question": [0.0] * 30 + [1.0] * 30 + [0.0] * 40, "unanswered": 0.0}
    assert judge([evaluation(30, n=100), swapped], GOOD).kind == "too-few-questions"


def test_equal_evaluations_of_many_questions_are_no_change():
    verdict = judge([evaluation(100), evaluation(101)], GOOD)
    assert verdict.kind == "no-change" and "not significantly different from 0" in verdict.sentence


def test_a_run_that_is_still_going_has_not_learned_but_says_what_is_wrong():
    rows = [evaluation(100), evaluation(160)]
    assert judge(rows, GOOD, finished=False).kind == "unfinished"
    assert judge(rows, [silent()] * 3, finished=False).kind == "no-signal"
    assert judge([], [], finished=False).sentence == "Not finished: 0 steps so far."


def test_updates_dropped_in_a_row_end_a_run_with_the_likely_cause():
    watch = NonFiniteWatch()
    assert watch.too_many(step(1, updates=4.0, dropped=4.0, lr=10.0)) is None
    said = watch.too_many(step(2, updates=0.0, dropped=8.0, lr=10.0))
    assert said and "step 2" in said and "learning rate 10" in said and "\n" not in said


def test_an_update_between_dropped_ones_begins_the_count_anew():
    watch = NonFiniteWatch()
    for number in range(3 * NONFINITE_LIMIT):
        dropped = float(number % NONFINITE_LIMIT != 0)
        assert watch.too_many(step(number, updates=1.0 - dropped, dropped=dropped)) is None


def test_a_step_says_at_once_that_it_dropped_updates():
    assert dropped_line(step()) is None
    assert (
        dropped_line(step(3, updates=6.0, dropped=2.0)) == "step 3: 2 of 8 updates were dropped as not finite"
    )


@pytest.mark.parametrize("before", [[0.0], [0.0, 0.0], [0.0] * 5])
def test_a_handful_of_questions_is_never_learned_or_worse(before):
    after = [1.0] * len(before)
    steps = [{"updates": 4, "groups/no_signal": 0.2}]
    for first, last in ((before, after), (after, before)):
        rows = [{"em_by_question": values, "unanswered": 0.0} for values in (first, last)]
        assert judge(rows, steps).kind == "too-few-questions"

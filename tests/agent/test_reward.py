"""Answer scores against hand-computed values, and their properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.agent.reward import (
    AnswerScore,
    exact_match,
    f1,
    has_answer,
    normalize_answer,
    score_answer,
    sub_exact_match,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Beatles!", "beatles"),
        ("an apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("  ", ""),
        ("A", ""),
        ("«Ça»", "«ça»"),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


@given(st.text())
def test_normalising_ignores_case_and_ascii_punctuation(text):
    assert normalize_answer(normalize_answer(text).replace(" ", " .,")) in {
        normalize_answer(normalize_answer(text)),
        normalize_answer(text),
    }
    assert "  " not in normalize_answer(text)


def test_exact_match_needs_equality_with_any_answer():
    assert exact_match("The Titan IIIE.", ["Atlas", "titan iiie"]) == 1.0
    assert exact_match("Titan", ["titan iiie"]) == 0.0
    assert exact_match("x", []) == 0.0


def test_f1_by_hand():
    # 2 common words; precision 2/3, recall 2/2.
    assert f1("president james madison", ["James Madison"]) == pytest.approx(0.8)
    assert f1("madison madison", ["james madison"]) == pytest.approx(0.5)
    assert f1("bob", ["al", "bob"]) == 1.0
    assert f1("", ["al"]) == 0.0
    assert f1("yes it is", ["yes"]) == 0.0
    assert f1("yes", ["Yes."]) == 1.0


@pytest.mark.parametrize("text", ["A", "The The", "!", ""])
def test_answers_of_which_nothing_is_left_are_equal(text):
    assert (exact_match(text, ["an"]), f1(text, ["an"]), sub_exact_match(text, ["an"])) == (1.0, 1.0, 1.0)
    assert (exact_match(text, ["Al"]), f1(text, ["Al"])) == (0.0, 0.0)


def test_sub_exact_match_looks_inside_the_prediction():
    assert sub_exact_match("it was James Madison in 1812", ["madison"]) == 1.0
    assert sub_exact_match("Madison", ["James Madison"]) == 0.0
    assert sub_exact_match("anything", ["The"]) == 0.0  # an answer of nothing is not found in everything


@given(st.text(max_size=30), st.lists(st.text(max_size=30), max_size=3))
def test_scores_are_ordered_fractions(prediction, answers):
    em, token_f1, sub = (score(prediction, answers) for score in (exact_match, f1, sub_exact_match))
    assert 0.0 <= em <= sub <= 1.0
    assert 0.0 <= token_f1 <= 1.0
    assert token_f1 == 1.0 or not em
    assert exact_match(prediction, [*answers, prediction]) == 1.0


def test_an_answer_in_a_passage_is_whole_words():
    assert has_answer('"Paris"\nThe capital, of FRANCE!', ["capital of France"])
    assert has_answer("the U.S. Army", ["US army"])
    assert not has_answer("France", ["ran"]) and not has_answer("yes, it is", ["Yes"])
    assert not has_answer("anything", ["the", "..."])  # nothing is left of these


def test_no_answer_scores_nothing():
    assert score_answer(None, ["a", "the"]) == AnswerScore(0.0, 0.0, 0.0)
    assert score_answer("in Paris", ["Paris"]) == AnswerScore(0.0, f1("in Paris", ["Paris"]), 1.0)

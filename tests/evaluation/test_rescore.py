"""Re-scoring recorded traces: 125 real rollouts, and files that are wrong."""

import json
from pathlib import Path

import pytest

from rexrag.errors import DataError
from rexrag.evaluation.rescore import score_traces

GOOD = {"question": "q?", "answers": ["Al"], "response": "<think> x </think> <answer> al </answer>"}


def write(tmp_path, *rows):
    path = tmp_path / "traces.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_recorded_scores_of_real_traces_are_reproduced(shared):
    """Recorded by another implementation: every EM, F1 and prediction of 125 rollouts must agree."""
    path = shared / "data" / "traces" / "search_r1_3b_base_bamboogle.jsonl"
    scores, totals = score_traces(path)
    recorded = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [score.em for score in scores] == [row["em"] for row in recorded]
    assert [score.f1 for score in scores] == pytest.approx([row["f1"] for row in recorded])
    assert [score.prediction for score in scores] == [row["prediction"] for row in recorded]
    assert totals.disagreements == 0
    assert totals.em == pytest.approx(11 / 125)
    # This policy always searches once, reads, and answers at once, without a thought in between.
    assert {(s.searches, s.answers, s.malformed, s.notices, s.well_formed) for s in scores} == {
        (1, 1, 0, 0, False)
    }
    assert totals.unanswered == 0


def test_counts_and_disagreements(tmp_path):
    path = write(
        tmp_path,
        GOOD | {"em": 1, "f1": 1.0, "prediction": "al"},
        GOOD | {"em": 0.0, "prediction": "Bob"},
        GOOD | {"response": "<search> a </search> <Answer> al </Answer>", "em": 0, "prediction": None},
        "",
        GOOD | {"response": "", "answers": "Al"},
    )
    scores, totals = score_traces(path)
    assert [score.row for score in scores] == [1, 2, 3, 5]
    assert [score.disagrees for score in scores] == [(), ("em", "prediction"), (), ()]
    assert (scores[2].searches, scores[2].answers, scores[2].malformed, scores[2].prediction) == (
        1,
        0,
        2,
        None,
    )
    assert (totals.rows, totals.answered, totals.unanswered) == (4, 2, 2)
    assert (totals.searches, totals.answers, totals.malformed, totals.disagreements) == (1, 2, 2, 1)
    assert totals.em == totals.f1 == totals.sub_em == 0.5
    assert totals.well_formed == 2


def test_an_empty_file_has_zero_totals(tmp_path):
    scores, totals = score_traces(write(tmp_path, ""))
    assert scores == []
    assert (totals.rows, totals.em) == (0, 0.0)


CASES = Path(__file__).parents[1] / "cases"


def test_answers_of_which_nothing_is_left_after_normalisation_are_right():
    scores, _ = score_traces(CASES / "traces_f1_article.jsonl")
    assert [(score.em, score.f1, score.sub_em) for score in scores] == [(1.0, 1.0, 1.0)] * 2


def test_a_thought_that_the_prompt_opened_is_well_formed(tmp_path):
    ((score,), _) = score_traces(CASES / "traces_think_in_prompt.jsonl")
    assert score.well_formed
    row = {"question": "q?", "answers": "Al", "response": "x</think><answer>Al</answer>"}
    opened, closed, spelled = (
        write(
            tmp_path,
            row | {"prompt": "q?<|assistant|><think>\n"},
            row | {"prompt": "q?<|assistant|>"},
            row | {"response": "<think>a</think>b</think><answer>Al</answer>"},
        )
        .read_text()
        .splitlines()
    )
    path = write(tmp_path, opened, closed, spelled)
    assert [score.well_formed for score in score_traces(path)[0]] == [True, False, False]


@pytest.mark.parametrize("answer", ["Al", 7, ["Al", 7], '["Al"]', {"value": "Al", "aliases": ["A. L."]}])
def test_answers_are_read_by_the_rule_of_question_files(tmp_path, answer):
    ((score,), _) = score_traces(write(tmp_path, GOOD | {"answers": answer}))
    assert score.em == float(answer != 7)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"question": "q", "answers": ["a"]}, "response"),
        (GOOD | {"response": 3}, "response"),
        (GOOD | {"response": "\ud800"}, "response"),
        (GOOD | {"answers": []}, "answers"),
        (GOOD | {"answers": [[1]]}, "answers.0"),
        (GOOD | {"answers": None}, "answers"),
        (GOOD | {"question": " "}, "question"),
        (GOOD | {"em": "1"}, "em"),
        (GOOD | {"em": 100}, "em"),
        (GOOD | {"f1": float("nan")}, "f1"),
        (GOOD | {"prediction": 4}, "prediction"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, field):
    path = write(tmp_path, GOOD, row)
    with pytest.raises(DataError) as error:
        score_traces(path)
    assert f"{path}, row 2, field '{field}'" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_json_is_named(tmp_path):
    with pytest.raises(DataError, match="row 2"):
        score_traces(write(tmp_path, GOOD, "not json"))
    with pytest.raises(DataError, match="no such file"):
        score_traces(tmp_path / "absent.jsonl")

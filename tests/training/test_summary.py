"""`summary.json` holds the verdict and the ends of the held-out curve."""

import json

from rexrag.config.files import parse_config
from rexrag.training.summary import write_summary

COUNTS = {
    "step": 2,
    "generated_tokens": 100,
    "prefilled_tokens": 50,
    "spent_tokens": 150,
    "rollouts": 8,
    "seconds": 1.5,
}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(right, where="held-out", **more):
    em = [1.0] * right + [0.0] * (100 - right)
    habits = {"unanswered": 0.25, "invalid": 0.5, "searches": 1.0}
    return {"set": where, "em": {"value": right / 100}, "em_by_question": em} | habits | more


def test_a_summary_is_the_verdict_the_counts_and_both_ends(tmp_path):
    rows = [evaluation(30), evaluation(20, "fresh"), evaluation(50), evaluation(60, unanswered=0.125)]
    write(tmp_path / "eval.jsonl", rows)
    write(tmp_path / "metrics.jsonl", [{"step": 1, "updates": 8.0}, {"step": 2, "updates": 8.0}])
    summary = write_summary(parse_config({}, ["seed=3"]), tmp_path, COUNTS)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert summary["verdict"]["kind"] == "learned" and next(iter(summary)) == "verdict"
    assert (summary["em_before"]["value"], summary["em_after"]["value"]) == (0.3, 0.6)
    assert (summary["unanswered_before"], summary["unanswered_after"]) == (0.25, 0.125)
    assert summary["invalid_after"] == 0.5 and summary["searches_before"] == 1.0
    assert summary["rise"]["low"] > 0 and summary["em_fresh_before"] == summary["em_fresh_after"]
    assert (summary["seed"], summary["steps"], summary["seconds"]) == (3, 2, 1.5)


def test_a_run_without_held_out_questions_has_a_summary(tmp_path):
    write(tmp_path / "metrics.jsonl", [{"step": 1, "updates": 0.0, "groups/no_signal": 1.0, "em/train": 0.0}])
    summary = write_summary(parse_config({}), tmp_path, COUNTS | {"step": 1})
    assert summary["verdict"]["sentence"] == "No group had a signal in 1 of 1 step, so no weight changed."
    assert "em_before" not in summary and "rise" not in summary

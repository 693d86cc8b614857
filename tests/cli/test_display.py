"""What the terminal shows fits 80 columns, and says the same numbers as the page."""

import io

from rich.console import Console

from rexrag.cli.display import (
    RunProgress,
    comparison_table,
    format_interval,
    format_points,
    live_line,
    step_note,
    summary_table,
)
from rexrag.experiments.analysis import findings

EM = {"value": 0.412, "low": 0.356, "high": 0.468, "n": 300}
RISE = {"value": 0.351, "low": 0.291, "high": 0.411, "n": 300}
STEP = {
    "step": 120, "em/train": 0.45, "dead_ends/rate": 0.3, "dead_ends/unanswered": 0.1, "probes/kept": 12.0,
    "probes/drawn": 30.0, "generated_tokens": 1_234_567, "seconds": 1000.0,
}  # fmt: skip


def shown(thing, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(thing)
    return console.file.getvalue()


def summary(**more):
    habits = {
        f"{name}_{when}": 0.125
        for name in ("unanswered", "invalid", "searches")
        for when in ("before", "after")
    }
    ends = {"em_before": EM, "em_after": EM, "rise": RISE}
    return {"steps": 60, "generated_tokens": 110_193, "seconds": 4210.0} | ends | habits | more


def test_shares_are_percentages_and_differences_points():
    assert format_interval(EM) == "41.2 [35.6, 46.8]" and format_points(RISE) == "+35.1 [+29.1, +41.1]"
    assert format_interval({"value": 0.5, "low": 0.5, "high": 0.5}) == "50.0"


def test_a_result_has_a_row_a_measure_and_a_column_a_run_in_80_columns():
    text = shown(summary_table([("rex-rag-distill", summary()), ("grpo", summary(em_before=None))]))
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert max(map(len, text.splitlines())) <= 80 and "rex-rag-distill" in text
    assert rows["no answer, %"].count("12.5 → 12.5") == 2 and rows["searches a question"].count("0.12") == 4
    assert "invalid turns a question" in rows and "1 h 10 min" in rows["time"]
    assert "–" in rows["EM before, %"], "a run without an evaluation"


def arm(value, gap=None):
    measures = {"em_at_budget": EM | {"value": value}}
    if gap is not None:
        measures["em_at_budget_difference"] = RISE | {
            "value": gap,
            "low": gap - 0.05,
            "high": gap + 0.05,
            "p": 0.031,
        }
    spent = {"steps": 40.0, "rollouts": 9000.0, "generated_tokens": 61_000.0, "seconds": 110_193.0}
    return measures | spent | {"diagnostics": {"dead_ends/rate": 0.31, "searches/mean": 1.5}}


def comparison(names):
    arms = {name: arm(0.4 + 0.1 * i, 0.1 * i if i else None) for i, name in enumerate(names)}
    facts = {"control": names[0], "seeds": [1, 2, 3, 4, 5, 6], "budget": "generated", "amount": 60000}
    return facts | {"arms": arms}


def test_a_comparison_is_one_table_of_80_columns_with_a_column_an_arm():
    for names in (["grpo", "rex-rag-distill", "rex-rag"], ["grpo", "rex-rag-distill", "rex-rag", "dapo"]):
        text = shown(comparison_table(comparison(names)))
        assert max(len(line) for line in text.splitlines()) <= 80
        assert all(name in text for name in names) and "+10.0" in text and "30 h 37 min" in text
        assert "EM at budget, %" in text and "minus grpo" in text and "60,000 generated tokens" in text


def test_a_finding_says_whether_a_difference_is_significant():
    result = comparison(["grpo", "rex-rag-distill"])
    said = "rex-rag-distill: EM at budget 10.0 points above grpo, significantly different from 0."
    assert findings(result) == [said]
    result["arms"]["rex-rag-distill"]["em_at_budget_difference"]["p"] = 0.2
    assert "not significantly different from 0" in findings(result)[0]


def test_the_time_to_go_is_not_cut_at_80_columns():
    console = Console(file=io.StringIO(), width=80, color_system=None, force_terminal=True)
    live = live_line(console, note=True)
    live.add_task("rex-rag-distill-with-a-long-name", total=100, completed=10, note=step_note(STEP))
    console.print(live.get_renderable())
    line = console.file.getvalue().splitlines()[0]
    assert len(line.rstrip()) <= 80 and "eta -:--:--" in line and "step 120  EM 45 %" in line


def test_dropped_updates_are_said_at_once_even_between_two_lines_of_progress():
    console = Console(file=io.StringIO(), width=80)
    progress = RunProgress(console, "grpo")
    progress.stepped(STEP | {"updates": 6.0, "nonfinite_updates": 2.0}, 0.5)
    assert console.file.getvalue() == "grpo: step 120: 2 of 8 updates were dropped as not finite\n"

"""Curves and intervals are the numbers of the run folder, and nothing is drawn that was not recorded."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from rexrag.config.schema import SPENT
from rexrag.report.charts import Chart, make_charts, plain
from rexrag.report.read import read_runs
from rexrag.report.series import aligned, group_arms, mean_series, series
from tests.support.synthetic import write_run


def chart_of(charts: list[Chart], title: str) -> Chart:
    return next(chart for chart in charts if chart.title.startswith(title))


def test_arms_keep_their_colour_over_seeds_and_a_control_is_grey(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{arm}{s}", arm=arm, seed=s, steps=4, control=arm == "rex-rag-distill")
               for arm in ("rex-rag-distill", "rex-rag") for s in (0, 1)]  # fmt: skip
    arms = group_arms(read_runs(folders))
    assert [(arm.name, arm.color, len(arm.runs)) for arm in arms] == [
        ("rex-rag-distill", "--arm0", 2), ("grpo", "--control", 2), ("rex-rag", "--arm1", 2)]  # fmt: skip
    assert len({arm.symbol for arm in arms}) == 3


def test_a_control_of_the_same_arm_is_not_mixed_with_its_run(tmp_path: Path) -> None:
    arms = group_arms(read_runs([write_run(tmp_path / "run", arm="grpo", steps=4, control=True)]))
    assert [(arm.name, len(arm.runs)) for arm in arms] == [("grpo", 1), ("grpo (control)", 1)]


def test_the_main_chart_holds_the_evaluations_and_their_intervals(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=12, control=True)
    charts, _, _ = make_charts(group_arms(read_runs([folder])))
    traces = {trace["name"]: trace for trace in charts[0].views[""] if "name" in trace}
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["set"] == "held-out"]
    trace = traces["rex-rag-distill: held-out"]
    assert trace["x"] == [row["generated_tokens"] for row in rows]
    assert trace["y"] == pytest.approx([100 * row["em"]["value"] for row in rows])
    assert trace["error_y"]["array"] == pytest.approx(
        [100 * (r["em"]["high"] - r["em"]["value"]) for r in rows]
    )
    assert trace["error_y"]["arrayminus"] == pytest.approx(
        [100 * (r["em"]["value"] - r["em"]["low"]) for r in rows]
    )
    assert {"grpo: held-out", "rex-rag-distill: training", "grpo: training"} <= traces.keys()


def test_a_mean_over_seeds_is_a_mean_and_smoothing_looks_back_only(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / str(s), seed=s, steps=9) for s in range(3)])
    raw = [dict(series(run, "em/train")) for run in runs]
    points = mean_series(runs, "em/train", width=1)
    assert points == [(step, pytest.approx(fmean(one[step] for one in raw))) for step in range(1, 10)]
    smooth = mean_series(runs, "em/train", width=3)
    assert smooth[0] == points[0]
    assert smooth[8][1] == pytest.approx(fmean(value for _, value in points[6:9]))


def test_absent_and_null_metrics_leave_gaps_not_zeros(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", steps=14)])
    at = [step for step, _ in series(run, "ratio/cue")]
    assert at == [step for step in range(1, 15) if step % 7]
    assert series(run, "no/such") == [] and mean_series([run], "no/such", 3) == []


def test_charts_that_nothing_was_recorded_for_are_left_out_and_named(tmp_path: Path) -> None:
    arms = group_arms(read_runs([write_run(tmp_path / "plain", arm="grpo", steps=6)]))
    charts, empty, _ = make_charts(arms)
    assert empty == ["Probes", "Gradient by segment", "KL to the initial checkpoint"]
    assert not any(chart.title in empty for chart in charts)
    both = group_arms(read_runs([write_run(tmp_path / "run", steps=6), tmp_path / "plain"]))
    charts, empty, _ = make_charts(both)
    probes = chart_of(charts, "Probes")
    assert "Probes" not in empty and probes.views["rex-rag-distill"] and not probes.views["grpo"]


def test_every_caption_says_what_to_look_for_in_two_sentences_at_most(tmp_path: Path) -> None:
    charts, _, _ = make_charts(group_arms(read_runs([write_run(tmp_path / "run", steps=6)])))
    assert len(charts) == 9
    for chart in charts:
        assert (
            chart.caption.startswith("Look ")
            and chart.caption.count(". ") <= 1
            and chart.caption.endswith(".")
        )


def test_seeds_that_stopped_at_different_steps_are_compared_at_equal_tokens(tmp_path: Path) -> None:
    runs = read_runs([write_run(tmp_path / str(s), seed=s, steps=6 + 3 * s) for s in (0, 1)])
    seeds = [[row for row in run.evaluations if row.set == "held-out"] for run in runs]
    curves = [[(row.spent["generated_tokens"], row.em.value) for row in rows] for rows in seeds]
    columns = aligned(seeds, curves)
    assert columns[0] == [curves[0][0], curves[1][0]]
    assert all(left[0] == right[0] for left, right in columns)
    assert columns[-1][0][0] == curves[0][-1][0] and columns[-1][0] == curves[0][-1]
    values = [value for _, value in curves[1]]
    assert all(min(values) <= right[1] <= max(values) for _, right in columns)
    assert aligned(seeds[:1], curves[:1]) == [[point] for point in curves[0]]


@pytest.mark.parametrize("budget", sorted(SPENT))
def test_every_curve_of_a_comparison_is_drawn_against_its_budget(budget, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=6)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{**row, SPENT[budget]: 10.0 * row["step"]} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    charts, _, _ = make_charts(group_arms(read_runs([folder])), budget)
    title = charts[0].layout["xaxis"]["title"]
    for chart in charts:
        assert chart.layout["xaxis"]["title"] == title and title != {"text": "step"}
    for chart in charts[1:]:  # the first one holds evaluations, which have counts of their own
        drawn = [set(trace["x"]) for view in chart.views.values() for trace in view]
        assert drawn and all(x <= {10.0 * row["step"] for row in rows} for x in drawn)


def test_labels_are_literal() -> None:
    assert plain("<b>a</b> & <a href='x'>") == "&lt;b&gt;a&lt;/b&gt; &amp; &lt;a href='x'&gt;"


def test_the_baseline_of_a_comparison_is_drawn_as_the_control(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / arm, arm=arm, steps=4) for arm in ("dapo", "rex-rag-dapo")]
    arms = group_arms(read_runs(folders), "dapo")
    assert [arm.color == "--control" for arm in arms] == [True, False]
    assert not any(arm.color == "--control" for arm in group_arms(read_runs(folders)))

"""A run folder is read as far as it goes, and what is missing or damaged is named."""

import json
from pathlib import Path

import pytest

from rexrag.errors import DataError
from rexrag.report.read import Estimate, read_run, read_runs, rollout_rows
from tests.support.synthetic import interval, rollout, write_rollouts, write_run


def rewrite(path: Path, change: dict[int, str]) -> None:
    """Replace whole lines of a file, by number from 1."""
    lines = path.read_text().splitlines()
    path.write_text("".join(change.get(n, line) + "\n" for n, line in enumerate(lines, 1)))


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=12, seed=3))
    assert (run.arm, run.seed, run.finished, run.steps()) == ("rex-rag-distill", 3, True, (12, 12))
    assert [row["step"] for row in run.metrics] == list(range(1, 13))
    assert run.spent("generated_tokens") == 12 * 4300
    assert not run.notes
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    before, after = run.held_out()
    assert before == Estimate(**summary["em_before"]) and after == Estimate(**summary["em_after"])


def test_a_run_that_is_still_going_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=12, finished=False)
    for name, tail in (
        ("metrics.jsonl", b'{"step": 13, "em/tr'),
        ("eval.jsonl", b'{"step": 13, "text": "\xc3'),
    ):
        with (folder / name).open("ab") as file:
            file.write(tail)
    run = read_run(folder)
    assert not run.finished and run.steps() == (12, 24)
    assert len(run.metrics) == 12
    assert any("summary.json" in note and "still going" in note for note in run.notes)
    assert sum("half written" in note for note in run.notes) == 2
    held_out = [row for row in run.evaluations if row.set == "held-out"]
    assert run.held_out() == (held_out[0].em, held_out[-1].em)


def test_a_run_without_a_name_is_named_by_the_algorithm_that_it_was(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", arm="grpo", steps=2)
    rewrite(folder / "summary.json", {1: '{"name": "run", "arm": "", "steps": 2, "rise": 0.1}'})
    assert read_run(folder).arm == "grpo" and read_run(folder).held_out() == (None, None)
    write_run(tmp_path / "other", steps=2, finished=False)
    assert read_run(tmp_path / "other").arm == "rex-rag-distill"
    config = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text('arm = "resample"\n' + config)
    assert read_run(folder).arm == "probe-without-cue"


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", finished=False)
    for name in ("metrics.jsonl", "eval.jsonl", "rollouts.jsonl.zst"):
        (folder / name).unlink()
    run = read_run(folder)
    assert run.held_out() == (None, None) and run.spent("seconds") is None and run.steps()[0] == 0
    assert {"metrics.jsonl is missing", "eval.jsonl is missing"} <= set(run.notes)
    notes: list[str] = []
    assert list(rollout_rows(run.rollouts, notes)) == [] and "rollouts.jsonl.zst is missing" in notes[0]


def test_a_step_written_twice_counts_once_and_the_later_row_wins(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=5, finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "generated_tokens": 1, "seconds": 1, "em/train": 0.125}\n')
    run = read_run(folder)
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5]
    assert run.metrics[3]["em/train"] == 0.125


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "config.toml is missing"),
        (("metrics.jsonl",), "config.toml is missing"),
        (("config.toml",), "none of environment.json, metrics.jsonl, eval.jsonl, summary.json"),
    ],
)
def test_a_folder_that_is_no_run_is_named_with_what_it_lacks(
    tmp_path: Path, files: tuple[str, ...], said: str
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    with pytest.raises(DataError, match=said) as caught:
        read_runs([folder])
    assert "elsewhere" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match="no such folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="at least one"):
        read_runs([])


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("metrics.jsonl", '{"step": 2, ', "row 2: expected a JSON object"),
        ("metrics.jsonl", "[1]", "row 2: expected a JSON object, got list"),
        ("metrics.jsonl", '{"loss": 1}', "row 2, field 'step'"),
        ("eval.jsonl", '{"step": 0}', "row 2, field 'em'"),
        ("eval.jsonl", '{"step": 0, "em": {"value": "x"}}', "row 2, field 'em'"),
        ("eval.jsonl", '{"step": 0, "em": {"value": 1}, "by_hops": [1]}', "row 2, field 'by_hops'"),
        ("summary.json", "{", "expected a JSON object"),
        ("config.toml", "name = ", "not readable as TOML"),
    ],
)
def test_damage_before_the_end_names_file_and_row(tmp_path: Path, name: str, line: str, said: str) -> None:
    folder = write_run(tmp_path / "run", steps=4)
    rewrite(folder / name, {1 if name in ("summary.json", "config.toml") else 2: line})
    with pytest.raises(DataError, match=said) as caught:
        read_run(folder)
    assert name in str(caught.value)


def test_the_control_comes_after_its_run_and_a_folder_named_twice_comes_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=4, control=True)
    runs = read_runs([folder, tmp_path / "run" / ".." / "run", folder / "control"])
    assert [(run.arm, run.control) for run in runs] == [("rex-rag-distill", False), ("grpo", True)]


def test_rollouts_cross_frames_and_stop_at_a_torn_one(tmp_path: Path) -> None:
    question = {"id": "q", "text": "who?", "answers": ["a"]}
    rows = [rollout(1, i, "base", question, [], "é" * 400) for i in range(50)]
    path = tmp_path / "rollouts.jsonl.zst"
    write_rollouts(path, rows, frame=8)
    notes: list[str] = []
    assert [row for _, row in rollout_rows(path, notes)] == rows and not notes
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [row for _, row in rollout_rows(path, notes)] == rows[:48]
    assert notes == ["rollouts.jsonl.zst ends in a half-written frame, which is left out"]
    path.write_bytes(whole + b"no frame at all")
    notes.clear()
    assert [row for _, row in rollout_rows(path, notes)] == rows and len(notes) == 1


def test_estimates_keep_their_interval() -> None:
    assert Estimate(**interval(0.5, 100)).n == 100

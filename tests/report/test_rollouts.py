"""Rollouts are chosen fairly, and a probe lies beside the dead end it branched from."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import DataError
from rexrag.report.read import read_run
from rexrag.report.rollouts import OUTCOMES, TEXT_CAP, Chosen, _shares, choose_rollouts
from tests.support.synthetic import rollout, write_rollouts, write_run

QUESTION = {"id": "q", "text": "Where was Anna Berg born?", "answers": ["oskel"], "hops": 1}


def part(origin: str, text: str) -> dict[str, Any]:
    return {"origin": origin, "text": text, "logp": -1.0, "weight": 1.0}


def choose(folder: Path, rows: list[dict[str, Any]], cap: int = 300) -> tuple[Chosen, list[str]]:
    if not folder.exists():
        write_run(folder, steps=1)
    write_rollouts(folder / "rollouts.jsonl.zst", rows)
    notes: list[str] = []
    return choose_rollouts([read_run(folder)], [notes], cap), notes


def texts(segments: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(segment["origin"], segment["text"]) for segment in segments]


def test_a_probe_is_laid_out_as_shared_prefix_dead_end_and_branch(tmp_path: Path) -> None:
    begin = [part("policy", "<search> anna </search>"), part("evidence", "Anna Berg … Oskel")]
    parent = rollout(
        3, 0, "base", QUESTION, [*begin, part("policy", "so tarn <answer> tarn </answer>")], "tarn"
    )
    branch = [part("cue", "<think> wait"), part("policy", " </think><answer> oskel </answer>")]
    probe = rollout(
        3, 7, "probe", QUESTION, [*begin, part("policy", "so tarn "), *branch], "oskel", parent=0, cut=9
    )
    chosen, notes = choose(tmp_path / "run", [parent, probe])
    first = chosen.records[0]
    assert not notes and [record["outcome"] for record in chosen.records] == ["recovered", "wrong"]
    assert texts(first["shared"]) == [*texts(begin), ("policy", "so tarn ")]
    assert texts(first["parent"]["rest"]) == [("policy", "<answer> tarn </answer>")]
    assert texts(first["rest"]) == texts(branch)
    assert (first["parent"]["answer"], first["answer"], first["gold"]) == ("tarn", "oskel", ["oskel"])
    # A cut segment has no log-probability of its own; whole ones keep theirs.
    assert first["parent"]["rest"][0]["logp"] is None and first["rest"][0]["logp"] == -1.0


def test_without_a_cue_the_cut_alone_divides_a_probe(tmp_path: Path) -> None:
    parent = rollout(1, 0, "base", QUESTION, [part("policy", "so <answer> tarn </answer>")], "tarn")
    parts = [part("policy", "so "), part("policy", "<answer> oskel </answer>")]
    probe = rollout(1, 0, "probe", QUESTION, parts, "oskel", parent=0, cut=1)
    record = choose(tmp_path / "run", [parent, probe])[0].records[0]
    assert texts(record["shared"]) == [("policy", "so ")]
    assert texts(record["parent"]["rest"]) == [("policy", "<answer> tarn </answer>")]
    assert texts(record["rest"]) == [("policy", "<answer> oskel </answer>")]


def test_base_rollouts_and_probes_are_counted_apart(tmp_path: Path) -> None:
    """Both kinds number their rollouts from 0."""
    bases = [rollout(1, i, "base", QUESTION, [part("policy", f"base {i}")], "tarn") for i in (0, 1)]
    probes = [
        rollout(1, i, "probe", QUESTION, [part("cue", f"probe {i}")], "oskel", parent=1 - i, cut=0)
        for i in (0, 1)
    ]
    chosen, _ = choose(tmp_path / "run", [*bases, *probes])
    assert chosen.recorded["recovered"] == 2 and chosen.recorded["wrong"] == 2
    for record in chosen.records[:2]:
        assert record["parent"]["index"] == 1 - record["index"]
        assert texts(record["parent"]["rest"]) == [("policy", f"base {1 - record['index']}")]


def test_a_parent_of_another_step_or_unrecorded_is_not_taken(tmp_path: Path) -> None:
    other = rollout(1, 0, "base", QUESTION, [part("policy", "x <answer> oskel </answer>")], "oskel")
    probe = rollout(
        2, 1, "probe", QUESTION, [part("policy", "x "), part("cue", "<think> hm")], "oskel", parent=0, cut=1
    )
    record = choose(tmp_path / "run", [other, probe])[0].records[0]
    assert record["probe"] and record["parent"] is None and texts(record["shared"]) == [("policy", "x ")]
    assert record["outcome"] == "recovered"


def test_a_probe_of_a_right_parent_is_no_rescue(tmp_path: Path) -> None:
    parent = rollout(1, 0, "base", QUESTION, [part("policy", "a")], "oskel")
    probe = rollout(
        1, 1, "probe", QUESTION, [part("policy", "a"), part("cue", "b")], "oskel", parent=0, cut=1
    )
    assert choose(tmp_path / "run", [parent, probe])[0].recorded["right probe"] == 1


def test_the_cap_is_shared_over_outcomes_and_steps(tmp_path: Path) -> None:
    rows = [rollout(step, 0, "base", QUESTION, [], "oskel") for step in range(1, 101)]
    rows += [rollout(step, 1, "base", QUESTION, [], "tarn") for step in range(1, 101)]
    rows += [rollout(step, 2, "probe", QUESTION, [], "oskel", parent=1, cut=0) for step in (5, 50)]
    chosen, _ = choose(tmp_path / "run", rows, cap=22)
    assert chosen.shown == {"recovered": 2, "right probe": 0, "wrong probe": 0, "right": 10, "wrong": 10}
    assert chosen.recorded == {"recovered": 2, "right probe": 0, "wrong probe": 0, "right": 100, "wrong": 100}
    assert Counter(record["outcome"] for record in chosen.records) == Counter(
        {name: count for name, count in chosen.shown.items() if count}
    )
    assert [OUTCOMES.index(r["outcome"]) for r in chosen.records] == sorted(
        OUTCOMES.index(r["outcome"]) for r in chosen.records
    )
    steps = sorted(record["step"] for record in chosen.records if record["outcome"] == "right")
    assert steps == list(range(10, 101, 10))


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 120))
def test_shares_use_the_cap_up_and_starve_nobody(counts: dict[str, int], cap: int) -> None:
    shares = _shares(counts, cap)
    assert sum(shares.values()) == min(cap, sum(counts.values()))
    assert all(shares[name] <= counts[name] for name in counts)
    unmet = [shares[name] for name in counts if shares[name] < counts[name]]
    # Whoever got less than there is got as much as anybody, but for the remainder of the division.
    assert not unmet or min(unmet) >= max(shares.values()) - 1


def test_a_rollout_written_twice_counts_once(tmp_path: Path) -> None:
    rows = [rollout(1, 0, "base", QUESTION, [part("policy", text)], "tarn") for text in ("first", "second")]
    chosen, _ = choose(tmp_path / "run", rows)
    assert [texts(record["rest"]) for record in chosen.records] == [[("policy", "second")]]


def test_a_long_text_is_cut_and_says_by_how_much(tmp_path: Path) -> None:
    chosen, _ = choose(
        tmp_path / "run", [rollout(1, 0, "base", QUESTION, [part("evidence", "x" * 9000)], None)]
    )
    segment = chosen.records[0]["rest"][0]
    assert len(segment["text"]) == TEXT_CAP and segment["more"] == 9000 - TEXT_CAP


def test_a_row_without_its_place_is_named(tmp_path: Path) -> None:
    row = rollout(1, 0, "base", QUESTION, [], None)
    for field in ("step", "index", "kind"):
        with pytest.raises(DataError, match=rf"rollouts\.jsonl\.zst, row 2, field '{field}'"):
            choose(tmp_path / "run", [row, {**row, field: None}])

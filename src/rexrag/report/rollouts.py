"""Choose the rollouts that a page shows, and put each probe beside the dead end it branched from.

The file may hold more than fits a page, so it is read twice: first for the keys to choose from, then for the
texts of the chosen rollouts and of their parents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rexrag.errors import DataError
from rexrag.report.read import Run, number, rollout_rows
from rexrag.types import Origin

CAP = 300
"""Rollouts a page carries."""
TEXT_CAP = 8000
"""Characters of one segment a page carries."""

ORIGINS = tuple(origin.name.lower() for origin in Origin)
OUTCOMES = ("recovered", "right probe", "wrong probe", "right", "wrong")
"""What a rollout shows, in the order the page lists it; `recovered`: a right probe of a wrong parent."""

Segment = dict[str, Any]
Place = tuple[int, str, int]
"""Step, kind and index: base rollouts and probes are counted apart."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Records for the page, most telling first; how many were recorded and are shown, by outcome."""

    records: Sequence[dict[str, Any]]
    recorded: Mapping[str, int]
    shown: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Key:
    run: int
    row: int
    step: int
    index: int
    outcome: str
    parent: int | None


def choose_rollouts(runs: Sequence[Run], notes: Sequence[list[str]], cap: int = CAP) -> Chosen:
    """At most `cap` rollouts of all runs, fairly over outcomes and steps.

    `notes[i]` receives what was missing in the file of `runs[i]`.
    """
    keys = [key for i, run in enumerate(runs) for key in _keys(i, run, notes[i])]
    by_outcome = {name: [key for key in keys if key.outcome == name] for name in OUTCOMES}
    quota = _shares({name: len(found) for name, found in by_outcome.items()}, cap)
    picked = [key for name, found in by_outcome.items() for key in _spread(found, quota[name])]
    records = [
        record for i, run in enumerate(runs) for record in _records(run, [k for k in picked if k.run == i])
    ]
    records.sort(key=lambda r: (OUTCOMES.index(r["outcome"]), -r["step"], r["run"], r["index"]))
    return Chosen(
        records,
        {name: len(found) for name, found in by_outcome.items()},
        {name: quota[name] for name in OUTCOMES},
    )


def _keys(run_number: int, run: Run, notes: list[str]) -> Iterable[_Key]:
    """One key a rollout, the later row where a resumed run wrote a step twice."""
    rows: dict[Place, tuple[int, bool, int | None]] = {}
    for n, row in rollout_rows(run.rollouts, notes):
        parent = number(row, "parent")
        right = number(row, "em") == 1.0
        rows[_place(run, n, row)] = n, right, None if parent is None else int(parent)
    for (step, kind, index), (n, right, parent) in rows.items():
        outcome = "right" if right else "wrong"
        if kind == "probe":
            above = rows.get((step, "base", -1 if parent is None else parent))
            # A parent that was not recorded was probed all the same, so it was a dead end.
            dead = above is None or not above[1]
            outcome = ("recovered" if dead else "right probe") if right else "wrong probe"
        yield _Key(run_number, n, step, index, outcome, parent if kind == "probe" else None)


def _place(run: Run, n: int, row: Mapping[str, Any]) -> Place:
    for field in ("step", "index"):
        if number(row, field) is None:
            raise DataError("expected a whole number", file=run.rollouts, row=n, field=field)
    if row.get("kind") not in ("base", "probe"):
        raise DataError("expected 'base' or 'probe'", file=run.rollouts, row=n, field="kind")
    return int(row["step"]), str(row["kind"]), int(row["index"])


def _shares(counts: Mapping[str, int], cap: int) -> dict[str, int]:
    """Divide `cap` evenly over the names; what one cannot use goes to the others."""
    shares: dict[str, int] = {}
    left = cap
    for place, name in enumerate(sorted(counts, key=lambda name: counts[name])):
        shares[name] = min(counts[name], left // (len(counts) - place))
        left -= shares[name]
    return shares


def _spread(keys: Sequence[_Key], count: int) -> list[_Key]:
    """`count` keys, evenly over the list, which is in order of run and step; the last one is always in."""
    return [keys[len(keys) - 1 - i * len(keys) // count] for i in range(count)]


def _records(run: Run, keys: Sequence[_Key]) -> list[dict[str, Any]]:
    by_row = {key.row: key for key in keys}
    # A parent is found by place, not by row, and the later row counts.
    parents = {_parent(key) for key in keys if key.parent is not None}
    rows: list[tuple[_Key, Mapping[str, Any]]] = []
    found: dict[Place, Mapping[str, Any]] = {}
    if keys:
        for n, row in rollout_rows(run.rollouts, []):
            if n in by_row:
                rows.append((by_row[n], row))
            if (place := _place(run, n, row)) in parents:
                found[place] = {name: row.get(name) for name in ("segments", "answer", "reward", "advantage")}
    return [_record(key, row, found.get(_parent(key))) for key, row in rows]


def _parent(key: _Key) -> Place:
    return key.step, "base", -1 if key.parent is None else key.parent


def _record(key: _Key, row: Mapping[str, Any], parent: Mapping[str, Any] | None) -> dict[str, Any]:
    question = row.get("question")
    question = question if isinstance(question, Mapping) else {}
    segments = _segments(row)
    split = _prefix_segments(row)
    shared, rest = segments[:split], segments[split:]
    record = {
        "run": key.run,
        "step": key.step,
        "index": key.index,
        "outcome": key.outcome,
        "probe": row.get("kind") == "probe",
        "kept": row.get("kept"),
        "question": _text(question.get("text")),
        "gold": [_text(answer) for answer in question.get("answers") or ()],
        "hops": number(question, "hops"),
        "answer": None if row.get("answer") is None else _text(row["answer"]),
        "stop": _text(row.get("stop")),
        "shared": [_capped(segment) for segment in shared],
        "rest": [_capped(segment) for segment in rest],
        "parent": None,
        **{name: number(row, name) for name in ("reward", "advantage", "score", "weight", "cut")},
    }
    if parent is not None:
        tail = _after(_segments(parent), sum(len(segment["text"]) for segment in shared))
        record["parent"] = {
            "index": key.parent,
            "answer": None if parent.get("answer") is None else _text(parent["answer"]),
            "reward": number(parent, "reward"),
            "advantage": number(parent, "advantage"),
            "rest": [_capped(segment) for segment in tail],
        }
    return record


def _segments(row: Mapping[str, Any]) -> list[Segment]:
    return [
        {
            "origin": segment.get("origin") if segment.get("origin") in ORIGINS else "unknown",
            "text": _text(segment.get("text")),
            "logp": number(segment, "logp"),
            "weight": number(segment, "weight"),
        }
        for segment in row.get("segments") or ()
        if isinstance(segment, Mapping)
    ]


def _prefix_segments(row: Mapping[str, Any]) -> int:
    """How many segments a probe has before its cut; 0 for a base rollout.

    A segment is a run of one origin and ends at the cut. `origins` tells the runs; where a row has none, the
    cue marks the cut.
    """
    cut, origins = number(row, "cut"), row.get("origins")
    if cut is None:
        return 0
    if isinstance(origins, list):
        return sum(1 for _ in groupby(origins[: int(cut)]))
    return next((i for i, segment in enumerate(_segments(row)) if segment["origin"] == "cue"), 0)


def _after(segments: Sequence[Segment], length: int) -> list[Segment]:
    """What follows the first `length` characters."""
    parts: list[Segment] = []
    for segment in segments:
        size = len(segment["text"])
        if size > length:
            # Part of a segment has no log-probability of its own.
            cut = {**segment, "text": segment["text"][length:], "logp": None, "weight": None}
            parts.append(segment if length <= 0 else cut)
        length -= size
    return parts


def _capped(segment: Segment) -> Segment:
    more = len(segment["text"]) - TEXT_CAP
    return {**segment, "text": segment["text"][:TEXT_CAP], "more": more} if more > 0 else segment


def _text(value: object) -> str:
    return "" if value is None else str(value)

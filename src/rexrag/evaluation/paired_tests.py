"""Two evaluations of the same questions, compared question by question; averages over sets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rexrag.errors import ConfigError
from rexrag.evaluation.records import Records, read_records
from rexrag.stats import interval, macro_interval, paired_p

SCORES = ("em", "f1")


def scores(rows: Records, name: str) -> dict[str, float]:
    """A score of every question that did not fail, by group."""
    return {group: row[name] for group, row in rows.items() if not row["failure"]}


def difference(ours: Records, theirs: Records, name: str = "em") -> dict[str, Any] | None:
    """Mean difference over the questions that both answered, with its interval and sign-flip p-value.

    `better` and `worse` count questions. None where there is no shared question.
    """
    a, b = scores(ours, name), scores(theirs, name)
    pairs = [a[group] - b[group] for group in a if group in b]
    if not pairs:
        return None
    better, worse = sum(d > 0 for d in pairs), sum(d < 0 for d in pairs)
    return interval(pairs) | {"p": paired_p(pairs), "better": better, "worse": worse}


def macro_difference(pairs: Sequence[tuple[Records, Records]], name: str = "em") -> dict[str, float] | None:
    """The mean over sets of the mean difference."""
    groups = []
    for ours, theirs in pairs:
        a, b = scores(ours, name), scores(theirs, name)
        shared = [a[group] - b[group] for group in a if group in b]
        groups += [shared] if shared else []
    return macro_interval(groups) if groups else None


def macro(cells: Sequence[Records], name: str = "em") -> dict[str, float] | None:
    """The mean over sets of the mean score; None where a set has no scored question."""
    groups = [list(scores(rows, name).values()) for rows in cells]
    return macro_interval(groups) if groups and all(groups) else None


Tables = Mapping[tuple[str, str], Records]
"""Rows of an evaluation by (set, system)."""


def compare(ours: Tables, theirs: Tables, label: str) -> list[dict[str, Any]]:
    """Differences for every set and system that both hold, and a macro average for each system.

    A system is compared with the other evaluation's same system, else with the same strategy without votes,
    else with the other's first system. `label` names the other evaluation. Raises ConfigError where they
    share no question; where they do, but all rows failed on one side, there is nothing to say.
    """
    known = list(dict.fromkeys(system for _, system in theirs))
    rows: list[dict[str, Any]] = []
    met = False
    for system in dict.fromkeys(system for _, system in ours):
        same = (system, system.partition(" ×")[0])
        other = next((name for name in same if name in known), known[0] if known else "")
        shared = [name for name, own in ours if own == system and (name, other) in theirs]
        pairs = [(ours[name, system], theirs[name, other]) for name in shared]
        names = {"system": system, "against": label, "other": other}
        found = []
        for name, pair in zip(shared, pairs, strict=True):
            _refuse_other_questions(label, name, *pair)
            met = met or not pair[0].keys().isdisjoint(pair[1])
            values = {score: difference(*pair, score) for score in SCORES}
            if values["em"] is not None:
                found.append({"set": name, **names, **values})
        if len(found) > 1:
            values = {score: macro_difference(pairs, score) for score in SCORES}
            found.append({"set": "macro", **names, **values})
        rows += found
    if not met and any(ours.values()) and any(theirs.values()):
        raise ConfigError(f"{label}: shares no question with this evaluation, so nothing can be compared")
    return rows


def _refuse_other_questions(label: str, name: str, ours: Records, theirs: Records) -> None:
    """Rows of a group must ask the same: ids that are row numbers move when a file changes."""
    for group, row in ours.items():
        other = theirs.get(group)
        if other is not None and any(row.get(key) != other.get(key) for key in ("question", "answers")):
            raise ConfigError(
                f"{label}: question {group} of {name} is another one there "
                f"({str(other.get('question'))[:60]!r}), so nothing can be paired"
            )


def load_evaluation(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str], Records]]:
    """`eval.json` of a folder and its rows by (set, system). Raises ConfigError where there is none."""
    file = folder / "eval.json"
    try:
        result: dict[str, Any] = _renamed(json.loads(file.read_text(encoding="utf-8")))
        rows = {(c["set"], c["system"]): read_records(folder / c["folder"]) for c in result["cells"]}
        for (name, _), table in rows.items():
            asked = result["sets"][name].get("asked")  # of a sample: another one may have left rows here too
            for group in [] if asked is None else table.keys() - set(asked):
                del table[group]
        return result, rows
    except FileNotFoundError:
        raise ConfigError(f"{folder}: no evaluation here (it has no eval.json)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not readable as an evaluation: {error}") from None


def _renamed(result: dict[str, Any]) -> dict[str, Any]:
    """An `eval.json` of 0.1.0 called a system a way."""
    for row in [*result["cells"], *result["paired"]]:
        if "way" in row:
            row["system"] = row.pop("way")
    return result

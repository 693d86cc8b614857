"""Runs the cells that are missing, batch by batch, and writes `eval.json`.

    OUT/eval.json              figures of every cell, averages, paired differences, failures
    OUT/cells/<cell>/          settings.json, records.jsonl
    OUT/audits/<key>.json      which questions the corpus cannot answer

A cell is found again by its key, so the same command goes on after a kill, asks failed questions again, and
does nothing where everything is there.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from rexrag import __version__
from rexrag.agent.episode import Episode
from rexrag.agent.prompts import cue_pool
from rexrag.engine.base import Policy
from rexrag.errors import ConfigError, DataError, RetrievalError, RunFolderError
from rexrag.evaluation.attempt import Attempt, Bench
from rexrag.evaluation.cells import Cell, Plan, corpus_documents
from rexrag.evaluation.corpus_audit import Audit, audit
from rexrag.evaluation.paired_tests import compare, load_evaluation, macro
from rexrag.evaluation.published import PUBLISHED, cell_obstacles, obstacles
from rexrag.evaluation.records import Records, append_records, cell_figures, read_records, record
from rexrag.evaluation.strategies import CLOSED_BOOK, STRATEGIES, Strategy, voted
from rexrag.io import sha256_file, write_json
from rexrag.training.components import LONGEST, check_window
from rexrag.training.run_folder import digest
from rexrag.types import Question

BATCH = 64
"""Questions between two writes; all of them run side by side."""
GONE = 32
"""As many failures in a row, with no success between, and the rest is not tried: nobody is there."""


class Observer(Protocol):
    """Told what happens; the command line draws a progress bar, tests pass nothing."""

    def started(self, total: int, cached: int) -> None: ...

    def auditing(self) -> None: ...

    def advanced(self, cell: Cell, rows: Sequence[dict[str, Any]]) -> None: ...


@dataclass(frozen=True, slots=True)
class Options:
    batch: int = BATCH
    audit: bool = True
    fresh: bool = False
    """Ask everything again, whatever is cached."""
    against: tuple[Path, ...] = ()
    vouch: str = ""


def run(plan: Plan, options: Options, observer: Observer | None = None) -> dict[str, Any]:
    """Complete every cell and return what `eval.json` holds. Raises RexragError; rows are safe by then."""
    others = {str(folder): load_evaluation(folder)[1] for folder in options.against}
    for label, theirs in others.items():
        if not plan.sets.keys() & {name for name, _ in theirs}:
            raise ConfigError(
                f"{label}: holds none of the sets {', '.join(plan.sets)}, so nothing can be compared"
            )
    # Before anything is asked: a corpus that cannot be read is then known at once.
    audits = _audits(plan, observer) if options.audit else {}
    rows = _open_cells(plan, options.fresh)
    missing = [(cell, _missing(cell, rows[cell.name])) for cell in plan.cells]
    total = sum(len(questions) for _, questions in missing)
    if observer:
        observer.started(total, sum(len(cell.chosen.questions) for cell in plan.cells) - total)
    gone = ""
    if total:
        gone = _Runner(plan, options, rows, observer).run(missing)
    result = _result(plan, options, rows, audits, gone)
    write_json(plan.out / "eval.json", result | {"paired": []})  # figures are safe whatever comes after
    result["paired"] = _paired(plan, rows, others)
    write_json(plan.out / "eval.json", result)
    return result


class _Runner:
    """The loop over batches; knows when an endpoint is gone."""

    def __init__(
        self, plan: Plan, options: Options, rows: dict[str, Records], observer: Observer | None
    ) -> None:
        self.plan, self.options, self.rows, self.observer = plan, options, rows, observer
        self.in_a_row = 0

    def run(self, missing: Sequence[tuple[Cell, list[Question]]]) -> str:
        """Returns why it stopped early; empty where it did not."""
        config = self.plan.config
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        policy = self.plan.policy.load()
        _check_prompts(self.plan, policy)
        for cell, questions in missing:
            cues = cue_pool(config.agent.cues) if cell.strategy == "reflect" else ()
            bench = Bench(
                policy, self.plan.retriever, config, cell.temperature, cues=cues, cue_seed=self.plan.seed
            )
            strategy = STRATEGIES[cell.strategy]
            strategy = strategy if cell.votes == 1 else voted(strategy, cell.votes)
            size = max(1, self.options.batch // cell.votes)
            for start in range(0, len(questions), size):
                batch = questions[start : start + size]
                seeded = replace(bench, seed=_seed(self.plan.seed, batch[0]))
                self._keep(cell, _attempts(strategy, seeded, batch))
                if self.in_a_row >= GONE:
                    last = next(reversed(self.rows[cell.name].values()))["failure"]
                    return f"{self.in_a_row} failures in a row, the last: {last}"
        return ""

    def _keep(self, cell: Cell, attempts: list[Attempt]) -> None:
        found = [record(attempt, cell.strategy) for attempt in attempts]
        append_records(self.plan.out / "cells" / cell.name, found)
        for row in found:
            self.in_a_row = self.in_a_row + 1 if row["failure"] else 0
            self.rows[cell.name].pop(row["group"], None)
            self.rows[cell.name][row["group"]] = row
        if self.observer:
            self.observer.advanced(cell, found)


def _attempts(strategy: Strategy, bench: Bench, batch: Sequence[Question]) -> list[Attempt]:
    """What a single question did wrong (a prompt beyond the window, a query that the retriever refuses) fails
    that question alone: it is found by asking the halves of the batch apart."""
    try:
        return strategy(bench, batch)
    except (DataError, RetrievalError) as error:
        away = isinstance(error, RetrievalError) and not error.refused
        if away or len(batch) == 1:
            return [Attempt(question, failure=str(error)) for question in batch]
    half = len(batch) // 2
    return [a for part in (batch[:half], batch[half:]) for a in _attempts(strategy, bench, part)]


def _open_cells(plan: Plan, fresh: bool) -> dict[str, Records]:
    """Rows of every cell by its folder's name. Raises RunFolderError where the folder cannot be used."""
    rows = {}
    try:
        for cell in plan.cells:
            folder = plan.out / "cells" / cell.name
            write_json(folder / "settings.json", cell.settings | {"policy_name": plan.policy.name})
            if fresh:
                (folder / "records.jsonl").unlink(missing_ok=True)
            rows[cell.name] = read_records(folder, mend=True)
    except OSError as error:
        raise RunFolderError(f"{plan.out}: cannot be written: {error.strerror or error}") from None
    return rows


def _missing(cell: Cell, rows: Records) -> list[Question]:
    """Questions without a row, or whose row failed."""
    return [q for q in cell.chosen.questions if q.group not in rows or rows[q.group]["failure"]]


def _check_prompts(plan: Plan, policy: Policy) -> None:
    """Do the longest questions fit the window? Raises DataError before anything is asked."""
    check_window(policy, plan.config)
    for chosen in plan.sets.values():
        for question in sorted(chosen.questions, key=lambda question: len(question.text.encode()))[-LONGEST:]:
            Episode(question, policy.codec, plan.config.agent, plan.config.retriever.topk)


def _seed(seed: int, first: Question) -> int:
    state = hashlib.sha256(f"{seed}/{first.group}".encode()).digest()
    return int.from_bytes(state[:6], "big")


def _audits(plan: Plan, observer: Observer | None) -> dict[str, Audit]:
    """One audit a set, from the cache or in one pass over the corpus."""
    if all(cell.strategy in CLOSED_BOOK for cell in plan.cells):
        return {}
    path = plan.config.data.corpus
    try:
        identity = sha256_file(path) if path else plan.retriever.digest
    except OSError as error:
        raise DataError(error.strerror or "not readable", file=path) from None
    asked = (f"{s.name} {s.digest} {digest(*(q.group for q in s.questions))}" for s in plan.sets.values())
    key = digest(identity, *asked)
    file = plan.out / "audits" / f"{key[:16]}.json"
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))["sets"]
        return {
            name: Audit(*(tuple(groups[part]) for part in Audit.__slots__)) for name, groups in known.items()
        }
    documents = corpus_documents(plan)
    if documents is None:
        return {}
    if observer:
        observer.auditing()
    found, count = audit({name: one.questions for name, one in plan.sets.items()}, documents)
    sets = {name: {part: getattr(one, part) for part in Audit.__slots__} for name, one in found.items()}
    write_json(file, {"documents": count, "sets": sets})
    return found


def _result(
    plan: Plan, options: Options, rows: dict[str, Records], audits: dict[str, Audit], gone: str
) -> dict[str, Any]:
    barriers = obstacles(plan.config, plan.retriever, options.vouch)
    cells = []
    for cell in plan.cells:
        judged = audits.get(cell.chosen.name) if cell.strategy not in CLOSED_BOOK else None
        special = cell_obstacles(cell.chosen, cell.strategy, cell.votes, cell.temperature)
        found = cell_figures(cell.chosen, rows[cell.name], judged)
        answered, wanted = found["asked"] - found["failed"], len(cell.chosen.questions)
        if answered < wanted:
            special.append(f"{answered:,} of {wanted:,} questions answered so far")
        cells.append(
            {
                "set": cell.chosen.name,
                "way": cell.way,
                "strategy": cell.strategy,
                "votes": cell.votes,
                "temperature": cell.temperature,
                "folder": f"cells/{cell.name}",
                "comparable": not barriers and not special,
                "not_comparable_because": [*barriers, *special],
                **found,
            }
        )
    return {
        "rexrag": __version__,
        "policy": {"name": plan.policy.name, "digest": plan.policy.digest},
        "retriever": {
            "kind": plan.config.retriever.kind,
            "digest": plan.retriever.digest,
            "documents": len(getattr(plan.retriever, "documents", ())) or None,
            "topk": plan.config.retriever.topk,
            "vouched": options.vouch or None,
        },
        "agent": plan.config.agent.model_dump(mode="json"),
        "seed": plan.seed,
        "sets": {name: _set_facts(plan, name) for name in plan.sets},
        "cells": cells,
        "macro": {way: _macro(plan, rows, way) for way in dict.fromkeys(cell.way for cell in plan.cells)},
        "published": {name: dict(values) for name, values in PUBLISHED.items()},
        "not_comparable_because": barriers,
        "failures": _failures(plan, rows, gone),
    }


def _set_facts(plan: Plan, name: str) -> dict[str, Any]:
    chosen = plan.sets[name]
    return {
        "title": chosen.title,
        "split": chosen.split,
        "source": chosen.source,
        "digest": chosen.digest,
        "questions": len(chosen.questions),
        "whole": chosen.whole,
        "asked": [q.group for q in chosen.questions] if len(chosen.questions) < chosen.whole else None,
        "strata": dict(chosen.strata) if chosen.stratified else None,
    }


def _asked(cell: Cell, rows: Records) -> Records:
    """The rows of a cell's sample: a larger sample may have left more."""
    return {q.group: rows[q.group] for q in cell.chosen.questions if q.group in rows}


def _macro(plan: Plan, rows: dict[str, Records], way: str) -> dict[str, Any]:
    tables = [_asked(cell, rows[cell.name]) for cell in plan.cells if cell.way == way]
    return {score: macro(tables, score) for score in ("em", "f1", "sub_em")}


def _paired(
    plan: Plan, rows: dict[str, Records], others: dict[str, dict[tuple[str, str], Records]]
) -> list[dict[str, Any]]:
    """Differences to other evaluations, and of every way to the first one."""
    own = {(cell.chosen.name, cell.way): _asked(cell, rows[cell.name]) for cell in plan.cells}
    found = [row for label, theirs in others.items() for row in compare(own, theirs, label)]
    ways = list(dict.fromkeys(cell.way for cell in plan.cells))
    if len(ways) > 1:
        first = {(name, way): table for (name, way), table in own.items() if way == ways[0]}
        rest = {(name, way): table for (name, way), table in own.items() if way != ways[0]}
        found += compare(rest, first, ways[0])
    return found


def _failures(plan: Plan, rows: dict[str, Records], gone: str) -> dict[str, Any]:
    """How many rows failed or were never asked, and why: reasons by count, most frequent first."""
    tables = [(cell, _asked(cell, rows[cell.name])) for cell in plan.cells]
    reasons = Counter(row["failure"] for _, table in tables for row in table.values() if row["failure"])
    total = sum(len(cell.chosen.questions) for cell, _ in tables)
    unasked = total - sum(len(table) for _, table in tables)
    return {
        "rows": total,
        "failed": sum(reasons.values()),
        "unasked": unasked,
        "share": (sum(reasons.values()) + unasked) / total if total else 0.0,
        "stopped": gone,
        "reasons": dict(reasons.most_common(20)),
    }

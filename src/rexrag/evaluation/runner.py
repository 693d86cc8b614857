"""Answers what is missing of an evaluation, row by row, and writes `eval.json`.

    OUT/eval.json              figures of every cell, averages, paired differences, failures
    OUT/cells/<cell>/          settings.json, records.jsonl
    OUT/audits/<key>.json      which questions the corpus cannot answer

A cell is found again by its key, so the same command goes on after a kill, asks failed questions again, and
does nothing where everything is there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from rexrag.agent.prompts import cue_pool
from rexrag.agent.scoring import Scoring
from rexrag.errors import ConfigError, DataError, RunFolderError
from rexrag.evaluation.attempt import Attempt
from rexrag.evaluation.cells import Cell, EvaluationPlan, corpus_documents
from rexrag.evaluation.context import StrategyContext
from rexrag.evaluation.corpus_audit import Audit, audit
from rexrag.evaluation.paired_tests import load_evaluation
from rexrag.evaluation.records import RecordFile, Records, read_records, record
from rexrag.evaluation.result import paired_differences, summarise
from rexrag.evaluation.side_by_side import answer_all
from rexrag.evaluation.strategies import CLOSED_BOOK
from rexrag.io import sha256_file, write_json
from rexrag.training.components import check_window
from rexrag.training.run_folder import digest
from rexrag.types import Question

BATCH = 64
"""Attempts run side by side."""
MOST_FAILURES = 32
"""As many failures in a row, with no success between, and no further batch is tried: nobody is there."""


class EvaluationObserver(Protocol):
    """Told what happens; the command line draws a progress bar, tests pass nothing."""

    def started(self, total: int, cached: int) -> None: ...

    def auditing(self) -> None: ...

    def answered(self, cell: Cell, row: dict[str, Any]) -> None:
        """A question is finished, and its row is in the file."""
        ...


@dataclass(frozen=True, slots=True)
class Options:
    """How an evaluation is run; nothing here changes a row."""

    batch: int = BATCH
    audit: bool = True
    fresh: bool = False
    """Ask everything again, whatever is cached."""
    against: tuple[Path, ...] = ()
    assumed_retriever: str = ""


def run(plan: EvaluationPlan, options: Options, observer: EvaluationObserver | None = None) -> dict[str, Any]:
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
        observer.started(total, sum(len(cell.questions.questions) for cell in plan.cells) - total)
    stopped = _answer_missing(plan, options, rows, missing, observer) if total else ""
    result = summarise(plan, rows, audits, stopped, options.assumed_retriever)
    write_json(plan.out / "eval.json", result | {"paired": []})  # figures are safe whatever comes after
    result["paired"] = paired_differences(plan, rows, others)
    write_json(plan.out / "eval.json", result)
    return result


def _answer_missing(
    plan: EvaluationPlan,
    options: Options,
    rows: dict[str, Records],
    missing: Sequence[tuple[Cell, list[Question]]],
    observer: EvaluationObserver | None,
) -> str:
    """Returns why it stopped early; empty where it did not."""
    if plan.config.train.threads:
        torch.set_num_threads(plan.config.train.threads)
    policy = plan.policy.load()
    check_window(policy, plan.config)
    failures: list[str] = []
    scoring = Scoring.of(plan.config.agent)

    def keep(cell: Cell, file: RecordFile, attempt: Attempt) -> None:
        row = record(attempt, cell.strategy, scoring)
        file.append(row)
        rows[cell.name].pop(row["group"], None)
        rows[cell.name][row["group"]] = row
        if row["failure"]:
            failures.append(row["failure"])
        else:
            failures.clear()
        if observer:
            observer.answered(cell, row)

    for cell, questions in missing:
        cues = cue_pool(plan.config.agent.cues) if cell.strategy == "reflect" else ()
        context = StrategyContext(policy, plan.retriever, plan.config, cell.temperature, plan.seed, cues)
        size = max(1, options.batch // cell.votes)
        with RecordFile(plan.out / "cells" / cell.name) as file:
            for start in range(0, len(questions), size):
                batch = questions[start : start + size]
                answer_all(context, cell.strategy, cell.votes, batch, partial(keep, cell, file))
                if len(failures) >= MOST_FAILURES:
                    return f"{len(failures)} failures in a row, the last: {failures[-1]}"
    return ""


def _open_cells(plan: EvaluationPlan, fresh: bool) -> dict[str, Records]:
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
    return [q for q in cell.questions.questions if q.group not in rows or rows[q.group]["failure"]]


def _audits(plan: EvaluationPlan, observer: EvaluationObserver | None) -> dict[str, Audit]:
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

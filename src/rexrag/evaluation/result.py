"""What `eval.json` holds: figures of every cell, averages over sets, paired differences, failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rexrag import __version__
from rexrag.evaluation.cells import Cell, EvaluationPlan
from rexrag.evaluation.corpus_audit import Audit
from rexrag.evaluation.paired_tests import Tables, compare, macro
from rexrag.evaluation.published import PUBLISHED, cell_differences, setup_differences
from rexrag.evaluation.records import Records, cell_figures
from rexrag.evaluation.strategies import CLOSED_BOOK

Rows = Mapping[str, Records]
"""Rows of every cell, by the cell's name."""


def summarise(
    plan: EvaluationPlan, rows: Rows, audits: Mapping[str, Audit], stopped: str, assumed: str
) -> dict[str, Any]:
    """All but the paired differences. stopped: why not everything was asked; assumed: see `published`."""
    barriers = setup_differences(plan.config, plan.retriever, assumed)
    return {
        "rexrag": __version__,
        "policy": {"name": plan.policy.name, "digest": plan.policy.digest},
        "retriever": {
            "kind": plan.config.retriever.kind,
            "digest": plan.retriever.digest,
            "documents": len(getattr(plan.retriever, "documents", ())) or None,
            "topk": plan.config.retriever.topk,
            "assumed": assumed or None,
        },
        "agent": plan.config.agent.model_dump(mode="json"),
        "seed": plan.seed,
        "sets": {name: _set_facts(plan, name) for name in plan.sets},
        "cells": [_cell_result(cell, rows[cell.name], audits, barriers) for cell in plan.cells],
        "macro": {system: _macro(plan, rows, system) for system in plan.systems},
        "published": {name: dict(values) for name, values in PUBLISHED.items()},
        "not_comparable_because": barriers,
        "failures": _failures(plan, rows, stopped),
    }


def paired_differences(
    plan: EvaluationPlan, rows: Rows, others: Mapping[str, Tables]
) -> list[dict[str, Any]]:
    """Differences to other evaluations, and of every system to the first one."""
    own = {(cell.questions.name, cell.system): _asked(cell, rows[cell.name]) for cell in plan.cells}
    found = [row for label, theirs in others.items() for row in compare(own, theirs, label)]
    if len(plan.systems) > 1:
        control = plan.systems[0]
        first = {(name, system): table for (name, system), table in own.items() if system == control}
        rest = {(name, system): table for (name, system), table in own.items() if system != control}
        found += compare(rest, first, control)
    return found


def _cell_result(
    cell: Cell, rows: Records, audits: Mapping[str, Audit], barriers: list[str]
) -> dict[str, Any]:
    audit = audits.get(cell.questions.name) if cell.strategy not in CLOSED_BOOK else None
    figures = cell_figures(cell.questions, rows, audit)
    special = cell_differences(cell.questions, cell.strategy, cell.votes, cell.temperature)
    answered, wanted = figures["asked"] - figures["failed"], len(cell.questions.questions)
    if answered < wanted:
        special.append(f"{answered:,} of {wanted:,} questions answered so far")
    return {
        "set": cell.questions.name,
        "system": cell.system,
        "strategy": cell.strategy,
        "votes": cell.votes,
        "temperature": cell.temperature,
        "folder": f"cells/{cell.name}",
        "comparable": not barriers and not special,
        "not_comparable_because": [*barriers, *special],
        **figures,
    }


def _set_facts(plan: EvaluationPlan, name: str) -> dict[str, Any]:
    found = plan.sets[name]
    return {
        "title": found.title,
        "split": found.split,
        "source": found.source,
        "digest": found.digest,
        "questions": len(found.questions),
        "whole": found.whole,
        "asked": [q.group for q in found.questions] if len(found.questions) < found.whole else None,
        "strata": dict(found.strata) if found.stratified else None,
    }


def _asked(cell: Cell, rows: Records) -> Records:
    """The rows of a cell's sample: a larger sample may have left more."""
    return {q.group: rows[q.group] for q in cell.questions.questions if q.group in rows}


def _macro(plan: EvaluationPlan, rows: Rows, system: str) -> dict[str, Any]:
    tables = [_asked(cell, rows[cell.name]) for cell in plan.cells if cell.system == system]
    return {score: macro(tables, score) for score in ("em", "f1", "sub_em")}


def _failures(plan: EvaluationPlan, rows: Rows, stopped: str) -> dict[str, Any]:
    """How many rows failed or were never asked, and why: reasons by count, most frequent first."""
    tables = [(cell, _asked(cell, rows[cell.name])) for cell in plan.cells]
    reasons = Counter(row["failure"] for _, table in tables for row in table.values() if row["failure"])
    total = sum(len(cell.questions.questions) for cell, _ in tables)
    unasked = total - sum(len(table) for _, table in tables)
    return {
        "rows": total,
        "failed": sum(reasons.values()),
        "unasked": unasked,
        "share": (sum(reasons.values()) + unasked) / total if total else 0.0,
        "stopped": stopped,
        "reasons": dict(reasons.most_common(20)),
    }

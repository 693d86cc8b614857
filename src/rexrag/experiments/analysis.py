"""What a comparison found: figures of every arm over seeds, and paired differences to the control.

Reads nothing but run folders, `OUT/<arm>/seed-<n>`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rexrag.config.schema import SPENT, Budget
from rexrag.errors import RunFolderError
from rexrag.stats import area, interval, paired_p

COMPARED = (
    "em_at_budget",
    "em_half",
    "area",
    "em",
    "em_fresh",
    "em_1_hop",
    "em_2_hop",
    "em_3_hop",
    "em_4_hop",
)
"""Figures of a run that are compared in pairs, where it has them.

A run stops with the first step that passes the budget, so `em` and what else is of its end is a little past
it, further for an arm of larger steps. `em_at_budget` and `em_half` are read off the curve, linearly.
"""
DIAGNOSTICS = (
    "dead_ends/rate", "groups/all_wrong_before", "groups/all_wrong_after",
    "probes/success", "probes/kept_share", "ess", "searches/mean", "kl_to_start",
    *(f"{figure}/{segment}" for figure in ("ratio", "clip", "gradient")
      for segment in ("base", "prefix", "cue", "suffix")),
)  # fmt: skip
"""What `compare` works out of each run (see `_diagnostics`) and averages over seeds."""


def run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / arm / f"seed-{seed}"


def compare(
    out: Path, arms: Sequence[str], seeds: Sequence[int], budget: Budget, amount: float
) -> dict[str, Any]:
    """Figures of every arm over seeds, and its paired difference to the first arm."""
    found = {arm: [_figures(run_folder(out, arm, seed), budget, amount) for seed in seeds] for arm in arms}
    rows = {arm: _row(runs) | differences(runs, found[arms[0]]) for arm, runs in found.items()}
    for name in _compared(found[arms[0]]):
        del rows[arms[0]][f"{name}_difference"]
    facts = {"control": arms[0], "seeds": list(seeds), "budget": budget, "amount": amount}
    return facts | {"arms": rows}


def _compared(runs: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in COMPARED if all(name in run for run in runs)]


def _row(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    spent = ("steps", *SPENT.values())
    return {
        **{name: interval([run[name] for run in runs]) for name in _compared(runs)},
        **{name: float(np.mean([run[name] for run in runs])) for name in spent},
        "diagnostics": _mean_diagnostics([run["diagnostics"] for run in runs]),
        "curve": _mean_curve([run["curve"] for run in runs]),
        "runs": list(runs),
    }


def differences(runs: Sequence[dict[str, Any]], control: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Paired by seed: mean difference, its bootstrap interval, and the p-value of "no difference"."""
    found = {}
    for name in _compared(runs):
        pairs = [run[name] - other[name] for run, other in zip(runs, control, strict=True)]
        found[f"{name}_difference"] = interval(pairs) | {"p": paired_p(pairs)}
    return found


def _figures(folder: Path, budget: Budget, amount: float) -> dict[str, Any]:
    """One run."""
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    held_out = [row for row in rows if row["set"] == "held-out"]
    if not held_out or (held_out[0]["step"], held_out[-1]["step"]) != (0, summary["steps"]):
        raise RunFolderError(f"{folder}: eval.jsonl does not go from the start to the end; remove the folder")
    fresh = [row for row in rows if row["set"] == "fresh"]
    spent = [row[SPENT[budget]] for row in held_out]
    em = [row["em"]["value"] for row in held_out]
    return {
        "em_before": em[0],
        "em": em[-1],
        "em_at_budget": float(np.interp(amount, spent, em)),
        "em_half": float(np.interp(amount / 2, spent, em)),
        "area": area(spent, em, amount),
        **{f"em_{hops}_hop": value["value"] for hops, value in held_out[-1]["by_hops"].items()},
        **({"em_fresh": fresh[-1]["em"]["value"]} if fresh else {}),
        "curve": list(zip(spent, em, strict=True)),
        "steps": summary["steps"],
        **{name: held_out[-1][name] for name in SPENT.values()},
        "diagnostics": _diagnostics(folder / "metrics.jsonl"),
    }


def _diagnostics(file: Path) -> dict[str, float]:
    """Of a run: shares of all its probes; KL to the start at its last diagnosed step; else means over steps.

    A segment that a diagnosed step does not have has no share of its gradient. Before the first update the
    KL is 0 whatever the arm, which says nothing.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    steps = [json.loads(line) for line in lines]
    found = {name: [s[name] for s in steps if s.get(name) is not None] for name in DIAGNOSTICS}
    diagnosed = [step for step in steps if any(name.startswith("gradient/") for name in step)]
    for name in (name for name in found if name.startswith("gradient/") and found[name]):
        found[name] = [step.get(name) or 0.0 for step in diagnosed]
    later = [step.get("kl_to_start") for step in diagnosed if step["step"] > 1]
    found["kl_to_start"] = [kl for kl in later if kl is not None][-1:]
    means = {name: float(np.mean(values)) for name, values in found.items() if values}
    drawn, right, kept = (sum(s.get(f"probes/{n}") or 0 for s in steps) for n in ("drawn", "right", "kept"))
    if drawn:
        means |= {"probes/success": right / drawn, "probes/kept_share": kept / drawn}
    return {name: means[name] for name in DIAGNOSTICS if name in means}


def _mean_diagnostics(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    names = [name for name in DIAGNOSTICS if any(name in run for run in runs)]
    return {name: float(np.mean([run[name] for run in runs if name in run])) for name in names}


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean (spent, EM) of each evaluation over seeds, as far as all seeds have it."""
    points = [np.mean(point, axis=0) for point in zip(*curves, strict=False)]
    return [(float(spent), float(em)) for spent, em in points]

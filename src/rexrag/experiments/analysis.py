"""What a comparison found: figures of every arm over seeds, and paired differences to the control.

Reads nothing but run folders, `OUT/<arm>/seed-<n>`. Terminal, page and `compare.json` show these figures
under these names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rexrag.config.schema import SPENT, Budget
from rexrag.errors import RunFolderError
from rexrag.stats import area, difference, differs, interval

MEASURES = {
    "em_at_budget": "EM at budget",
    "em_half": "EM at half budget",
    "area": "mean EM to budget",
    "em": "EM after",
    "em_fresh": "EM, second world",
    **{f"em_{hops}_hop": f"EM, {hops} hop" for hops in range(1, 5)},
}
"""Figures of a run that are compared in pairs, where it has them, and their names.

A run stops with the first step that passes the budget, so what is of its end is a little past the budget,
further for an arm of larger steps. `em_at_budget` and `em_half` are read off the curve, linearly.
"""
COMPARED = tuple(MEASURES)
DIAGNOSTICS = (
    "dead_ends/rate", "groups/all_wrong_before", "groups/all_wrong_after",
    "probes/success", "probes/kept_share", "ess", "searches/mean", "kl_to_start",
    *(f"{figure}/{segment}" for figure in ("ratio", "clip", "gradient")
      for segment in ("base", "prefix", "cue", "suffix")),
)  # fmt: skip
"""What `compare` works out of each run (see `_diagnostics`) and averages over seeds."""


DIAGNOSTIC_NAMES = {
    "dead_ends/rate": "dead ends",
    "groups/all_wrong_before": "groups all wrong",
    "groups/all_wrong_after": "… after probes",
    "probes/success": "probes right",
    "probes/kept_share": "probes kept",
}
"""Diagnostics that a reader sees first, all shares."""
SEEDS_FOR_SIGNIFICANCE = 6
"""Of 2⁵ ways to flip signs of five pairs two are as extreme as all alike: p is .0625 at least."""
OVERSHOT = 0.2
"""Share of the budget by which a last step may pass it without a warning."""


def run_folder(out: Path, arm: str, seed: int) -> Path:
    return out / arm / f"seed-{seed}"


def compare(
    out: Path, arms: Sequence[str], seeds: Sequence[int], budget: Budget, amount: float
) -> dict[str, Any]:
    """Figures of every arm over seeds, and its paired difference to the first arm, the control.

    Raises RunFolderError where a run lacks its first or its last evaluation.
    """
    found = {arm: [_figures(run_folder(out, arm, seed), budget, amount) for seed in seeds] for arm in arms}
    rows = {arm: _row(runs) | differences(runs, found[arms[0]]) for arm, runs in found.items()}
    for name in _compared(found[arms[0]]):
        del rows[arms[0]][f"{name}_difference"]
    facts = {"control": arms[0], "seeds": list(seeds), "budget": budget, "amount": amount}
    result = facts | {"arms": rows}
    return result | {"warnings": _warnings(result)}


def findings(result: Mapping[str, Any]) -> list[str]:
    """One sentence an arm: its EM at the budget beside the control's, and whether they differ."""
    control, found = result["control"], []
    for arm, figures in result["arms"].items():
        gap = figures.get("em_at_budget_difference")
        if gap is None:
            continue
        side = "above" if gap["value"] >= 0 else "below"
        found.append(
            f"{arm}: EM at budget {abs(100 * gap['value']):.1f} points {side} {control}, "
            f"{'' if differs(gap) else 'not '}significantly different from 0."
        )
    return found


UNITS: dict[Budget, str] = {
    "generated": "generated tokens",
    "tokens": "tokens generated and read",
    "rollouts": "rollouts, probes included",
    "time": "seconds of training",
}
"""What a budget counts, in words."""


def budget_name(result: Mapping[str, Any]) -> str:
    """`60,000 generated tokens`."""
    return f"{result['amount']:,.10g} {UNITS[result['budget']]}"


def _warnings(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the differences."""
    found = []
    if len(result["seeds"]) < SEEDS_FOR_SIGNIFICANCE:
        found.append(few_seeds(len(result["seeds"])))
    for arm, figures in result["arms"].items():
        over = figures[SPENT[result["budget"]]] / result["amount"] - 1
        if over > OVERSHOT:
            found.append(f"{arm}: its last step went {over:.0%} past the budget; take a larger one.")
    return found


def few_seeds(count: int) -> str:
    return (
        f"{count} seed{'s' * (count != 1)}: no difference can have p ≤ .05; "
        f"take {SEEDS_FOR_SIGNIFICANCE} or more."
    )


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
        found[f"{name}_difference"] = difference(pairs)
    return found


def _figures(folder: Path, budget: Budget, amount: float) -> dict[str, Any]:
    """The figures of one run, off its evaluations, summary and metrics."""
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    held_out = [row for row in rows if row["set"] == "held-out"]
    if not held_out or (held_out[0]["step"], held_out[-1]["step"]) != (0, summary["steps"]):
        raise RunFolderError(f"{folder}: eval.jsonl lacks step 0 or the last step; remove the folder")
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
    """Of a run: shares of all its probes; `kl_to_start` at its last diagnosed step; else means over steps.

    A segment that a diagnosed step lacks counts as a gradient share of 0. The KL of the first step is left
    out: before an update it is 0 in every arm.
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
    """Mean (spent, EM) of each evaluation that all seeds have."""
    points = [np.mean(point, axis=0) for point in zip(*curves, strict=False)]
    return [(float(spent), float(em)) for spent, em in points]

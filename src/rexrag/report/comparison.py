"""Tables of several runs, as escaped HTML: a comparison at a budget, means over seeds, the single runs.

Intervals and tests are those of `rexrag.stats`, as in the terminal and in `compare.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from rexrag.experiments.analysis import MEASURES, budget_name
from rexrag.report.formatting import NONE, compact, duration, interval, points, signed, small, table
from rexrag.report.read import Estimate, Run
from rexrag.report.series import SYMBOLS, Arm
from rexrag.stats import difference, differs
from rexrag.stats import interval as mean_interval

GLYPHS = dict(zip(("circle-open", *SYMBOLS), "○●◆■▲✚✖", strict=True))
"""The marker of an arm in charts, as a character."""
RULE = (
    "Means over seeds with 95 % bootstrap intervals; *: significantly different from 0 (the interval "
    "excludes 0 and p ≤ .05)."
)


def arm_mark(arm: Arm) -> str:
    return (
        f'<span class="arm"><span class="glyph" style="color:var({arm.color})" aria-hidden="true">'
        f"{GLYPHS[arm.symbol]}</span> {escape(arm.name)}</span>"
    )


def cell(estimate: Estimate | None, tag: str = "span") -> str:
    return f"<{tag}>{points(estimate)}</{tag}> {small(interval(estimate))}"


def signed_interval(estimate: Estimate) -> str:
    """Ends of a difference in points, with signs; "" where there is no spread."""
    low, high = estimate.low, estimate.high
    return (
        "" if low is None or high is None or low >= high else f"[{signed(100 * low)}, {signed(100 * high)}]"
    )


def comparison_tables(arms: Sequence[Arm], comparison: Mapping[str, Any]) -> str:
    """The table that `rexrag compare` prints, and the single runs."""
    found = comparison["arms"]
    marks = {arm.name: arm_mark(arm) for arm in arms}
    body = []
    for name, title in MEASURES.items():
        if not any(name in figures for figures in found.values()):
            continue
        em = [cell(Estimate.of(f[name]), "b") if name in f else NONE for f in found.values()]
        body.append([f"{title}, %", *em])
        gaps = [figures.get(f"{name}_difference") for figures in found.values()]
        if any(gaps):
            body.append(
                [
                    f"&ensp;minus {escape(comparison['control'])}, points",
                    *("" if g is None else gap_cell(g) for g in gaps),
                ]
            )
    body.append(["Generated tokens", *(compact(figures["generated_tokens"]) for figures in found.values())])
    body.append(["Time of a run", *(duration(figures["seconds"]) for figures in found.values())])
    head = [f"{len(comparison['seeds'])} seeds, budget {escape(budget_name(comparison))}"]
    head += [marks.get(label, escape(label)) for label in found]
    return f'{table(head, body)}<p class="quiet">{RULE}</p>{_single_runs(arms)}'


def gap_cell(gap: Mapping[str, float]) -> str:
    """A paired difference in points, its interval and p."""
    star = "*" if differs(gap) else ""
    notes = [text for text in (signed_interval(Estimate.of(gap)), f"p = {gap['p']:.3f}") if text]
    return f"<b>{signed(100 * gap['value'])}{star}</b> {small(', '.join(notes))}"


def run_table(arms: Sequence[Arm]) -> str:
    """One row a run; several seeds of an arm come folded under a table of the arms' means."""
    if all(len(arm.runs) == 1 for arm in arms):
        return _runs(arms)
    return f'{_arm_table(arms)}<p class="quiet">{RULE}</p>{_single_runs(arms)}'


def _single_runs(arms: Sequence[Arm]) -> str:
    return f'<details class="block"><summary>The single runs</summary>{_runs(arms)}</details>'


def _runs(arms: Sequence[Arm]) -> str:
    scale = _scale(arms)
    head = ["Algorithm", "Seed", "Steps", "EM before, %", "EM after, %", "Rise, points", _axis_title(scale)]
    body = []
    for arm in arms:
        for run in arm.runs:
            before, after = run.held_out()
            done, planned = run.steps()
            body.append([
                arm_mark(arm), str(run.seed),
                str(done) if run.finished or planned is None else f"step {done} of {planned}",
                cell(before), cell(after), _rise(run), _track(arm, before, after, scale),
                compact(run.spent("generated_tokens")), duration(run.spent("seconds")),
            ])  # fmt: skip
    return table([*head, "Generated tokens", "Time"], body)


def _rise(run: Run) -> str:
    before, after = run.held_out()
    return NONE if before is None or after is None else signed(100 * (after.value - before.value))


def _arm_table(arms: Sequence[Arm]) -> str:
    """Each arm's mean over its seeds, and its difference to the control at the seeds both have."""
    base, scale = next((arm for arm in arms if arm.is_control), None), _scale(arms)
    head = ["Algorithm", "Seeds", "EM before, %", "EM after, %", "Rise, points", _axis_title(scale)]
    if base:
        head.insert(5, f"EM after minus {escape(base.name)}, points")
    body = []
    for arm in arms:
        pairs = [(b.value, a.value) for b, a in (run.held_out() for run in arm.runs) if b and a]
        cells = [arm_mark(arm), str(len(pairs)), *[NONE] * 4]
        if pairs:
            before, after = (Estimate.of(mean_interval([pair[i] for pair in pairs])) for i in (0, 1))
            rises = gap_cell(difference([a - b for b, a in pairs]))
            cells[2:] = [cell(before, "b"), cell(after, "b"), rises, _track(arm, before, after, scale)]
        if base:
            gaps = paired(arm, base)
            cells.insert(5, "" if arm is base else gap_cell(difference(gaps)) if gaps else NONE)
        body.append(
            [*cells, compact(_mean_spent(arm, "generated_tokens")), duration(_mean_spent(arm, "seconds"))]
        )
    return table([*head, "Generated tokens", "Time"], body)


def paired(arm: Arm, base: Arm) -> list[float]:
    """Differences of the last held-out scores, one for each seed that both arms finished."""
    ends = [{run.seed: run.held_out()[1] for run in some.runs if run.finished} for some in (arm, base)]
    ours, theirs = ({seed: end.value for seed, end in some.items() if end} for some in ends)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _mean_spent(arm: Arm, key: str) -> float | None:
    values = [value for run in arm.runs if (value := run.spent(key)) is not None]
    return fmean(values) if values else None


def _scale(arms: Sequence[Arm]) -> float:
    """Right end of the axis of `_track`: the next ten points above every interval."""
    estimates = [e for arm in arms for run in arm.runs for e in run.held_out() if e]
    top = max([0.1, *(e.high if e.high is not None else e.value for e in estimates)])
    return min(1.0, -(-top * 100 // 10) / 10)


def _axis_title(scale: float) -> str:
    return f"EM, 0 to {100 * scale:.0f} %"


def _track(arm: Arm, before: Estimate | None, after: Estimate | None, scale: float) -> str:
    """Both intervals on one axis: before as a hollow mark, after in the arm's colour."""
    parts = []
    for kind, estimate in (("was", before), ("now", after)):
        if estimate:
            low, high = (estimate.value if e is None else e for e in (estimate.low, estimate.high))
            left, right = (100 * min(1.0, max(0.0, end) / scale) for end in (low, high))
            at = 100 * min(1.0, estimate.value / scale)
            parts.append(f'<i class="bar {kind}" style="left:{left:.1f}%;width:{right - left:.1f}%"></i>')
            parts.append(f'<i class="dot {kind}" style="left:{at:.1f}%"></i>')
    spoken = f"from {points(before)} to {points(after)}"
    opening = f'<span class="track" role="img" aria-label="{spoken}" style="--ink:var({arm.color})">'
    return f"{opening}{''.join(parts)}</span>"

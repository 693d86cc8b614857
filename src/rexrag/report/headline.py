"""The top of a report, as escaped HTML: the verdict, the figures behind it, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from rexrag.experiments.analysis import findings
from rexrag.report.comparison import arm_mark, cell, comparison_tables, run_table, signed_interval
from rexrag.report.formatting import NONE, compact, duration, interval, points, signed, small, table
from rexrag.report.read import Estimate, Evaluation, Run, number
from rexrag.report.series import Arm
from rexrag.stats import difference, differs

Comparison = Mapping[str, Any]
"""What `experiments.analysis.compare` returns."""


def headline(arms: Sequence[Arm], comparison: Comparison | None = None) -> str:
    """The verdict, what was run, and its figures: cards for one run and its control, else tables."""
    lead = next((arm for arm in arms if not arm.is_control), arms[0])
    runs = [run for arm in arms for run in arm.runs]
    first = lead.runs[0]
    single = len(arms) <= 2 and all(len(arm.runs) == 1 for arm in arms)
    against = next(arm for arm in arms if arm is not lead) if single and len(arms) == 2 else None
    if comparison is not None:
        figures = comparison_tables(arms, comparison)
    elif len(runs) > 1:
        figures = run_table(arms)
    else:
        figures = ""
    return "\n".join(
        [
            _outcome(arms, comparison),
            f'<p class="sub">Training report · <b>{escape(first.name)}</b> · '
            f"{' · '.join(arm_mark(arm) for arm in arms)} · {_seeds(runs)}</p>",
            _notes(runs),
            _cards(first, against) if single else "",
            figures,
            _beside_control(first, against) if against else "",
        ]
    )


def evaluation_table(arms: Sequence[Arm]) -> str:
    """The first and the last evaluation of every run and set: EM by hops, F1, answers and searches."""
    runs = [(arm, run) for arm in arms for run in arm.runs if run.evaluations]
    hops = sorted({hop for _, run in runs for row in run.evaluations for hop in row.by_hops})
    if not runs:
        return '<p class="quiet">No evaluation yet.</p>'
    by_hops = [f"EM, {escape(hop)} hop" for hop in hops]
    head = ["Algorithm", "Seed", "Set", "Step", "EM, %", "F1, %", *by_hops]
    head += ["No answer, %", "Invalid turns a question", "Searches a question"]
    body = []
    for arm, run in runs:
        for name in dict.fromkeys(row.set for row in run.evaluations):
            rows = [row for row in run.evaluations if row.set == name]
            for row in dict.fromkeys((rows[0].step, rows[-1].step)):
                body.append(_evaluation_cells(arm, run, next(r for r in rows if r.step == row), hops))
    return table(head, body)


def _evaluation_cells(arm: Arm, run: Run, row: Evaluation, hops: Sequence[str]) -> list[str]:
    shares = [row.by_hops.get(hop) for hop in hops]
    return [
        arm_mark(arm),
        str(run.seed),
        escape(row.set),
        str(row.step),
        cell(row.em),
        points(row.f1),
        *(f"{points(share)} {small(f'n = {share.n}' if share and share.n else '')}" for share in shares),
        _mean(row.unanswered, 100.0, 1),
        _mean(row.invalid, 1.0, 2),
        _mean(row.searches, 1.0, 2),
    ]


def _mean(value: float | None, factor: float, digits: int) -> str:
    return NONE if value is None else f"{factor * value:.{digits}f}"


def _seeds(runs: Iterable[Run]) -> str:
    seeds = [str(seed) for seed in sorted({run.seed for run in runs})]
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def _outcome(arms: Sequence[Arm], comparison: Comparison | None) -> str:
    """The first line: the finding of a comparison, else the verdict on the run that is not the control."""
    if comparison is not None:
        first, *rest = findings(comparison) or ["One algorithm, nothing to compare."]
        rest += comparison.get("warnings", [])
    elif sum(len(arm.runs) for arm in arms) <= 2:
        lead, *others = sorted(arms, key=lambda arm: arm.is_control)
        (run, *more) = [*lead.runs, *(run for arm in others for run in arm.runs)]
        verdict = run.verdict
        first, rest = verdict.sentence, [verdict.line.removeprefix(verdict.sentence).strip()]
        first = f"{run.arm}: {first}" if more else first
        rest += [f"{other.label}: {other.verdict.line}" for other in more]
    else:
        learned = sum(run.verdict.kind == "learned" for arm in arms for run in arm.runs)
        first = f"{learned} of {sum(len(arm.runs) for arm in arms)} runs learned."
        rest = [
            f"{run.label}: {run.verdict.line}"
            for arm in arms
            for run in arm.runs
            if run.verdict.kind != "learned"
        ]
    lines = "".join(f'<p class="because">{escape(line)}</p>' for line in rest if line)
    return f'<h1 class="outcome">{escape(first)}</h1>{lines}'


def rise(run: Run) -> float | None:
    """Held-out EM after minus before, in points."""
    before, after = run.held_out()
    return None if before is None or after is None else 100 * (after.value - before.value)


def _cards(run: Run, against: Arm | None) -> str:
    """Before, after and cost in large figures, the control's beside them."""
    control = against.runs[0] if against else None
    before, after = run.held_out()
    theirs = control.held_out() if control else (None, None)
    n = next((end.n for end in (after, before) if end and end.n), None)
    after_note = f"{interval(after)}<br>{f'{n} held-out questions, ' if n else ''}95 % interval"
    cards = [
        ("EM before, %", points(before), interval(before), points(theirs[0])),
        (
            f"EM {'after' if run.finished else 'so far'}, %",
            points(after),
            after_note,
            f"{points(theirs[1])} {interval(theirs[1])}",
        ),
        ("Rise, points", signed(rise(run)), _rise_interval(run), signed(rise(control)) if control else ""),
        ("No answer, %", *_unanswered(run), _unanswered(control)[0] if control else ""),
        ("Generated tokens", *_spent(run, control, "generated_tokens", compact), "filtered probes included"),
        ("Time", *_spent(run, control, "seconds", duration), _progress(run)),
    ]
    # The last two have their note at the end.
    cards[4:] = [(title, value, note, beside) for title, value, beside, note in cards[4:]]
    return f'<dl class="cards">{"".join(_card(*card, against) for card in cards)}</dl>'


def _card(title: str, value: str, note: str, of_control: str, against: Arm | None) -> str:
    beside = f'<span class="beside">{escape(against.name)}: {of_control}</span>' if against else ""
    return f'<div class="card"><dt>{title}</dt><dd>{value}</dd><span class="note">{note}</span>{beside}</div>'


def _rise_interval(run: Run) -> str:
    """The interval of `summary.rise`, where that rise is the difference shown."""
    stated, shown = (run.summary or {}).get("rise"), rise(run)
    if not isinstance(stated, dict) or shown is None:
        return ""
    value, low, high = (number(stated, key) for key in ("value", "low", "high"))
    if value is None or low is None or high is None or abs(100 * value - shown) > 0.05:
        return ""
    return signed_interval(Estimate(value, low, high))


def _unanswered(run: Run) -> tuple[str, str]:
    """Held-out questions without an answer: at the last evaluation, and a note of those before training."""
    shares = [row.unanswered for row in run.held_out_rows() if row.unanswered is not None]
    if not shares:
        return NONE, ""
    return f"{100 * shares[-1]:.1f}", f"of held-out questions; before: {100 * shares[0]:.1f}"


def _spent(run: Run, control: Run | None, key: str, say: Callable[[float | None], str]) -> tuple[str, str]:
    return say(run.spent(key)), say(control.spent(key)) if control else ""


def _progress(run: Run) -> str:
    done, planned = run.steps()
    return f"{done} steps" if run.finished or planned is None else f"step {done} of {planned}"


def _beside_control(run: Run, against: Arm) -> str:
    """The difference of a run to its control: paired by question, and what it does not say."""
    control = against.runs[0]
    name = "its control" if against.is_control else escape(against.name)
    after, other = run.held_out()[1], control.held_out()[1]
    if after is None or other is None:
        return ""
    gap = 100 * (after.value - other.value)
    verb, side = "ends" if run.finished else "stands", "above" if gap >= 0 else "below"
    parts = [f"The run {verb} {abs(gap):.1f} points {side} {name}{_significance(run, control)}."]
    ours, theirs = run.spent("generated_tokens"), control.spent("generated_tokens")
    if ours and theirs:
        parts.append(f"It generated {ours / theirs:.2f} times the tokens of {name}.")
        if abs(ours / theirs - 1) > 0.05:
            parts.append("The first chart compares them at equal tokens.")
    parts.append("One seed each: the interval is over questions and leaves out chance between seeds.")
    return f'<p class="quiet">{" ".join(parts)}</p>'


def _significance(run: Run, control: Run) -> str:
    """`, 95 % interval [+1.0, +9.0], significantly different from 0`, where questions can be paired."""
    ends = [rows[-1].by_question if (rows := some.held_out_rows()) else () for some in (run, control)]
    if not ends[0] or len(ends[0]) != len(ends[1]):
        return ""
    gap = difference([ours - theirs for ours, theirs in zip(*ends, strict=True)])
    shown = signed_interval(Estimate.of(gap))
    verdict = f"{'' if differs(gap) else 'not '}significantly different from 0"
    return f", 95 % interval {shown}, {verdict}" if shown else f", {verdict}"


def _notes(runs: Iterable[Run]) -> str:
    items = [
        f"<li><b>{escape(run.label)}{' (control)' if run.control else ''}</b>: {escape(note)}</li>"
        for run in runs
        for note in run.notes
    ]
    return f'<ul class="notes" role="status">{"".join(items)}</ul>' if items else ""

"""The top of a report: what was trained, how far it got and what that cost, as escaped HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from statistics import fmean

from rexrag.report.formatting import NONE, compact, duration, interval, points, signed, small, table
from rexrag.report.read import Estimate, Evaluation, Run, number
from rexrag.report.series import SYMBOLS, Arm, mean_interval

GLYPHS = dict(zip(("circle-open", *SYMBOLS), "○●◆■▲✚✖", strict=True))
"""The marker of an arm in charts, as a character."""


def headline(arms: Sequence[Arm]) -> str:
    """Title, the sentence that matters, the cards and a table with one row a run."""
    lead = next((arm for arm in arms if not arm.is_control), arms[0])
    runs = [run for arm in arms for run in arm.runs]
    first = lead.runs[0]
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    plural = "s" if "," in seeds else ""
    single = len(arms) <= 2 and all(len(arm.runs) == 1 for arm in arms)
    against = next(arm for arm in arms if arm is not lead) if single and len(arms) == 2 else None
    return "\n".join(
        [
            '<p class="kicker">rexrag · training report</p>',
            f"<h1>{escape(first.name)}</h1>",
            f'<p class="sub">{" · ".join(_arm_mark(arm) for arm in arms)} · seed{plural} {seeds}</p>',
            _notes(runs),
            _hero(first, against) if single else "",
            _run_table(arms) if len(runs) > 1 else "",
            _comparison_note(first, against) if against else "",
        ]
    )


def evaluation_table(arms: Sequence[Arm]) -> str:
    """The first and the last evaluation of every run and set: EM by hops, F1, searches, unanswered."""
    runs = [(arm, run) for arm in arms for run in arm.runs if run.evaluations]
    hops = sorted({hop for _, run in runs for row in run.evaluations for hop in row.by_hops})
    if not runs:
        return '<p class="quiet">No evaluation yet.</p>'
    by_hops = [f"EM, {escape(hop)} hop" for hop in hops]
    head = ["Arm", "Seed", "Set", "Step", "EM", "F1", *by_hops, "Searches", "Unanswered"]
    body = []
    for arm, run in runs:
        for name in dict.fromkeys(row.set for row in run.evaluations):
            rows = [row for row in run.evaluations if row.set == name]
            for row in dict.fromkeys((rows[0].step, rows[-1].step)):
                body.append(_evaluation_cells(arm, run, next(r for r in rows if r.step == row), hops))
    return table(head, body)


def rise(run: Run) -> float | None:
    """Points of held-out exact match won."""
    before, after = run.held_out()
    return None if before is None or after is None else 100 * (after.value - before.value)


def _rise_interval(run: Run) -> str:
    """The interval of `summary.rise`, where that rise is the difference shown."""
    stated, shown = (run.summary or {}).get("rise"), rise(run)
    if not isinstance(stated, dict) or shown is None:
        return ""
    value, low, high = (number(stated, key) for key in ("value", "low", "high"))
    if value is None or low is None or high is None or abs(100 * value - shown) > 0.05:
        return ""
    return f"[{100 * low:+.1f}, {100 * high:+.1f}]".replace("-", "−")


def _arm_mark(arm: Arm) -> str:
    return (
        f'<span class="arm"><span class="glyph" style="color:var({arm.color})" aria-hidden="true">'
        f"{GLYPHS[arm.symbol]}</span> {escape(arm.name)}</span>"
    )


def _hero(run: Run, against: Arm | None) -> str:
    """Before → after in large figures, and cards with the control's numbers beside."""
    before, after = run.held_out()
    control = against.runs[0] if against else None

    n = next((end.n for end in (after, before) if end and end.n), None)
    theirs = control.held_out() if control else (None, None)
    figures = [
        ("Held-out exact match before", points(before), interval(before), points(theirs[0])),
        (
            f"Held-out exact match {'after' if run.finished else 'so far'}",
            points(after),
            f"{interval(after)}<br>{f'{n} questions, ' if n else ''}95 % interval",
            f"{points(theirs[1])} {interval(theirs[1])}",
        ),
        ("Rise in points", signed(rise(run)), _rise_interval(run), signed(rise(control)) if control else ""),
        ("Generated tokens", *_spent(run, control, "generated_tokens", compact, "filtered probes included")),
        ("Wall time", *_spent(run, control, "seconds", duration, _progress(run))),
    ]
    cards = []
    for title, value, note, of_control in figures:
        beside = f'<span class="beside">{escape(against.name)}: {of_control}</span>' if against else ""
        note = f'<span class="note">{note}</span>'
        cards.append(f'<div class="card"><dt>{title}</dt><dd>{value}</dd>{note}{beside}</div>')
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _spent(
    run: Run, control: Run | None, key: str, say: Callable[[float | None], str], note: str
) -> tuple[str, str, str]:
    return say(run.spent(key)), note, say(control.spent(key)) if control else ""


def _progress(run: Run) -> str:
    done, planned = run.steps()
    return f"{done} steps" if run.finished or planned is None else f"step {done} of {planned}"


def _scale(arms: Sequence[Arm]) -> float:
    """Right end of the interval track: the next ten points above every interval."""
    estimates = [e for arm in arms for run in arm.runs for e in run.held_out() if e]
    top = max([0.1, *(e.high if e.high is not None else e.value for e in estimates)])
    return min(1.0, -(-top * 100 // 10) / 10)


def _run_table(arms: Sequence[Arm]) -> str:
    """One row a run; several seeds of an arm come folded under a table of the arms' means."""
    scale = _scale(arms)
    axis = f"EM, 0 to {100 * scale:.0f}"
    head = ["Arm", "Seed", "Steps", "EM before", "EM after", "Rise", axis, "Generated tokens", "Wall time"]
    body = []
    for arm in arms:
        for run in arm.runs:
            before, after = run.held_out()
            body.append([
                _arm_mark(arm), str(run.seed), _progress(run).removesuffix(" steps"),
                _cell(before), _cell(after), f"{signed(rise(run))} {small(_rise_interval(run))}",
                _track(arm, before, after, scale),
                compact(run.spent("generated_tokens")), duration(run.spent("seconds")),
            ])  # fmt: skip
    runs = table(head, body)
    if all(len(arm.runs) == 1 for arm in arms):
        return runs
    return (
        f"{_arm_table(arms, scale)}"
        '<p class="quiet">Means over seeds with the 95 % t-interval of the mean (from three seeds on).</p>'
        f'<details class="block"><summary>The single runs</summary>{runs}</details>'
    )


def _arm_table(arms: Sequence[Arm], scale: float) -> str:
    """Each arm's mean over its seeds, and its difference to the control at the seeds both have."""
    base = next((arm for arm in arms if arm.is_control), None)
    axis = f"EM, 0 to {100 * scale:.0f}"
    head = ["Arm", "Seeds", "EM before", "EM after", "Rise", axis, "Generated tokens", "Wall time"]
    if base:
        head.insert(5, f"EM after − {escape(base.name)}, paired")
    body = []
    for arm in arms:
        pairs = [(b.value, a.value) for b, a in (run.held_out() for run in arm.runs) if b and a]
        cells = [_arm_mark(arm), str(len(pairs)), *[NONE] * 4]
        if pairs:
            before, after = (_estimate([pair[i] for pair in pairs]) for i in (0, 1))
            cells[2:] = [
                _cell(before, "b"),
                _cell(after, "b"),
                _difference([a - b for b, a in pairs]),
                _track(arm, before, after, scale),
            ]
        if base:
            cells.insert(5, "" if arm is base else _difference(_paired(arm, base)))
        body.append(
            [*cells, compact(_mean_spent(arm, "generated_tokens")), duration(_mean_spent(arm, "seconds"))]
        )
    return table(head, body)


def _mean_spent(arm: Arm, key: str) -> float | None:
    values = [value for run in arm.runs if (value := run.spent(key)) is not None]
    return fmean(values) if values else None


def _cell(estimate: Estimate | None, tag: str = "span") -> str:
    return f"<{tag}>{points(estimate)}</{tag}> {small(interval(estimate))}"


def _paired(arm: Arm, base: Arm) -> list[float]:
    """Differences of the last held-out scores, one for each seed that both arms finished."""
    ends = [{run.seed: run.held_out()[1] for run in some.runs if run.finished} for some in (arm, base)]
    ours, theirs = ({seed: end.value for seed, end in some.items() if end} for some in ends)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def _estimate(values: Sequence[float]) -> Estimate:
    mean, half = mean_interval(values)
    return Estimate(mean) if half is None else Estimate(mean, mean - half, mean + half)


def _difference(values: Sequence[float]) -> str:
    if not values:
        return NONE
    mean, half = mean_interval(values)
    ends = "" if half is None else f"[{signed(100 * (mean - half))}, {signed(100 * (mean + half))}]"
    return f"<b>{signed(100 * mean)}</b> {small(ends)}"


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


def _comparison_note(run: Run, against: Arm) -> str:
    """What may and may not be read from the pair."""
    control = against.runs[0]
    name = "its control" if against.is_control else escape(against.name)
    after, other = run.held_out()[1], control.held_out()[1]
    if after is None or other is None:
        return ""
    gap = 100 * (after.value - other.value)
    verb, side = "ends" if run.finished else "stands", "above" if gap >= 0 else "below"
    parts = [f"The run {verb} {abs(gap):.1f} points {side} {name}."]
    if None not in (after.low, after.high, other.low, other.high):
        overlap = (after.low or 0) <= (other.high or 0) and (other.low or 0) <= (after.high or 0)
        parts.append("Their 95 % intervals overlap." if overlap else "Their 95 % intervals do not overlap.")
    ours, theirs = run.spent("generated_tokens"), control.spent("generated_tokens")
    if ours and theirs:
        parts.append(f"It generated {ours / theirs:.2f} times the tokens of {name}.")
        parts.append(
            "The first chart compares them at equal tokens." if abs(ours / theirs - 1) > 0.05 else ""
        )
    parts.append("One seed each: chance between seeds is not in these intervals.")
    return f'<p class="quiet">{" ".join(parts)}</p>'


def _notes(runs: Iterable[Run]) -> str:
    items = [
        f"<li><b>{escape(run.label)}{' (control)' if run.control else ''}</b>: {escape(note)}</li>"
        for run in runs
        for note in run.notes
    ]
    return f'<ul class="notes" role="status">{"".join(items)}</ul>' if items else ""


def _evaluation_cells(arm: Arm, run: Run, row: Evaluation, hops: Sequence[str]) -> list[str]:
    shares = [row.by_hops.get(hop) for hop in hops]
    return [
        _arm_mark(arm),
        str(run.seed),
        escape(row.set),
        str(row.step),
        _cell(row.em),
        points(row.f1),
        *(f"{points(share)} {small(f'n = {share.n}' if share and share.n else '')}" for share in shares),
        NONE if row.searches is None else f"{row.searches:.2f}",
        NONE if row.unanswered is None else f"{100 * row.unanswered:.1f} %",
    ]

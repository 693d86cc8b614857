"""How numbers are written, in the report and in the terminal, and the report's one kind of table."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rexrag.report.read import Estimate

NONE = "–"


def compact(value: float | None) -> str:
    """1234567 -> 1.23 M."""
    if value is None:
        return NONE
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """4210 -> 1 h 10 min."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def points(estimate: Estimate | None) -> str:
    """Exact match in percent, 0 to 100."""
    return NONE if estimate is None else f"{100 * estimate.value:.1f}"


def interval(estimate: Estimate | None) -> str:
    """Its ends in percent; "" where there is no interval, or no spread."""
    if estimate is None or estimate.low is None or estimate.high is None or estimate.low >= estimate.high:
        return ""
    return f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def signed(value: float | None) -> str:
    """A difference in points, with its sign."""
    return NONE if value is None else f"{value:+.1f}".replace("-", "−")


def small(text: str) -> str:
    return f"<small>{text}</small>" if text else ""


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Head and cells are HTML already. `data-label` lets a phone show a row as a card."""
    labels = [re.sub("<[^>]*>", "", title).strip() for title in head]
    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    rows = "".join(
        "<tr>" + "".join(f'<td data-label="{t}">{c}</td>' for t, c in zip(labels, row, strict=True)) + "</tr>"
        for row in body
    )
    return f'<table class="figures"><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>'

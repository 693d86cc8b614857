"""Run folders to one HTML file that needs nothing else: no network, no second file.

Three guards keep text from models and documents data: markup made here escapes every value; what the script
shows travels as JSON in a data block and is set as text; and a content security policy lets nothing run but
the two scripts below, known by their hashes, and lets nothing load at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from rexrag.io import write_bytes
from rexrag.report.charts import Chart, make_charts
from rexrag.report.formatting import compact
from rexrag.report.headline import Comparison, evaluation_table, headline
from rexrag.report.read import COMPARISON, Run, read_comparison, read_runs
from rexrag.report.rollouts import CAP, Chosen, choose_rollouts
from rexrag.report.series import Arm, group_arms


def write_report(
    runs: Sequence[Path], out: Path, control: str = "grpo", comparison: Comparison | None = None
) -> Path:
    """Write one self-contained page about `runs` (and the `control/` run inside each) to `out`.

    The one folder of a comparison (`rexrag compare --out`) stands for its runs and its figures.

    out: the file, or a folder in which `report.html` is written. control: the algorithm that others are
    compared with. comparison: what `experiments.analysis.compare` found in these runs; the page then shows
    its figures, and draws every curve against its budget. Runs that are still going are shown so far.
    Returns the file. Raises DataError where a folder is no run folder or a file is damaged.
    """
    out = Path(out) / "report.html" if Path(out).is_dir() else Path(out)
    folders = [Path(run) for run in runs]
    if comparison is None and len(folders) == 1 and (folders[0] / COMPARISON).is_file():
        comparison, folders = read_comparison(folders[0])
        control = str(comparison["control"])
    found = read_runs(folders)
    missing: list[list[str]] = [[] for _ in found]
    chosen = choose_rollouts(found, missing)
    found = [replace(run, notes=[*run.notes, *more]) for run, more in zip(found, missing, strict=True)]
    # A name may hold half a surrogate pair, which UTF-8 cannot write.
    page = _page(found, chosen, group_arms(found, control), comparison)
    write_bytes(out, page.encode("utf-8", errors="replace"))
    return out


def json_block(value: object) -> str:
    """JSON that is safe inside a script element: ASCII only, and no `<`, `>` or `&` in it."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: object) -> object:
    """Floats to five significant digits; NaN and infinity, which JSON lacks, to null."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _page(
    runs: Sequence[Run], chosen: Chosen, arms: Sequence[Arm], comparison: Comparison | None = None
) -> str:
    from plotly.offline import get_plotlyjs

    charts, empty, width = make_charts(arms, None if comparison is None else comparison["budget"])
    ours = files("rexrag.report")
    scripts = [get_plotlyjs(), ours.joinpath("report.js").read_text(encoding="utf-8")]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"
    data = {
        "charts": [_chart(chart) for chart in charts],
        "rollouts": chosen.records,
        "runs": [_label(run) for run in runs],
    }
    sections = [
        f"<header>{headline(arms, comparison)}</header>",
        _section("curves", "Curves", _curves(arms, charts, empty, width)),
        _section("agent", "What the agent did", _browser(chosen, runs)),
        _section("setup", "Configuration and environment", _setup(runs)),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(runs[0].name)} · rexrag report</title>
<style>
{ours.joinpath("report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<a class="skip" href="#h-agent">Skip to the rollouts</a>
<main>
{"".join(sections)}
</main>
<noscript>Charts and rollouts need JavaScript; nothing is loaded from the network.</noscript>
<script type="application/json" id="data">{json_block(data)}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


def _section(name: str, title: str, body: str) -> str:
    return f'<section aria-labelledby="h-{name}"><h2 id="h-{name}">{title}</h2>{body}</section>'


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _chart(chart: Chart) -> dict[str, Any]:
    return {"title": chart.title, "caption": chart.caption, "views": chart.views, "layout": chart.layout}


def _curves(arms: Sequence[Arm], charts: Sequence[Chart], empty: Sequence[str], width: int) -> str:
    thick = f"the moving average over the last {width} steps" if width > 1 else "the value at each step"
    thick = f"the mean over seeds ({thick})" if any(len(arm.runs) > 1 for arm in arms) else thick
    lines = (
        f'<p class="quiet">Thin lines are single runs, thick lines {thick}. '
        "A click on a name in a legend hides or shows its line.</p>"
    )
    figures = "".join(_figure(i, chart) for i, chart in enumerate(charts) if "" in chart.views and chart.wide)
    rest = "".join(_figure(i, chart) for i, chart in enumerate(charts) if not chart.wide)
    detailed = [arm.name for arm in arms if any(chart.views.get(arm.name) for chart in charts)]
    choose = ""
    if len(detailed) > 1:
        trained = [arm.name for arm in arms if not arm.is_control and arm.name in detailed]
        first = (trained or detailed)[0]
        options = "".join(
            f"<option{' selected' if name == first else ''}>{escape(name)}</option>" for name in detailed
        )
        choose = f'<label>Algorithm in the charts that show one <select id="arm">{options}</select></label>'
    missing = f"Not recorded in these runs: {escape(', '.join(empty))}." if empty else ""
    return "\n".join(
        [
            figures,
            _fold("First and last evaluation: EM by hops, F1, answers and searches", evaluation_table(arms)),
            f'<div class="bar-top">{lines}{choose}</div><div class="grid">{rest}</div>',
            f'<p class="quiet">{missing}</p>' if missing else "",
        ]
    )


def _fold(summary: str, body: str) -> str:
    return f'<details class="block"><summary>{summary}</summary>{body}</details>'


def _figure(place: int, chart: Chart) -> str:
    wide = ' class="wide"' if chart.wide else ""
    of_arm = "" if "" in chart.views else ' <span class="of-arm"></span>'
    return (
        f"<figure{wide}><h3>{escape(chart.title)}{of_arm}</h3><figcaption>{escape(chart.caption)}</figcaption>"
        f'<div class="plot" id="chart-{place}" role="img" aria-label="{escape(chart.title)}"></div></figure>'
    )


ORIGIN_LEGEND = (
    ("policy", "generated by the model, trained on"),
    ("cue", "the probe's cue, inserted; trained on in some algorithms"),
    ("evidence", "retrieved text, never trained on"),
    ("notice", "the environment's message, never trained on"),
)
KINDS = (("", "all"), ("probe", "probe"), ("base", "base"))
ANSWERS = (("", "all"), ("recovered", "dead end recovered"), ("right", "right"), ("wrong", "wrong or none"))


def _browser(chosen: Chosen, runs: Sequence[Run]) -> str:
    """What the list holds, the legend, the filters, and two empty places that the script fills."""
    if not sum(chosen.recorded.values()):
        return '<p class="quiet">No rollout was recorded.</p>'
    legend = "".join(f'<li><span class="tag {o}">{o}</span> {escape(text)}</li>' for o, text in ORIGIN_LEGEND)
    which = [("", "all"), *((str(i), _label(run)) for i, run in enumerate(runs))]
    return f"""{_what_is_shown(chosen)}
<ul class="legend">{legend}</ul>
<form id="filters" role="search" aria-label="Filter rollouts">
{_select("Kind", "kind", KINDS)}
{_select("Answer", "answer", ANSWERS)}
{_select("Run", "run", which) if len(runs) > 1 else ""}
<label>Step <input name="step" inputmode="numeric" size="7" placeholder="12, 10-20"></label>
<label class="grow">Text <input name="text" type="search" placeholder="in question, answer, trace"></label>
<output id="count" aria-live="polite"></output>
</form>
<div class="browser">
<ul id="list" aria-label="Rollouts"></ul>
<article id="detail" aria-label="Rollout" tabindex="-1"></article>
</div>"""


def _what_is_shown(chosen: Chosen) -> str:
    recorded, shown = sum(chosen.recorded.values()), sum(chosen.shown.values())
    by_outcome = ((name, chosen.shown[name], total) for name, total in chosen.recorded.items() if total)
    counts = ", ".join(f"{name} {some} of {total:,}" for name, some, total in by_outcome)
    how = "All are here"
    if shown < recorded:
        how = f"The page carries at most {CAP}, drawn evenly over outcomes and steps"
    return (
        f"<p>{shown} of {recorded:,} recorded rollouts ({counts}). {how}, probes that recovered a dead end "
        "first. Probes and their parents are recorded before other rollouts, so these "
        "counts are no rates.</p>"
    )


def _select(label: str, name: str, options: Sequence[tuple[str, str]]) -> str:
    inside = "".join(f'<option value="{value}">{escape(text)}</option>' for value, text in options)
    return f'<label>{label} <select name="{name}">{inside}</select></label>'


def _label(run: Run) -> str:
    return f"{run.label} (control)" if run.control else run.label


def _setup(runs: Sequence[Run]) -> str:
    blocks = []
    for run in runs:
        values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in run.environment.items()}
        rows = "".join(
            f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in values.items()
        )
        body = (
            f'<h3>Configuration (config.toml)</h3><pre tabindex="0">{escape(run.config_text)}</pre>'
            f'<h3>Environment</h3><table class="pairs">{rows}</table>'
        )
        blocks.append(_fold(f"{escape(_label(run))} · {escape(run.folder.resolve().name)}", body))
    tokens = compact(sum(run.spent("generated_tokens") or 0.0 for run in runs))
    folders = "1 run folder" if len(runs) == 1 else f"{len(runs)} run folders"
    return f'{"".join(blocks)}<p class="quiet">{folders}, {tokens} generated tokens in all.</p>'

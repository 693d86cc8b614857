"""Figures of a report as plain plotly dictionaries.

A colour is the name of a CSS variable ("--arm0"); the page's script replaces it by its value, in light and in
dark mode. Texts pass through `plain`, because plotly interprets some markup in labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rexrag.config.schema import SPENT, Budget
from rexrag.report.read import Estimate, Run
from rexrag.report.series import (
    Arm,
    Points,
    aligned,
    mean_series,
    series,
)
from rexrag.stats import interval

Trace = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One metric of a detail chart: its key in `metrics.jsonl`, its name, colour and dash."""

    key: str
    name: str
    color: str
    dash: str = "solid"


@dataclass(frozen=True, slots=True)
class Axis:
    """What stands below a chart: a count of `metrics.jsonl` and `eval.jsonl`, and its name."""

    key: str
    title: str
    tickformat: str = ""

    @property
    def layout(self) -> dict[str, Any]:
        return {"title": {"text": self.title}, "tickformat": self.tickformat}


STEP = Axis("step", "step")
BUDGETS: dict[Budget, Axis] = {
    "generated": Axis(SPENT["generated"], "generated tokens", "~s"),
    "tokens": Axis(SPENT["tokens"], "tokens generated and read", "~s"),
    "rollouts": Axis(SPENT["rollouts"], "rollouts, with probes", "~s"),
    "time": Axis(SPENT["time"], "seconds of training"),
}
"""What a comparison spends alike (`rexrag compare --budget`)."""


@dataclass(frozen=True, slots=True)
class Chart:
    """What the page's script draws. `views` holds traces by arm, or under "" where arms share one plot."""

    title: str
    caption: str
    views: Mapping[str, Sequence[Trace]]
    layout: Mapping[str, Any]
    wide: bool = False


Maker = Callable[[Sequence[Arm], int, Axis], Chart]


def make_charts(arms: Sequence[Arm], budget: Budget | None = None) -> tuple[list[Chart], list[str], int]:
    """Charts with something in them, titles of the empty ones, and the moving average's width in steps.

    budget: what all are drawn against; without it exact match against generated tokens, others by step.
    """
    longest = max((len(run.metrics) for arm in arms for run in arm.runs), default=0)
    width = max(1, round(longest / 20))
    first, rest = (BUDGETS[budget], BUDGETS[budget]) if budget else (BUDGETS["generated"], STEP)
    charts = [em_chart(arms, width, first), *(make(arms, width, rest) for make in CHARTS)]
    full = [chart for chart in charts if any(chart.views.values())]
    return full, [chart.title for chart in charts if chart not in full], width


def plain(text: str) -> str:
    """Text as plotly shows it literally."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(points: Points, color: str, name: str = "", **more: Any) -> Trace:
    """A line; without a name it is background: thin, faint, in no legend and no hover."""
    style: Trace = {"width": 2.2} if name else {"width": 1}
    trace: Trace = {
        "type": "scatter",
        "mode": "lines",
        "x": [at for at, _ in points],
        "y": [value for _, value in points],
        "line": {**style, "color": color, **more.pop("line", {})},
    }
    named = {"name": plain(name)}
    background = {"showlegend": False, "hoverinfo": "skip", "opacity": 0.4}
    return {**trace, **(named if name else background), **more}


def _filled(lines: Iterable[Trace]) -> list[Trace]:
    return [line for line in lines if line["x"]]


# ---- charts


def em_chart(arms: Sequence[Arm], width: int, x: Axis) -> Chart:
    """Held-out exact match with its intervals, and training exact match."""
    traces: list[Trace] = []
    for arm in arms:
        for held_out in _sets(arm):
            traces += _evaluation_traces(arm, held_out, x)
        train = _percent(mean_series(arm.runs, "em/train", width, x.key))
        thin = {"width": 1.2, "dash": "dot"}
        traces.append(_line(train, arm.color, f"{arm.name}: training", line=thin, opacity=0.75))
    caption = (
        f"Look for a curve that rises earlier at the same {x.title}; bars are 95 % intervals. "
        "The dotted line is EM in training: sampled at the training temperature, on other questions."
    )
    axes = {"xaxis": x.layout, "yaxis": _axis("exact match, %", zero=True)}
    return Chart(f"Exact match against {x.title}", caption, {"": _filled(traces)}, axes, wide=True)


def _sets(arm: Arm) -> list[str]:
    """Names of the evaluation sets, the held-out one first."""
    names = {row.set for run in arm.runs for row in run.evaluations}
    return sorted(names, key=lambda name: (name != "held-out", name))


def _evaluation_traces(arm: Arm, name: str, x: Axis) -> list[Trace]:
    seeds = [[row for row in run.evaluations if row.set == name and x.key in row.spent] for run in arm.runs]
    seeds = [rows for rows in seeds if rows]
    if not seeds:
        return []
    main = name == "held-out"
    curves = [[(row.spent[x.key], 100 * row.em.value) for row in rows] for rows in seeds]
    columns = aligned(seeds, curves)
    if len(seeds) == 1:
        estimates = [row.em for row in seeds[0]]
    else:
        estimates = [Estimate.of(interval([value / 100 for _, value in column])) for column in columns]
    means = [
        (fmean(at for at, _ in column), 100 * estimate.value)
        for column, estimate in zip(columns, estimates, strict=True)
    ]
    bars = [_bar(estimate) for estimate in estimates]
    trace = _line(
        means,
        arm.color,
        f"{arm.name}: {name}",
        mode="lines+markers",
        line={} if main else {"dash": "dash", "width": 1.6},
        marker={"symbol": arm.symbol, "size": 8 if main else 6, "color": arm.color},
        hovertemplate="%{y:.1f} %",
    )
    if not main:
        return [{**trace, "visible": "legendonly"}]
    trace["error_y"] = {
        "array": [up for _, up in bars],
        "arrayminus": [down for down, _ in bars],
        "symmetric": False,
        "thickness": 1.2,
        "width": 3,
        "color": arm.color,
    }
    return [_line(curve, arm.color) for curve in curves if len(curves) > 1] + [trace]


def _bar(em: Estimate) -> tuple[float, float]:
    """An interval as its lengths below and above the value, in points."""
    low, high = (em.value if end is None else end for end in (em.low, em.high))
    return 100 * (em.value - low), 100 * (high - em.value)


def _percent(points: Points) -> Points:
    return [(at, 100 * value) for at, value in points]


def _by_arm(arms: Sequence[Arm], width: int, x: Axis, key: str, **more: Any) -> list[Trace]:
    """Every run thin, each arm's mean thick."""
    traces = []
    for arm in arms:
        dash = {"dash": "dash"} if arm.is_control else {}
        traces += [_line(series(run, key, x.key), arm.color, **more) for run in arm.runs]
        mean = mean_series(arm.runs, key, width, x.key)
        traces.append(_line(mean, arm.color, arm.name, line=dash, **more))
    return _filled(traces)


def _by_metric(
    runs: Sequence[Run], width: int, x: Axis, lines: Sequence[Line], stacked: bool = False, **more: Any
) -> list[Trace]:
    """The metrics of one arm, mean over its seeds."""
    traces = []
    for line in lines:
        mean = mean_series(runs, line.key, width, x.key)
        trace = _line(mean, line.color, line.name, line={"dash": line.dash}, **more)
        if stacked:
            trace = {**trace, "stackgroup": "all", "line": {**trace["line"], "width": 0.8}}
        traces.append(trace)
    return _filled(traces)


def _axis(title: str, zero: bool = False, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **({"rangemode": "tozero"} if zero else {}), **more}


def _panels(x: Axis, top: Mapping[str, Any], bottom: Mapping[str, Any]) -> dict[str, Any]:
    """Two plots over one axis."""
    return {
        "xaxis": {**x.layout, "anchor": "y2"},
        "yaxis": {**top, "domain": [0.56, 1.0]},
        "yaxis2": {**bottom, "domain": [0.0, 0.44], "anchor": "x"},
    }


def _per_arm(title: str, caption: str, key: str, axis: str, tickformat: str = "") -> Maker:
    """A chart of one metric in which every arm has a line."""
    y = _axis(axis, zero=True, tickformat=tickformat)
    return lambda arms, width, x: Chart(
        title, caption, {"": _by_arm(arms, width, x, key)}, {"xaxis": x.layout, "yaxis": y}
    )


def _per_metric(
    title: str, caption: str, lines: Sequence[Line], axis: str, tickformat: str = "", stacked: bool = False
) -> Maker:
    """A chart of several metrics of the arm that the reader chose."""
    y = _axis(axis, zero=True, tickformat=tickformat)

    def make(arms: Sequence[Arm], width: int, x: Axis) -> Chart:
        views = {arm.name: _by_metric(arm.runs, width, x, lines, stacked) for arm in arms}
        return Chart(title, caption, views, {"xaxis": x.layout, "yaxis": y})

    return make


def weight_chart(arms: Sequence[Arm], width: int, x: Axis) -> Chart:
    """Effective sample size over the mixture share alpha."""
    top = _by_arm(arms, width, x, "ess")
    bottom = _by_arm(arms, width, x, "alpha", yaxis="y2", showlegend=False)
    layout = _panels(
        x,
        _axis("ESS share", zero=True, tickformat=".0%"),
        _axis("alpha", zero=True, tickformat=".0%"),
    )
    caption = (
        "Look for an effective sample size near 100 %: a fall says that a few rollouts with large weights "
        "make the update. Alpha is the share of kept probes in the batch."
    )
    return Chart("Effective sample size and mixture share", caption, {"": top + bottom}, layout)


LOG_TICKS: dict[str, Any] = {"type": "log", "tickvals": [1e-3, 0.01, 0.1, 0.5, 1, 2, 10, 100]}
SEGMENTS = (
    Line("base", "base rollouts", "--control", "solid"),
    Line("prefix", "prefix", "--policy", "dash"),
    Line("cue", "cue", "--cue", "dot"),
    Line("suffix", "suffix", "--suffix", "dashdot"),
)


def ratio_chart(arms: Sequence[Arm], width: int, x: Axis) -> Chart:
    """Importance ratio over clip share, each by segment of the training row."""

    def lines(kind: str) -> list[Line]:
        return [Line(f"{kind}/{line.key}", line.name, line.color, line.dash) for line in SEGMENTS]

    views = {
        arm.name: _by_metric(arm.runs, width, x, lines("ratio"))
        + _by_metric(arm.runs, width, x, lines("clip"), yaxis="y2", showlegend=False)
        for arm in arms
    }
    layout = _panels(x, _axis("ratio", **LOG_TICKS), _axis("clipped", zero=True, tickformat=".0%"))
    caption = (
        "Look for ratios near 1 and few clipped tokens; a cue ratio far below 1 says that the correction "
        "all but removes the cue from the update."
    )
    return Chart("Importance ratio and clip share by segment", caption, views, layout)


CHARTS: tuple[Maker, ...] = (
    _per_arm(
        "Dead ends",
        "Look for a steady fall: the share of base rollouts that answered, and answered wrongly.",
        "dead_ends/rate",
        "of base rollouts",
        ".0%",
    ),
    _per_arm(
        "Searches per rollout",
        "Look for a level that fits the questions' hops; a drop towards zero says that the agent stopped "
        "searching.",
        "searches/mean",
        "searches",
    ),
    _per_metric(
        "Groups without a right rollout",
        "Look for the gap between the two 'all wrong' lines: in those groups only a probe was right. A group "
        "without a signal, all right or all wrong, changes no weight.",
        (
            Line("groups/all_wrong_before", "all wrong before probes", "--control"),
            Line("groups/all_wrong_after", "all wrong after probes", "--suffix", "dash"),
            Line("groups/no_signal", "no signal", "--notice", "dot"),
        ),
        "of groups",
        ".0%",
    ),
    _per_metric(
        "Probes",
        "Look for right probes among those drawn, and for a filter that keeps more of the right ones than of "
        "the wrong ones.",
        (
            Line("probes/drawn", "drawn", "--control"),
            Line("probes/right", "right", "--evidence", "dash"),
            Line("probes/kept", "kept", "--cue"),
            Line("probes/kept_right", "kept and right", "--suffix", "dot"),
        ),
        "probes a step",
    ),
    _per_metric(
        "Tokens by origin",
        "Look at the share that is generated, policy; cue, evidence and notice are inserted.",
        (
            Line("tokens/policy", "policy", "--policy"),
            Line("tokens/evidence", "evidence", "--evidence"),
            Line("tokens/cue", "cue", "--cue"),
            Line("tokens/notice", "notice", "--notice"),
        ),
        "tokens a step",
        "~s",
        stacked=True,
    ),
    _per_metric(
        "Time by phase",
        "Look for the phase worth speeding up, and for a step time that drifts.",
        (
            Line("time/rollout", "rollout", "--policy"),
            Line("time/probe", "probe", "--cue"),
            Line("time/score", "score", "--evidence"),
            Line("time/correct", "correct", "--notice"),
            Line("time/update", "update", "--control"),
        ),
        "seconds a step",
        stacked=True,
    ),
    weight_chart,
    ratio_chart,
    _per_metric(
        "Gradient by segment",
        "Look for the segment with the largest share of the gradient norms, at the diagnosed steps "
        "(train.diagnose_every).",
        tuple(Line(f"gradient/{line.key}", line.name, line.color, line.dash) for line in SEGMENTS),
        "of the norms",
        ".0%",
    ),
    _per_arm(
        "KL to the initial checkpoint",
        "Look for a slow rise of the policy's KL divergence, measured at the diagnosed steps.",
        "kl_to_start",
        "nats a token",
    ),
)

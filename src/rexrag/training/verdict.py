"""What a run did, in one sentence: it learned, or the first reason that explains why it did not.

Pure functions of what a run folder holds: the held-out rows of `eval.jsonl` and the rows of `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rexrag.stats import interval

Row = Mapping[str, Any]
Kind = Literal[
    "learned", "no-signal", "not-finite", "format-collapsed", "worse", "too-few-questions", "no-change",
    "unfinished",
]  # fmt: skip

NO_SIGNAL_SHARE = 0.5
"""A run whose weights did change lacks a signal where this share of its steps had none."""
DROPPED_SHARE = 0.1
"""Of a run's updates: from here on, dropped ones are named as the reason."""
COLLAPSED, COLLAPSED_RISE = 0.5, 0.2
"""The format collapsed where this share of held-out questions has no answer, and it rose by this much."""
SMALLEST_CHANGE = 0.05
"""Change of EM that an evaluation should be able to show."""
FEWEST_QUESTIONS = 30
NONFINITE_LIMIT = 5
"""Updates in a row that may be dropped as not finite before a run stops."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """kind: for programs. sentence: what happened. cause, change: likely cause and remedy; "" if learned."""

    kind: Kind
    sentence: str
    cause: str = ""
    change: str = ""

    @property
    def line(self) -> str:
        """Everything in one line."""
        parts = [
            self.sentence,
            self.cause and f"Likely cause: {self.cause}.",
            self.change and f"{self.change}.",
        ]
        return " ".join(part for part in parts if part)

    def as_json(self) -> dict[str, str]:
        return asdict(self)


def judge(evaluations: Sequence[Row], steps: Sequence[Row], finished: bool = True) -> Verdict:
    """The verdict on a run.

    evaluations: held-out rows of `eval.jsonl`, in order. steps: rows of `metrics.jsonl`. finished: False for
    a run that is still going or was stopped: it is never called learned.
    """
    rise = rise_of(evaluations)
    enough = rise is not None and rise["n"] >= FEWEST_QUESTIONS
    if finished and enough and rise is not None and rise["low"] > 0 and weights_changed(steps):
        low, high = (f"{100 * rise[end]:+.1f}" for end in ("low", "high"))
        return Verdict(
            "learned",
            f"Learned: held-out EM rose by {100 * rise['value']:.1f} points, 95 % interval [{low}, {high}].",
        )
    found = _no_signal(steps) or _not_finite(steps)
    if found is None and not finished:
        return Verdict("unfinished", f"Not finished: {_steps(len(steps))} so far.")
    found = found or _format_collapsed(evaluations)
    if found is None and rise is None and evaluations:
        return Verdict(
            "too-few-questions",
            "There is one held-out evaluation, or its questions are not recorded: a change cannot be told.",
            "the run was evaluated once",
            "Evaluate before and after (train.evals)",
        )
    return found or _of_rise(rise)


def rise_of(evaluations: Sequence[Row]) -> dict[str, float] | None:
    """{value, low, high, n}: held-out EM after − before, paired by question; None without two evaluations."""
    if len(evaluations) < 2 or not all("em_by_question" in evaluations[place] for place in (0, -1)):
        return None
    before, after = (evaluations[place]["em_by_question"] for place in (0, -1))
    return interval([b - a for a, b in zip(before, after, strict=True)])


def weights_changed(steps: Sequence[Row]) -> bool:
    """Did any update change a weight? Where updates are not counted, a group with a signal counts as one."""
    return any(not _without_signal(row) and (row.get("updates", 1) or 0) > 0 for row in steps)


def _without_signal(row: Row) -> bool:
    """No rollout of the step had an advantage, so that nothing but a KL term could move the weights."""
    return row.get("groups/no_signal") == 1.0 or (
        "updates" in row and not row["updates"] and not row.get("nonfinite_updates")
    )


def _no_signal(steps: Sequence[Row]) -> Verdict | None:
    # A policy that bad updates destroyed has no signal either: that is another kind.
    bad = [row for row in steps if _without_signal(row) and not row.get("nonfinite_updates")]
    unchanged = not weights_changed(steps)
    if not bad or len(bad) < (len(steps) if unchanged else NO_SIGNAL_SHARE * len(steps)):
        return None
    consequence = "so no weight changed" if unchanged else "so the other steps alone changed weights"
    if unchanged and any(row.get("updates") for row in bad):
        consequence = "so nothing but the KL term acted on the weights"
    cause, change = _why_no_signal(bad)
    sentence = f"No group had a signal in {len(bad)} of {_steps(len(steps))}, {consequence}."
    return Verdict("no-signal", sentence, cause, change)


def _why_no_signal(steps: Sequence[Row]) -> tuple[str, str]:
    silent = _mean(steps, "dead_ends/unanswered")
    # Right by the judge of answers, which need not be exact match.
    judged = any("dead_ends/rate" in row for row in steps)
    right = 1.0 - _mean(steps, "dead_ends/rate") - silent if judged else _mean(steps, "em/train")
    if silent > COLLAPSED:
        cause = f"{100 * silent:.0f} % of the rollouts gave no answer in the agent's format"
        return cause, "Teach the format first (rexrag warmup), or try another agent.template"
    if right > 0.5:
        cause = "the rollouts of a question were all right; the questions are too easy for this model"
        return cause, "Take harder questions (data.train)"
    cause = "the rollouts of a question were all wrong; the questions are too hard for this model"
    return cause, "Take easier questions (data.train), a stronger model (policy.path), or more rollouts"


def _not_finite(steps: Sequence[Row]) -> Verdict | None:
    dropped = sum(row.get("nonfinite_updates") or 0 for row in steps)
    made = sum(row.get("updates") or 0 for row in steps)
    if not dropped or dropped < DROPPED_SHARE * (dropped + made):
        return None
    sentence = f"{dropped:.0f} of {dropped + made:.0f} updates were dropped: their gradients were not finite."
    rates = [row["lr"] for row in steps if row.get("lr")]
    return Verdict("not-finite", sentence, *why_not_finite(max(rates, default=0.0)))


def why_not_finite(rate: float) -> tuple[str, str]:
    """(cause, change) of gradients that are not finite. rate: the learning rate."""
    if rate > 1e-2:
        return f"the learning rate {rate:g} is too high", "Lower learner.lr (the default is 0.0003)"
    return (
        "the weights grew too large, or the precision is too low",
        "Lower learner.lr, or raise learner.warmup_steps, or take float32",
    )


def _format_collapsed(evaluations: Sequence[Row]) -> Verdict | None:
    shares = [row["unanswered"] for row in evaluations if row.get("unanswered") is not None]
    if len(shares) < 2 or shares[-1] < COLLAPSED or shares[-1] - shares[0] < COLLAPSED_RISE:
        return None
    return Verdict(
        "format-collapsed",
        f"The format collapsed: {100 * shares[-1]:.0f} % of the held-out questions got no answer, "
        f"{100 * shares[0]:.0f} % before training.",
        "the updates were too large",
        "Lower learner.lr, or give the KL term a weight",
    )


def _of_rise(rise: Mapping[str, float] | None) -> Verdict:
    if rise is None or not rise["n"]:
        return Verdict(
            "too-few-questions",
            "There was no held-out question, so nobody can tell whether the policy learned.",
            "data.dev is empty, or train.evals is 0",
            "Give data.dev a file of questions",
        )
    n, half = int(rise["n"]), (rise["high"] - rise["low"]) / 2
    if rise["high"] < 0 and n >= FEWEST_QUESTIONS:
        return Verdict(
            "worse",
            f"Worse: held-out EM fell by {-100 * rise['value']:.1f} points.",
            "the updates were too large",
            "Lower learner.lr, or give the KL term a weight",
        )
    if n < FEWEST_QUESTIONS or half > SMALLEST_CHANGE:
        enough = max(300, 2 * n, round(n * (half / SMALLEST_CHANGE) ** 2, -2))
        return Verdict(
            "too-few-questions",
            f"Too few held-out questions to tell: {n}, so EM is known to ±{100 * half:.0f} points only."
            if half
            else f"Too few held-out questions to tell: {n}.",
            "the evaluation is small",
            f"Evaluate on about {enough:.0f} questions (data.dev, data.dev_limit)",
        )
    return Verdict(
        "no-change",
        f"No change seen: held-out EM changed by {100 * rise['value']:+.1f} points, "
        "not significantly different from 0.",
        "too few steps, or too low a learning rate",
        "Raise train.steps or learner.lr",
    )


class NonFiniteWatch:
    """Counts updates that were dropped in a row, over the steps of a run."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def too_many(self, row: Row) -> str | None:
        """One line with the likely cause once `NONFINITE_LIMIT` were dropped in a row; row: the step's."""
        dropped = int(row.get("nonfinite_updates") or 0)
        self.in_a_row = 0 if row.get("updates") else self.in_a_row + dropped
        if self.in_a_row < NONFINITE_LIMIT:
            return None
        cause, change = why_not_finite(row.get("lr") or 0.0)
        return (
            f"step {row['step']}: {self.in_a_row} updates in a row were dropped as not finite. "
            f"Likely cause: {cause}. {change}, and start anew"
        )


def dropped_line(row: Row) -> str | None:
    """One line where a step dropped updates as not finite."""
    dropped = int(row.get("nonfinite_updates") or 0)
    if not dropped:
        return None
    all_of_them = dropped + int(row.get("updates") or 0)
    return f"step {row['step']}: {dropped} of {all_of_them} updates were dropped as not finite"


def _mean(rows: Sequence[Row], key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    return sum(values) / len(values) if values else 0.0


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"

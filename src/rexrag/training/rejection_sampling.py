"""Rejection sampling: the policy's own right rollouts as demonstrations (STaR, arXiv 2203.14465).

questions → rollouts → those with a right answer → without notices and the turns that earned them →
without duplicates → at most k of a question
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from rexrag.agent.episode import Episode
from rexrag.config.schema import AgentConfig
from rexrag.data.demonstrations import Demonstration
from rexrag.engine.base import Policy
from rexrag.retrieval.base import Retriever
from rexrag.types import Origin, Question, Rollout

BATCH = 64
"""Rollouts that are drawn side by side."""
QUIET_SECONDS = 10.0
"""Where the output is no terminal, a line of progress this often."""


@dataclass(frozen=True, slots=True)
class RejectionSampling:
    """How much is drawn and kept."""

    rounds: int = 1
    """Each round draws new rollouts from the policy that the last round trained."""
    questions: int = 200
    """Questions a round, drawn anew for each; 0 takes all."""
    rollouts: int = 4
    """Rollouts of a question."""
    per_question: int = 2
    """At most this many demonstrations of a question."""


@dataclass(slots=True)
class Drawn:
    """Demonstrations with their questions, and counts over the rollouts that they were chosen from."""

    rows: list[tuple[Question, Demonstration]] = field(default_factory=list)
    questions: int = 0
    rollouts: int = 0
    right: int = 0
    unanswered: int = 0
    first_turn_valid: int = 0
    """Rollouts whose first turn had a search or an answer in it."""

    def figures(self) -> dict[str, float | int]:
        """Counts, and shares of the rollouts."""
        share = 1.0 / max(1, self.rollouts)
        return {
            "questions": self.questions,
            "rollouts": self.rollouts,
            "right": round(self.right * share, 4),
            "unanswered": round(self.unanswered * share, 4),
            "first_turn_valid": round(self.first_turn_valid * share, 4),
            "demonstrations": len(self.rows),
        }


def draw_demonstrations(
    policy: Policy,
    questions: Sequence[Question],
    retriever: Retriever,
    agent: AgentConfig,
    topk: int,
    amount: RejectionSampling,
    seed: int,
) -> Drawn:
    """Roll out every question `amount.rollouts` times at `agent.temperature` and choose what to imitate.

    Raises DataError where a question does not fit `agent.total_tokens`, RetrievalError where a search fails.
    """
    drawn = Drawn()
    size = max(1, BATCH // amount.rollouts)
    with _progress(len(questions)) as tell:
        for start in range(0, len(questions), size):
            asked = questions[start : start + size]
            episodes = [
                Episode(question, policy.codec, agent, topk)
                for question in asked
                for _ in range(amount.rollouts)
            ]
            session = policy.session()
            try:
                session.run(episodes, retriever, agent.temperature, seed + start)
            finally:
                session.close()
            _count(drawn, [episode.rollout() for episode in episodes], amount)
            tell(drawn)
    return drawn


def _count(drawn: Drawn, rollouts: Sequence[Rollout], amount: RejectionSampling) -> None:
    """Add the rollouts of some questions, `amount.rollouts` of each in a row."""
    for first in range(0, len(rollouts), amount.rollouts):
        group = rollouts[first : first + amount.rollouts]
        chosen = choose(group, amount.per_question)
        drawn.rows += [(group[0].question, demonstration) for demonstration in chosen]
        drawn.questions += 1
    drawn.rollouts += len(rollouts)
    drawn.right += sum(rollout.correct for rollout in rollouts)
    drawn.unanswered += sum(rollout.answer is None for rollout in rollouts)
    drawn.first_turn_valid += sum(rollout.turns[0].action is not None for rollout in rollouts)


def choose(rollouts: Iterable[Rollout], most: int) -> list[Demonstration]:
    """The right rollouts of one question as demonstrations: no two alike, `most` of them, the first drawn."""
    right = (without_notices(rollout) for rollout in rollouts if rollout.correct)
    different = {demonstration.tokens: demonstration for demonstration in right}
    return list(different.values())[:most]


def without_notices(rollout: Rollout) -> Demonstration:
    """A rollout as a demonstration, without its invalid turns and the notices that they earned.

    What remains is a rollout that the same policy could have drawn: each token as it was sampled, evidence as
    it was inserted. Weight 1 on what the policy wrote, 0 on evidence.
    """
    ends = [*(turn.start for turn in rollout.turns[1:]), len(rollout.tokens)]
    kept = [
        index
        for turn, end in zip(rollout.turns, ends, strict=True)
        if turn.action is not None
        for index in range(turn.start, end)
    ]
    origins = tuple(rollout.origins[index] for index in kept)
    weights = tuple(float(origin == Origin.POLICY) for origin in origins)
    return Demonstration(rollout.prompt, tuple(rollout.tokens[index] for index in kept), origins, weights)


class _Tell:
    """A live line on a terminal, a line on stderr now and then elsewhere."""

    def __init__(self, live: Progress, total: int) -> None:
        self.live, self.total = live, total
        self.task = live.add_task("rollouts", total=total, note="")
        self.start = self.said = time.monotonic()

    def __call__(self, drawn: Drawn) -> None:
        done = drawn.questions
        note = f"{drawn.right}/{drawn.rollouts} right, {drawn.unanswered} unanswered"
        self.live.update(self.task, completed=done, note=note)
        now = time.monotonic()
        if not self.live.console.is_terminal and now - self.said > QUIET_SECONDS:
            self.said, eta = now, (now - self.start) / done * (self.total - done)
            line = f"rollouts: {done}/{self.total} questions, {note}, eta {eta:.0f} s"
            print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress(total: int) -> Iterator[_Tell]:
    # Narrow enough that the time left is not cut at 80 columns.
    bar, note = BarColumn(bar_width=16), TextColumn("{task.fields[note]}")
    columns = (TextColumn("rollouts"), bar, note, TextColumn("eta"), TimeRemainingColumn())
    with Progress(*columns, transient=True) as live:
        yield _Tell(live, total)

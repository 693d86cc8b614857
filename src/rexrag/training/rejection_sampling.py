"""Rejection sampling: the policy's own right rollouts as demonstrations (STaR, arXiv 2203.14465).

questions → rollouts → those with a right answer → without notices and the turns that earned them →
without duplicates → at most k of a question
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rexrag.agent.episode import Episode
from rexrag.config.schema import AgentConfig
from rexrag.data.demonstrations import Demonstration
from rexrag.engine.base import Policy
from rexrag.retrieval.base import Retriever
from rexrag.types import Origin, Question, Rollout, StopReason

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
    with _progress(len(questions) * amount.rollouts, drawn) as finished:
        for start in range(0, len(questions), size):
            asked = questions[start : start + size]
            episodes = [
                _CountedEpisode(question, policy.codec, agent, topk)
                for question in asked
                for _ in range(amount.rollouts)
            ]
            for episode in episodes:
                episode.finished = finished
            session = policy.session()
            try:
                session.run(episodes, retriever, agent.temperature, seed + start)
            finally:
                session.close()
            _count(drawn, [episode.rollout() for episode in episodes], amount)
    return drawn


class _CountedEpisode(Episode):
    """An episode that says when it is over."""

    finished: Callable[[], None]

    def _finish(self, reason: StopReason) -> None:
        super()._finish(reason)
        self.finished()


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


@contextmanager
def _progress(total: int, drawn: Drawn) -> Iterator[Callable[[], None]]:
    """A live line on a terminal, a line on stderr now and then elsewhere; call it for each rollout.

    What is right so far is known once a batch is over.
    """
    # Narrow enough that the time left is not cut at 80 columns.
    bar, note = BarColumn(bar_width=16), TextColumn("{task.fields[note]}")
    columns = (
        TextColumn("rollouts"),
        bar,
        MofNCompleteColumn(),
        note,
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    done, start = 0, time.monotonic()
    said = start
    with Progress(*columns, transient=True) as live:
        task = live.add_task("rollouts", total=total, note="")

        def finished() -> None:
            nonlocal done, said
            done += 1
            note = f"{drawn.right}/{drawn.rollouts} right" if drawn.rollouts else ""
            live.update(task, completed=done, note=note)
            now = time.monotonic()
            if not live.console.is_terminal and now - said > QUIET_SECONDS:
                said, eta = now, (now - start) / done * (total - done)
                line = f"rollouts: {done}/{total}  {note}".rstrip()
                print(f"{line}  eta {eta:.0f} s", file=sys.stderr, flush=True)

        yield finished

"""Many questions answered side by side: each by its own strategy generator, run in shared rounds.

A round is one `Session.run` over the episodes that generators have yielded; queries are searched for in one
request before it. An attempt is reported the moment its last episode ends, while others go on. What a
question samples depends on the seed and the question alone, not on which questions are asked with it.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from rexrag.agent.episode import State
from rexrag.engine.base import Session
from rexrag.errors import DataError, RetrievalError
from rexrag.evaluation.attempt import Attempt, RecordedEpisode
from rexrag.evaluation.context import StrategyContext
from rexrag.evaluation.strategies import FORKS, STRATEGIES, Steps, majority
from rexrag.types import Document, Question


def answer_all(
    context: StrategyContext,
    strategy: str,
    votes: int,
    questions: Sequence[Question],
    report: Callable[[Attempt], None],
) -> None:
    """Answer every question once (or by a majority of `votes`); `report` gets each attempt as it ends.

    A question that cannot be asked (a prompt beyond the window) fails alone. Where a search fails, so do the
    questions that were waiting; a refused search fails its own question, found by asking in halves.
    """
    reported: set[str] = set()

    def finished(attempt: Attempt) -> None:
        reported.add(attempt.question.group)
        report(attempt)

    try:
        _Rounds(context, strategy, votes, finished).run(questions)
    except (DataError, RetrievalError) as error:
        left = [question for question in questions if question.group not in reported]
        nobody_answers = isinstance(error, RetrievalError) and not error.refused
        if nobody_answers or len(left) == 1:
            for question in left:
                report(Attempt(question, failure=str(error)))
            return
        half = len(left) // 2
        for part in (left[:half], left[half:]):
            answer_all(context, strategy, votes, part, report)


@dataclass(slots=True)
class _Try:
    """One run of the strategy for a question; `place` keeps rounds in the order of the questions."""

    place: int
    question: Question
    vote: int
    steps: Steps
    step: RecordedEpisode | str = ""
    """What it waits for."""
    episodes: int = 0
    """How many it has had run."""


class _Rounds:
    def __init__(
        self, context: StrategyContext, strategy: str, votes: int, report: Callable[[Attempt], None]
    ) -> None:
        self.context, self.strategy, self.votes, self.report = context, strategy, votes, report
        self.start = time.perf_counter()
        self.searching: list[_Try] = []
        self.running: list[_Try] = []
        self.attempts: dict[str, list[tuple[int, Attempt]]] = defaultdict(list)

    def run(self, questions: Sequence[Question]) -> None:
        places = ((question, vote) for question in questions for vote in range(self.votes))
        tries = [
            _Try(place, question, vote, STRATEGIES[self.strategy](self.context, question))
            for place, (question, vote) in enumerate(places)
        ]
        for one in tries:
            self._advance(one, None)
        shared = self.context.policy.session() if self.strategy in FORKS else None
        try:
            while self.searching or self.running:
                self._search()
                self._run_episodes(shared)
        finally:
            if shared is not None:
                shared.close()

    def _advance(self, one: _Try, documents: Sequence[Document] | None) -> None:
        """Let a generator go on up to its next step that has to wait. None starts it."""
        try:
            step = next(one.steps) if documents is None else one.steps.send(documents)
            while isinstance(step, RecordedEpisode) and step.state is State.DONE:
                step = one.steps.send(())
        except StopIteration as stopped:
            self._finish(one, stopped.value)
        except DataError as error:
            self._finish(one, Attempt(one.question, failure=str(error)))
        else:
            one.step = step
            (self.searching if isinstance(step, str) else self.running).append(one)

    def _finish(self, one: _Try, attempt: Attempt) -> None:
        attempt.seconds = time.perf_counter() - self.start
        attempts = self.attempts[one.question.group]
        attempts.append((one.vote, attempt))
        if len(attempts) == self.votes:
            ordered = [attempt for _, attempt in sorted(attempts, key=lambda pair: pair[0])]
            self.report(ordered[0] if self.votes == 1 else majority(ordered))

    def _search(self) -> None:
        while self.searching:
            batch, self.searching = sorted(self.searching, key=lambda one: one.place), []
            found = self.context.search([str(one.step) for one in batch])
            for one, documents in zip(batch, found, strict=True):
                self._advance(one, documents)

    def _run_episodes(self, shared: Session | None) -> None:
        batch, self.running = sorted(self.running, key=lambda one: one.place), []
        if not batch:
            return
        episodes, seeds = [], []
        for one in batch:
            assert isinstance(one.step, RecordedEpisode)
            one.step.on_end = partial(self._advance, one, ())
            episodes.append(one.step)
            seeds.append(_seed(self.context.seed, one))
            one.episodes += 1
        session = shared or self.context.policy.session()
        try:
            session.run(episodes, self.context.retriever, self.context.temperature, seeds)
        finally:
            if shared is None:
                session.close()


def _seed(seed: int, one: _Try) -> int:
    """A function of the question, its vote and the episode's number: the same in every batch."""
    name = f"{seed}/{one.question.group}/{one.vote}/{one.episodes}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")

"""One attempt at a question: the episodes it is made of, its answer, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rexrag.agent.episode import Episode, State
from rexrag.training.validation import invalid_turns
from rexrag.types import Document, Origin, Question, StopReason, Turn, searches_run


class RecordedEpisode(Episode):
    """An episode that keeps its documents, calls back when it ends, and can pause at a search.

    With `pauses`, its session returns at a search; `resume` hands over the documents for a further run.
    """

    pauses = False
    on_end: Callable[[], None] | None = None
    """Called once, when the episode has ended or paused."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.documents: tuple[Document, ...] = ()
        super().__init__(*arguments, **named)

    @property
    def paused(self) -> bool:
        return self.state is State.DONE and self.stop is None and not self.failure

    def found(self, documents: Sequence[Document]) -> None:
        self.documents = (*self.documents, *documents[: self.topk])
        super().found(documents)

    def resume(self, documents: Sequence[Document]) -> None:
        self.state = State.SEARCH
        super().found(documents)

    def give_up(self, reason: str) -> None:
        super().give_up(reason)
        self._call_back()

    def _end_turn(self, turn: Turn) -> None:
        super()._end_turn(turn)
        if self.pauses and self.state is State.SEARCH:
            self.state = State.DONE
            self._call_back()

    def _finish(self, reason: StopReason) -> None:
        super()._finish(reason)
        self._call_back()

    def _call_back(self) -> None:
        call, self.on_end = self.on_end, None
        if call is not None:
            call()


@dataclass(slots=True)
class Attempt:
    """An attempt, finished or failed. Counts are sums over its episodes."""

    question: Question
    answer: str | None = None
    stop: str = ""
    searches: int = 0
    tokens: int = 0
    """Written by the policy."""
    read: int = 0
    """Prompts and insertions that the policy had to read."""
    invalid: int = 0
    """Turns without a valid action."""
    documents: tuple[Document, ...] = ()
    seconds: float = 0.0
    """From the start of its batch to its end."""
    failure: str = ""
    trace: list[str] = field(default_factory=list)
    """The response of each episode, with evidence and notices in it."""
    votes: dict[str, int] | None = None
    encoded_anew: int = 0
    """Turns that an endpoint gave as text, so that their tokens may be split differently."""

    def add(self, episode: RecordedEpisode, since: int | None = None) -> None:
        """Count an episode in; of a probe only what came after its cut, `since`: the rest is its parent's."""
        turns, start = episode.turns, since or 0
        first = sum(turn.end <= start for turn in turns)
        written = episode.origins[start:].count(int(Origin.POLICY))
        self.tokens += written
        self.read += len(episode.origins) - start - written
        self.read += len(episode.prompt) if since is None else 0
        forced = len(turns) > episode.config.search_turns
        self.searches += searches_run(turns[first:], forced)
        self.invalid += invalid_turns(turns[first:])
        self.encoded_anew += episode.encoded_anew
        self.documents = with_new(self.documents, episode.documents)
        self.failure = self.failure or episode.failure
        self.stop = str(episode.stop or "")
        self.trace.append(episode.codec.decode(episode.tokens))


def with_new(known: tuple[Document, ...], more: Sequence[Document]) -> tuple[Document, ...]:
    """The documents of both, each once; the known ones first."""
    ids = {document.id for document in known}
    return (*known, *(document for document in more if document.id not in ids))

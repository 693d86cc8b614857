"""One try at a question, made of one or several episodes, and the place where they are run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rexrag.agent.episode import Episode, State
from rexrag.agent.prompts import render_baseline
from rexrag.agent.protocols.tags import render_evidence
from rexrag.config.schema import Config
from rexrag.engine.base import Policy, Session
from rexrag.errors import RetrievalError
from rexrag.retrieval.base import Retriever
from rexrag.training.validation import invalid_turns
from rexrag.types import Document, Origin, Question, StopReason, Turn, searches_run


class WatchedEpisode(Episode):
    """An episode that remembers its documents and when it ended, and can stop to have a search prepared.

    With `pauses`, a search ends the run of its session; `resume` hands over the documents.
    """

    pauses = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.documents: tuple[Document, ...] = ()
        self.ended = 0.0
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

    def _end_turn(self, turn: Turn) -> None:
        super()._end_turn(turn)
        if self.pauses and self.state is State.SEARCH:
            self.state = State.DONE

    def _finish(self, reason: StopReason) -> None:
        self.ended = time.perf_counter()
        super()._finish(reason)


@dataclass(slots=True)
class Attempt:
    """A try at a question, finished or failed. Counts are sums over its episodes."""

    question: Question
    answer: str | None = None
    stop: str = ""
    searches: int = 0
    tokens: int = 0
    """Written by the policy."""
    read: int = 0
    """Prompts and insertions that the policy had to read."""
    invalid: int = 0
    documents: tuple[Document, ...] = ()
    seconds: float = 0.0
    """From the start of its batch to its end."""
    failure: str = ""
    trace: list[str] = field(default_factory=list)
    """What was said, one text an episode: responses with evidence and notices in them."""
    votes: dict[str, int] | None = None
    encoded_anew: int = 0
    """Turns that an endpoint gave as text, so that their tokens may be split differently."""

    def add(self, episode: WatchedEpisode, bench: Bench, since: int | None = None) -> None:
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
        known = {document.id for document in self.documents}
        self.documents += tuple(d for d in episode.documents if d.id not in known)
        self.failure = self.failure or episode.failure
        self.stop = str(episode.stop or "")
        self.trace.append(bench.policy.codec.decode(episode.tokens))


@dataclass(frozen=True, slots=True)
class Bench:
    """What every strategy runs on: the same policy, retriever, agent settings and sampling."""

    policy: Policy
    retriever: Retriever
    config: Config
    temperature: float = 0.0
    seed: int = 0
    cues: tuple[str, ...] = ()
    cue_seed: int = 0
    """With a question's group, what a cue is drawn by: the same in every batch."""

    def episode(self, question: Question, pauses: bool = False) -> WatchedEpisode:
        """The training's own episode."""
        episode = WatchedEpisode(question, self.policy.codec, self.config.agent, self.config.retriever.topk)
        episode.pauses = pauses
        return episode

    def single(self, question: Question, message: str) -> WatchedEpisode:
        """One turn on a message of its own, in which no search is run."""
        agent = self.config.agent.model_copy(update={"search_turns": 0})
        return WatchedEpisode(question, self.policy.codec, agent, self.config.retriever.topk, message)

    def reading(
        self, template: str, question: Question, documents: Sequence[Document], **fields: str
    ) -> WatchedEpisode:
        """One turn on a baseline's template with passages: as many of them as leave room for a whole turn."""
        agent, codec = self.config.agent, self.policy.codec
        count = len(documents)
        while True:
            # The budget of one search for each `topk` passages, and the same defusing of tags.
            room = agent.evidence_tokens * max(1, -(-count // self.config.retriever.topk))
            passages = codec.decode(render_evidence(documents[:count], codec, room)).strip()
            message = render_baseline(template, question.text, passages=passages, **fields)
            spent = len(codec.prompt(message))
            if spent + agent.turn_tokens <= agent.total_tokens or not count:
                return self.single(question, message)
            count -= 1

    def run(
        self, episodes: Iterable[WatchedEpisode], round_: int = 0, session: Session | None = None
    ) -> None:
        """Drive episodes to their end (or pause). Each round of a strategy has random numbers of its own."""
        own = session or self.policy.session()
        try:
            own.run(list(episodes), self.retriever, self.temperature, self.seed + 1_000_003 * round_)
        finally:
            if session is None:
                own.close()

    def said(self, episode: WatchedEpisode) -> str:
        """The response without its end tokens, for a further prompt."""
        codec = self.policy.codec
        return codec.decode([token for token in episode.tokens if token not in codec.eos_ids])

    def search(self, queries: Sequence[str]) -> list[list[Document]]:
        return self.retriever.search(queries, self.config.retriever.topk) if queries else []


class NoRetriever:
    """Stands in where no strategy searches."""

    digest = "none"

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        raise RetrievalError("this evaluation has no retriever")

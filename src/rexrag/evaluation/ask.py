"""One question answered by an agent. `rexrag ask` and the Python API stand on `ask`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rexrag.agent.episode import Episode
from rexrag.config.schema import Config
from rexrag.engine.base import Policy
from rexrag.errors import EndpointError
from rexrag.io import printable
from rexrag.retrieval.base import Retriever
from rexrag.types import Origin, Question, searches_run


@dataclass(frozen=True, slots=True)
class Answer:
    """What an agent answered, and what it took."""

    answer: str | None
    """None where it never answered."""
    trace: str
    """Its whole response: thoughts, searches, evidence, answer."""
    searches: int
    """Searches that were run."""
    tokens: int
    """Tokens that the policy wrote."""
    confidence: float | None = None
    """P(the answer is right), calibrated; None where no judge was asked."""


def ask(
    policy: Policy,
    question: str,
    retriever: Retriever,
    config: Config,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Roll out one question. `on_text` gets the response piece by piece, while it is written.

    temperature 0 is greedy; seed matters above 0. Raises DataError where the question is too long,
    RetrievalError, EndpointError.
    """
    asked = Question("asked", question, ("",))
    episode = _StreamedEpisode(asked, policy.codec, config.agent, config.retriever.topk)
    episode.on_text = on_text
    session = policy.session()
    try:
        session.run([episode], retriever, temperature, seed)
    finally:
        session.close()
    if episode.failure:
        raise EndpointError(episode.failure)
    forced = len(episode.turns) > config.agent.search_turns
    return Answer(
        answer=episode.answer,
        trace=policy.codec.decode(episode.tokens),
        searches=searches_run(episode.turns, forced),
        tokens=episode.origins.count(int(Origin.POLICY)),
    )


class _StreamedEpisode(Episode):
    """An episode that hands on its text as it grows."""

    on_text: Callable[[str], None] | None = None
    _told = ""

    def sampled(self, token: int, logp: float) -> None:
        super().sampled(token, logp)
        self._tell()

    def take_forced(self, logps: Sequence[float]) -> None:
        super().take_forced(logps)
        self._tell()

    def _tell(self) -> None:
        if self.on_text is None:
            return
        text = self.codec.decode(self.tokens)
        # A character of several tokens shows as a replacement mark until it is whole.
        if text.startswith(self._told) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.on_text(printable(text[len(self._told) :]))
            self._told = text

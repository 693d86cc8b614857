"""What every strategy of an evaluation runs with: policy, retriever, settings, and ways to make episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rexrag.agent.prompts import render_baseline
from rexrag.agent.protocols.tags import render_evidence
from rexrag.config.schema import AgentConfig, Config
from rexrag.engine.base import Policy
from rexrag.errors import RetrievalError
from rexrag.evaluation.attempt import RecordedEpisode
from rexrag.retrieval.base import Retriever
from rexrag.types import Document, Question


@dataclass(frozen=True, slots=True)
class StrategyContext:
    """The same for all strategies and questions of a cell. `seed` decides samples and the choice of cues."""

    policy: Policy
    retriever: Retriever
    config: Config
    temperature: float = 0.0
    seed: int = 0
    cues: tuple[str, ...] = ()

    def episode(self, question: Question, pauses: bool = False) -> RecordedEpisode:
        """The training's own episode. `pauses`: see RecordedEpisode."""
        episode = self._episode(question, self.config.agent)
        episode.pauses = pauses
        return episode

    def one_turn(self, question: Question, message: str) -> RecordedEpisode:
        """A single turn on a message of its own, in which no search is run."""
        return self._episode(question, self.config.agent.model_copy(update={"search_turns": 0}), message)

    def with_passages(
        self, template: str, question: Question, documents: Sequence[Document], **fields: str
    ) -> RecordedEpisode:
        """One turn on a baseline's template with passages: as many as leave room for a whole turn."""
        agent, codec = self.config.agent, self.policy.codec
        for count in range(len(documents), -1, -1):
            # Evidence has the budget of one search for each `topk` passages; its tags are made harmless.
            room = agent.evidence_tokens * max(1, -(-count // self.config.retriever.topk))
            passages = codec.decode(render_evidence(documents[:count], codec, room)).strip()
            message = render_baseline(template, question.text, passages=passages, **fields)
            if len(codec.prompt(message)) + agent.turn_tokens <= agent.total_tokens:
                break
        return self.one_turn(question, message)

    def response(self, episode: RecordedEpisode) -> str:
        """The text of a response without its end tokens, for a further prompt."""
        codec = self.policy.codec
        return codec.decode([token for token in episode.tokens if token not in codec.eos_ids])

    def search(self, queries: Sequence[str]) -> list[list[Document]]:
        return self.retriever.search(queries, self.config.retriever.topk)

    def _episode(self, question: Question, agent: AgentConfig, message: str | None = None) -> RecordedEpisode:
        return RecordedEpisode(question, self.policy.codec, agent, self.config.retriever.topk, message)


class NoRetriever:
    """Stands in where no strategy searches."""

    digest = "none"

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        raise RetrievalError("this evaluation has no retriever")

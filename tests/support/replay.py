"""Play a demonstration's own tokens through a real episode."""

from __future__ import annotations

from rexrag.agent.episode import Episode, State
from rexrag.config.schema import AgentConfig
from rexrag.data.demonstrations import Demonstration
from rexrag.types import Origin, Question, Rollout


def replay(
    demonstration: Demonstration, question: Question, codec, agent: AgentConfig, retriever, topk: int
) -> Rollout:
    """The rollout that comes of it; it must be the demonstration, token by token.

    The episode inserts the evidence that `retriever` finds for its queries.
    """
    episode = Episode(question, codec, agent, topk)
    assert episode.prompt == demonstration.prompt
    own = (t for t, o in zip(demonstration.tokens, demonstration.origins, strict=True) if o == Origin.POLICY)
    while episode.state is not State.DONE:
        if episode.state is State.SEARCH:
            episode.found(retriever.search([episode.query], topk)[0])
        elif episode.state is State.FORCED:
            episode.take_forced([0.0] * len(episode.forced))
        else:
            episode.sampled(next(own), -1.0)
    assert next(own, None) is None
    rollout = episode.rollout()
    assert rollout.tokens == demonstration.tokens
    assert rollout.origins == demonstration.origins
    return rollout

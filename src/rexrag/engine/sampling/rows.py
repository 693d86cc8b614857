"""Rows of the cache and the episodes that share them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from rexrag.agent.episode import Episode, State
from rexrag.engine.sampling.cache import CacheRow
from rexrag.engine.sampling.speculation import ORDER


class Member(NamedTuple):
    """An episode, and the key of its random numbers."""

    episode: Episode
    stream: int


@dataclass(eq=False, slots=True)
class EpisodeRow(CacheRow):
    """Episodes whose tokens are equal so far: their cache, and the tokens to append next."""

    members: list[Member] = field(kw_only=True)
    pending: list[int] = field(default_factory=list)
    """Tokens that the next forward appends."""
    sampled: bool = False
    """The first pending token was sampled."""
    speculative: list[int] = field(default_factory=list)
    """The last pending tokens, proposed by `speculation.NGrams` and not drawn yet."""
    cue: int = 0
    """The last `cue` pending tokens are a cue whose log-probs the episodes need."""
    waiting: bool = False
    """The row waits for documents."""

    @property
    def episode(self) -> Episode:
        """Any of the members: their tokens are equal."""
        return self.members[0].episode

    @property
    def cached(self) -> bool:
        return self.length > 0 and (self.bank is not None or self.saved is not None)

    @property
    def tail(self) -> list[int]:
        """The last `ORDER` tokens of prompt and response."""
        tokens = self.episode.tokens[-ORDER:]
        missing = ORDER - len(tokens)
        return [*self.episode.prompt[-missing:], *tokens] if missing else tokens


ShareKey = tuple[object, ...]
SAMPLING: ShareKey = (State.SAMPLE,)


def share_key(episode: Episode) -> ShareKey:
    """What happens next in an episode. Episodes with equal tokens and `share_key` share a cache row."""
    if episode.state is State.SAMPLE:
        return SAMPLING
    return episode.state, episode.forced, episode.forced_origin, episode.query, episode.topk

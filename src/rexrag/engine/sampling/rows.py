"""Episodes under way: those that are the same so far share a row of the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from rexrag.agent.episode import Episode, State
from rexrag.engine.sampling.cache import Row
from rexrag.engine.sampling.speculation import ORDER


class Member(NamedTuple):
    """An episode, and the key of its random numbers."""

    episode: Episode
    stream: int


@dataclass(eq=False, slots=True)
class LiveRow(Row):
    """Episodes that are the same so far, with their cache and the tokens to append next."""

    members: list[Member] = field(kw_only=True)
    pending: list[int] = field(default_factory=list)
    sampled: bool = False
    """`pending` begins with a token that was sampled."""
    drafted: list[int] = field(default_factory=list)
    """The last pending tokens, which nobody has said yet."""
    cue: int = 0
    """The last `cue` pending tokens are a cue whose log-probs the episodes wait for."""
    waiting: bool = False
    """It waits for documents."""

    @property
    def episode(self) -> Episode:
        """One that stands for all."""
        return self.members[0].episode

    @property
    def cached(self) -> bool:
        return self.length > 0 and (self.bank is not None or self.saved is not None)

    @property
    def tail(self) -> list[int]:
        """The last few tokens that were said or read."""
        tokens = self.episode.tokens[-ORDER:]
        missing = ORDER - len(tokens)
        return [*self.episode.prompt[-missing:], *tokens] if missing else tokens


Wish = tuple[object, ...]
SAMPLING: Wish = (State.SAMPLE,)


def wish(episode: Episode) -> Wish:
    """What an episode waits for: those that have said the same and wait for the same can go on as one."""
    if episode.state is State.SAMPLE:
        return SAMPLING
    return episode.state, episode.forced, episode.forced_origin, episode.query, episode.topk

"""One episode against an engine that samples a whole turn at once: an endpoint, verl's rollout engine."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence

from rexrag.agent.episode import Episode, State
from rexrag.errors import ModelError
from rexrag.types import Document

Generate = Callable[[list[int], int], Awaitable[tuple[Sequence[int], Sequence[float]]]]
"""(token ids so far, how many more at most) -> sampled ids and their log-probs, to the end of a turn."""
Search = Callable[[str, int], Awaitable[list[Document]]]
"""(query, topk) -> documents, best first."""


async def drive(episode: Episode, generate: Generate, search: Search, cue_logp: float = 0.0) -> float:
    """Run an episode to its end; returns the seconds spent searching.

    Tokens that an engine wrote past the end of a turn are dropped. `cue_logp` stands for the log-probs of a
    cue, which such an engine does not give. Raises ModelError where the engine samples nothing.
    """
    searching = 0.0
    while episode.state is not State.DONE:
        if episode.state is State.FORCED:
            episode.take_forced([cue_logp] * len(episode.forced))
        elif episode.state is State.SEARCH:
            start = time.perf_counter()
            episode.found(await search(episode.query, episode.topk))
            searching += time.perf_counter() - start
        else:
            tokens, logps = await generate([*episode.prompt, *episode.tokens], episode.tokens_left)
            if not tokens:
                raise ModelError(f"the rollout engine sampled nothing after {len(episode.tokens)} tokens")
            for token, logp in zip(tokens, logps, strict=True):
                episode.sampled(token, logp)
                if episode.state is not State.SAMPLE:
                    break
    return searching

"""The interface of an engine: a policy that samples and scores, and a learner that trains it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from rexrag.agent.episode import Codec, Episode
from rexrag.config.algorithms import Shared
from rexrag.retrieval.base import Retriever
from rexrag.types import Sample


class Session(Protocol):
    """The rollouts of a step with their caches; closed after the probes of the step."""

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled so far in this session."""
        ...

    @property
    def prefilled_tokens(self) -> int:
        """Tokens read so far: each prompt once for its rollouts, and the evidence and cue of each rollout.

        A forked cache costs nothing. Evidence that several rollouts read counts for each of them, also where
        the engine runs it once.
        """
        ...

    def run(
        self,
        episodes: Sequence[Episode],
        retriever: Retriever,
        temperature: float,
        seed: int | Sequence[int],
    ) -> None:
        """Run every episode until it is done.

        `temperature` 0 is greedy. The tokens of an episode depend on `seed`, its place in `episodes` and its
        own tokens, not on other episodes; with a seed for each episode, on that and its own tokens alone. An
        episode with a `parent` that ran in this session starts from a copy of the parent's cache.
        """
        ...

    def close(self) -> None: ...


class Policy(Protocol):
    """A language model that can roll out episodes and score token sequences."""

    @property
    def codec(self) -> Codec: ...

    def session(self) -> Session: ...

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float) -> list[Tensor]:
        """(prompt, response) ids -> log-probability of each response token, float32 [T], no gradient."""
        ...


class Learner(Protocol):
    """Owns the trainable weights. It sees only Samples, not rollouts or probes."""

    def update(self, samples: Sequence[Sample], algorithm: Shared, temperature: float) -> dict[str, float]:
        """One step of training: `minibatches` optimizer updates; returns its metrics by name."""
        ...

    def gradient_norms(
        self, samples: Sequence[Sample], algorithm: Shared, temperature: float
    ) -> dict[str, float]:
        """L2 norm of the policy gradient that each `Segment` alone would give, by name; updates nothing."""
        ...

    def save(self, folder: Path) -> None:
        """Weights, optimizer and schedule state, as safetensors and JSON."""
        ...

    def load(self, folder: Path) -> None: ...

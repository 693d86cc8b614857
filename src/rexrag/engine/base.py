"""What the step needs of an engine: something that samples and scores, and something that learns."""

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
    """A step's rollouts with their caches; open until the step's probes are done."""

    @property
    def generated_tokens(self) -> int:
        """Tokens sampled so far in this session."""
        ...

    @property
    def prefilled_tokens(self) -> int:
        """Tokens read so far: each prompt once for its rollouts, each rollout's evidence and cue.

        Forked caches cost nothing. What else an engine saves, because rollouts say and read the same, counts.
        """
        ...

    def run(self, episodes: Sequence[Episode], retriever: Retriever, temperature: float, seed: int) -> None:
        """Drive every episode until it is done.

        `temperature` 0 is greedy. What a row samples depends on `seed`, its place in `episodes` and its
        own tokens, not on its neighbours. An episode with a `parent` that ran in this session starts from
        a copy of the parent's cache.
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
    """Owns the trainable weights. Sees only Samples: it does not know what a probe is."""

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

"""No correction: plain GRPO, and the ablation that trains probes as if the policy had drawn them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rexrag.config.algorithms import RexRag
from rexrag.method.corrections.base import cue_tokens, on_policy, rows_as_written, trained_tokens
from rexrag.method.cues import CueTrie
from rexrag.method.rows import Batch, Row, Streams
from rexrag.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class Uncorrected:
    """Rows as they were written; each token's ratio divides by π_old."""

    prefix: bool = True
    cue_tokens: int | None = None

    @classmethod
    def of(cls, algorithm: RexRag, trie: CueTrie | None) -> Uncorrected:
        return cls(algorithm.prefix_loss == "all", cue_tokens(algorithm, trie))

    def rows(self, groups: Sequence[RolloutGroup]) -> list[Row]:
        return rows_as_written(groups)

    def streams(self, batch: Batch) -> Streams:
        return on_policy(batch, trained_tokens(batch, self.prefix, self.cue_tokens))

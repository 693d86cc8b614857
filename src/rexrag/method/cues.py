"""The cue pool as a prefix trie: how likely is the next token of a cue drawn uniformly from the pool?"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rexrag.errors import CueError

END = None
"""Key of a node's share of cues that end there."""


class CueTrie:
    """Prefix trie over a pool of cues (token ids) with exact next-token shares.

    A cue drawn uniformly from the pool has probability (times it is listed) / (pool size); `log_prob`
    spreads that over its tokens as the chain rule does [METHOD §3, `fine`]. Where one cue is the beginning
    of another, its last token also carries the chance of ending there, so that the product stays exact.

    Raises CueError for an empty pool or an empty cue.
    """

    def __init__(self, cues: Sequence[Sequence[int]]) -> None:
        pool = [tuple(int(token) for token in cue) for cue in cues]
        if not pool:
            raise CueError("cues is empty, expected at least one cue")
        if () in pool:
            raise CueError(f"cues[{pool.index(())}] is empty, expected at least one token")
        self.cues = pool
        self._ends = Counter(pool)
        self._through = Counter(cue[:n] for cue in pool for n in range(len(cue) + 1))

    def __len__(self) -> int:
        return len(self.cues)

    @property
    def digest(self) -> str:
        """SHA-256 of the pool in its order; stored in checkpoints, where a change is an error."""
        return hashlib.sha256(json.dumps(self.cues).encode()).hexdigest()

    @property
    def opening(self) -> int:
        """Length of the pool's common beginning (the opening tag), at least 1.

        A pool of one cue, however often it is listed, has nothing to tell it from: 1, not the whole cue.
        """
        if len(self._ends) == 1:
            return 1
        first = self.cues[0]
        shared = (n for n in range(len(first), 1, -1) if self._through[first[:n]] == len(self.cues))
        return next(shared, 1)

    def shares(self, prefix: Sequence[int]) -> dict[int | None, float]:
        """Share of each next token after `prefix` (END for cues that stop there); the values sum to 1."""
        node = tuple(prefix)
        total = self._through[node]
        if not total:
            raise CueError(f"prefix = {list(node)}: no cue of the pool begins like this")
        depth = len(node)
        counts: dict[int | None, int] = {
            path[depth]: count
            for path, count in self._through.items()
            if len(path) == depth + 1 and path[:depth] == node
        }
        if self._ends[node]:
            counts[END] = self._ends[node]
        return {token: count / total for token, count in counts.items()}

    def log_prob(self, cue: Sequence[int]) -> Tensor:
        """Log-share of each token of a cue, float64 [m]; sums to log of the cue's share of the pool.

        Raises CueError if the cue is not in the pool.
        """
        tokens = tuple(int(token) for token in cue)
        if tokens not in self._ends:
            raise CueError(f"cue = {list(tokens)} is not one of the pool's {len(self.cues)} cues")
        counts = [self._through[tokens[:n]] for n in range(len(tokens) + 1)]
        steps = [math.log(after / before) for before, after in pairwise(counts)]
        steps[-1] += math.log(self._ends[tokens] / counts[-1])
        return torch.tensor(steps, dtype=torch.float64)

    def table(self) -> Tensor:
        """`log_prob` of every cue of the pool, zero-padded on the right: float64 [pool, longest]."""
        rows = [self.log_prob(cue) for cue in self.cues]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

"""Rollouts of many episodes at once: each step is one forward over the tokens that all rows append.

A row that samples appends one token (and speculative ones), a row with evidence or a cue appends a block, a
new row appends its prompt. All are packed into one forward without padding (`attention.py`), on caches that
stay over turns and rollouts (`cache.py`). Episodes with equal tokens and `share_key` share a cache row: one
forward, one draw each; they get rows of their own where they differ. Searches wait for others, so that the
retriever is asked in batches. The random numbers of an episode are a function of the seed, its place and its
position, so its tokens do not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rexrag.agent.episode import Episode, State
from rexrag.engine.attention import LayerAttention, hidden_states, token_logps
from rexrag.engine.sampling.appending import CachedPlan
from rexrag.engine.sampling.batch import next_forward
from rexrag.engine.sampling.cache import Cache, CacheShape
from rexrag.engine.sampling.cpu_weights import CpuWeights
from rexrag.engine.sampling.cuda_graphs import CudaGraphs, Forward
from rexrag.engine.sampling.decoder import FusedDecoder
from rexrag.engine.sampling.rows import SAMPLING, EpisodeRow, Member, ShareKey, share_key
from rexrag.engine.sampling.speculation import NGrams
from rexrag.engine.sampling.token_draw import draw_tokens, streams, uniforms
from rexrag.errors import DataError, ModelError
from rexrag.retrieval.base import Retriever
from rexrag.types import Origin

MAX_ROWS = 512
"""Episodes under way at once; the rest are queued."""
SEARCH_SHARE = 4
"""The retriever is asked when at least one row in `SEARCH_SHARE` waits for it."""
SEARCH_PATIENCE = 16
"""The retriever is also asked when a row has waited for this many steps."""
SPECULATION_BYTES = 32 << 20
"""Least size of a model's weights for speculation: forwards of larger models are bound by memory."""
SAVED_BYTES = 4 << 30
"""Caches of finished rows that are kept for probes; beyond it the oldest are dropped and prefilled again."""


class LocalSession:
    """The rollouts of a step with their caches. See `engine.base.Session`."""

    def __init__(
        self,
        model: nn.Module,
        shape: CacheShape,
        settings: Sequence[LayerAttention] | None = None,
        saved_bytes: int = SAVED_BYTES,
    ) -> None:
        """`model`: a Hugging Face causal language model with packed attention.

        settings: what `decoder.layer_attention` returns for it; None runs the model's own forward.
        """
        self.generated_tokens = 0
        self.prefilled_tokens = 0
        self._model, self._shape = model, shape
        self._head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._forward: Forward = partial(hidden_states, model)
        if settings is not None:
            self._forward = FusedDecoder(model.base_model, settings)
        if shape.cuda_graphs:
            self._forward = CudaGraphs(self._forward)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        speculate = weights >= SPECULATION_BYTES and shape.device.type == "cpu"
        self._ngrams = NGrams() if speculate else None
        self._weights = CpuWeights(model if settings is None else self._head)
        self._cache: Cache[EpisodeRow] = Cache(shape)
        self._row_of: dict[int, EpisodeRow] = {}
        """Rows by the id of their episodes, which the rows keep alive."""
        self._new: dict[Any, EpisodeRow] = {}
        """Rows without a forward yet, by their tokens and share key."""
        self._prompts: dict[tuple[int, ...], EpisodeRow] = {}
        """A row that has, or will have, the cache of a prompt."""
        self._saved: deque[EpisodeRow] = deque()
        self._saved_bytes, self._saved_limit = 0, saved_bytes
        self._waiting: list[EpisodeRow] = []
        self._waited = 0
        self._under_way = 0
        """Episodes that are not done; each may come to need a row of its own."""

    def close(self) -> None:
        """Free every cache and copy."""
        self._cache.banks.clear()
        self._weights.clear()
        self._forward = partial(hidden_states, self._model)
        self._row_of.clear()
        self._new.clear()
        self._prompts.clear()
        self._saved.clear()
        self._waiting.clear()
        self._saved_bytes = self._under_way = 0

    @torch.inference_mode()
    def run(
        self,
        episodes: Sequence[Episode],
        retriever: Retriever,
        temperature: float,
        seed: int | Sequence[int],
    ) -> None:
        """See `engine.base.Session.run`.

        Raises DataError for a prompt without tokens; RetrievalError or ModelError (logits that are not
        finite), which close the session.
        """
        if not all(episode.prompt for episode in episodes):
            raise DataError("an episode's prompt has no tokens")
        cuts = [0 if e.cut is None else 1 + e.cut for e in episodes]
        members = [Member(e, s) for e, s in zip(episodes, streams(seed, cuts), strict=True)]
        queue = deque(member for member in members if member.episode.state is not State.DONE)
        try:
            with self._weights.used():
                while queue or self._cache.row_count:
                    self._admit(queue)
                    self._search(retriever)
                    self._make_room()
                    rows, plan = next_forward(self._cache.banks.values())
                    if rows:
                        self._sample(*self._append(rows, plan, temperature), temperature)
        except BaseException:
            self.close()
            raise

    # -- rows: opened, split, finished ---------------------------------------------------------------------

    def _admit(self, queue: deque[Member]) -> None:
        """Start queued episodes: in a new row with equal tokens, on another row's cache, or without one."""
        later: list[Member] = []
        expected = min(len(queue), MAX_ROWS)
        for _ in range(min(len(queue), MAX_ROWS - self._under_way)):
            member = queue.popleft()
            episode = member.episode
            prefix = [*episode.prompt, *episode.tokens]
            key = tuple(prefix), *share_key(episode)
            row = self._new.get(key)
            if row is None:
                source, shared = self._source(episode)
                if source is not None and not source.length:  # the next forward runs this prompt
                    later.append(member)
                    continue
                row = self._new[key] = EpisodeRow(members=[])
                if source is None:
                    self._cache.reserve(row, len(prefix), expected)
                else:  # the last token of a prefix runs again: its logits predict the next token
                    length = min(shared, source.length, len(prefix) - 1)
                    self._cache.restore(row, source, length, expected)
                row.pending = prefix[row.length :]
                if self._ngrams is not None and source is None:
                    self._ngrams.learn((), prefix)
                self._prompts.setdefault(episode.prompt, row)
            row.members.append(member)
            self._row_of[id(episode)] = row
            self._under_way += 1
        for row in self._new.values():
            self._advance(row)
        self._new.clear()
        queue.extendleft(reversed(later))

    def _source(self, episode: Episode) -> tuple[EpisodeRow | None, int]:
        """A row whose cache the episode can start from, and how many first tokens they share."""
        parent = self._row_of.get(id(episode.parent))
        if parent is not None and parent.cached:
            return parent, len(episode.prompt) + (episode.cut or 0)
        return self._prompts.get(episode.prompt), len(episode.prompt)

    def _split(self, row: EpisodeRow, parts: Sequence[list[Member]]) -> list[EpisodeRow]:
        """A row for each part of its members: the row itself for the first, copies for the others."""
        rows = [row]
        row.members = parts[0]
        for members in parts[1:]:
            other = EpisodeRow(members=members, pending=[*row.pending], sampled=row.sampled)
            self._cache.restore(other, row, row.length, self._under_way)
            self._row_of |= {id(member.episode): other for member in members}
            rows.append(other)
        return rows

    def _split_by_key(self, row: EpisodeRow) -> list[EpisodeRow]:
        """A row for each `share_key` of its members."""
        if len(row.members) == 1:
            return [row]
        parts: dict[ShareKey, list[Member]] = {}
        for member in row.members:
            parts.setdefault(share_key(member.episode), []).append(member)
        return self._split(row, list(parts.values()))

    def _advance(self, row: EpisodeRow) -> None:
        """Act on the state of the episodes, up to the next forward: set pending tokens, search, or finish."""
        for part in self._split_by_key(row):
            episode = part.episode
            if episode.state is State.FORCED:
                part.pending += episode.forced
                if self._ngrams is not None:
                    self._ngrams.learn(part.tail, episode.forced)
                if episode.forced_origin is Origin.CUE:
                    part.cue = len(episode.forced)
                    continue
                for member in part.members:
                    member.episode.take_forced([0.0] * len(member.episode.forced))
                self._advance(part)
            elif episode.state is State.SEARCH:
                part.waiting = True
                self._waiting.append(part)
            elif episode.state is State.DONE:
                self._finish(part)
            elif self._ngrams is not None:
                part.speculative = self._ngrams.propose(part.tail, episode.tokens_left - 1)
                part.pending += part.speculative

    def _finish(self, row: EpisodeRow) -> None:
        """Take a finished row out of its bank and save its cache; drop the oldest beyond the limit."""
        row.pending = []
        self._under_way -= len(row.members)
        self._cache.save(row)
        self._saved.append(row)
        self._saved_bytes += 0 if row.saved is None else row.saved.nbytes
        while self._saved_bytes > self._saved_limit:
            oldest = self._saved.popleft()
            self._saved_bytes -= 0 if oldest.saved is None else oldest.saved.nbytes
            oldest.saved = None
            if self._prompts.get(oldest.episode.prompt) is oldest:
                del self._prompts[oldest.episode.prompt]

    def _search(self, retriever: Retriever) -> None:
        """Answer the waiting searches when enough rows wait, or one has waited long enough."""
        self._waited = self._waited + 1 if self._waiting else 0
        if not self._waiting:
            return
        if self._waited < SEARCH_PATIENCE and len(self._waiting) * SEARCH_SHARE < self._cache.row_count:
            return
        rows, self._waiting = self._waiting, []
        for topk in sorted({row.episode.topk for row in rows}):
            asking = [row for row in rows if row.episode.topk == topk]
            with torch.inference_mode(False):
                answers = retriever.search([row.episode.query for row in asking], topk)
            for row, documents in zip(asking, answers, strict=True):
                row.waiting = False
                for member in row.members:
                    member.episode.found(documents)
                self._advance(row)

    def _make_room(self) -> None:
        """Move rows whose pending tokens do not fit into a larger bank."""
        for bank in list(self._cache.banks.values()):
            for row in bank.rows[::-1]:  # from the end, so that few rows move into freed slots
                if row.length + len(row.pending) > bank.capacity:
                    self._cache.reserve(row, row.length + len(row.pending), self._under_way)

    # -- one step ------------------------------------------------------------------------------------------

    def _append(
        self, rows: list[EpisodeRow], plan: CachedPlan, temperature: float
    ) -> tuple[list[EpisodeRow], Tensor]:
        """Run the pending tokens; the rows that sample next, and the hidden states that they sample from.

        A row has one hidden state for its next token, and one for each speculative token.
        """
        ids = [token for row in rows for token in row.pending]
        positions = [p for row in rows for p in range(row.length, row.length + len(row.pending))]
        hidden = self._forward(self._shape.tensor(ids), self._shape.tensor(positions), plan)
        for row in rows:
            read = len(row.pending) - row.sampled - len(row.speculative)
            self.prefilled_tokens += read * (len(row.members) if row.episode.tokens else 1)
        ends = np.cumsum([len(row.pending) for row in rows]).tolist()
        self._score_cues(rows, ends, hidden, temperature)
        for row in rows:
            row.length += len(row.pending)
            row.pending, row.sampled = [], False
        ready: list[EpisodeRow] = []
        last: list[int] = []
        for row, end in zip(rows, ends, strict=True):
            for part in self._split_by_key(row):
                if part.episode.state is State.SAMPLE:
                    ready.append(part)
                    last += range(end - 1 - len(part.speculative), end)
                else:
                    self._advance(part)
        return ready, hidden[self._shape.tensor(last)]

    def _score_cues(
        self, rows: list[EpisodeRow], ends: list[int], hidden: Tensor, temperature: float
    ) -> None:
        """Give episodes the log-probs of their cues. `ends`: where the packed tokens of each row end."""
        cued = []
        targets: list[int] = []
        before: list[int] = []
        for row, end in zip(rows, ends, strict=True):
            if row.cue:
                cued.append(row)
                targets += row.pending[-row.cue :]
                before += range(end - 1 - row.cue, end - 1)
        if not cued:
            return
        at, ids = self._shape.tensor(before), self._shape.tensor(targets)
        logps = token_logps(self._head, hidden[at], ids, temperature).tolist()
        for row in cued:
            for member in row.members:
                member.episode.take_forced(logps[: row.cue])
            logps = logps[row.cue :]
            row.cue = 0

    def _sample(self, rows: list[EpisodeRow], hidden: Tensor, temperature: float) -> None:
        """Draw a token for each episode, at its next position and after each speculative token."""
        if not rows:
            return
        streams: list[int] = []
        places: list[int] = []
        counts: list[int] = []
        for row in rows:
            own = [member.stream for member in row.members]
            written = len(row.episode.tokens)
            for place in range(written, written + 1 + len(row.speculative)):
                streams += own
                places += [place] * len(own)
                counts.append(len(own))
        uniform = self._shape.tensor(uniforms(streams, places))
        ids, logps = draw_tokens(self._head, hidden, temperature, uniform, counts)
        drawn = zip(ids.tolist(), logps.tolist(), strict=True)
        for row in rows:
            self._accept(row, [[*islice(drawn, len(row.members))] for _ in range(1 + len(row.speculative))])

    def _accept(self, row: EpisodeRow, drawn: list[list[tuple[int, float]]]) -> None:
        """Give the episodes of a row their drawn tokens, up to the first that differs from the speculative.

        drawn: token and log-prob of each member, at each position.
        """
        speculative, row.speculative = row.speculative, []
        row.length -= len(speculative)
        indices, members = list(range(len(row.members))), row.members
        for place, found in enumerate(drawn):
            tail = row.tail
            parts: dict[tuple[int, ShareKey], list[int]] = {}
            for index in indices:
                token, logp = found[index]
                if not math.isfinite(logp):
                    raise ModelError(f"the model's logits are not finite after {row.length} tokens")
                episode = members[index].episode
                episode.sampled(token, logp)
                parts.setdefault((token, share_key(episode)), []).append(index)
            self.generated_tokens += len(indices)
            expected = (speculative[place], SAMPLING) if place < len(speculative) else None
            keys = sorted(parts, key=lambda key: key != expected)  # the row itself has the expected token
            rows = self._split(row, [[members[index] for index in parts[key]] for key in keys])
            for part, (token, _) in zip(rows, keys, strict=True):
                if self._ngrams is not None:
                    self._ngrams.learn(tail, (token,))
                part.pending, part.sampled = [token], True
            for part in rows[keys[0] == expected :]:
                self._advance(part)
            if keys[0] != expected:
                return
            row.length += 1
            indices = parts[keys[0]]

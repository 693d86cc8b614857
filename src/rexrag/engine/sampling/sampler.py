"""Rollouts of many episodes at once: every step is one forward over whatever each live row has to append.

A row that samples appends one token, a row with evidence or a cue appends a block, a new row appends its
prompt; all are packed into one forward without padding (`attention.py`), on caches that outlive turns and
rollouts (`cache.py`). Episodes share a row for as long as they have said and read the same: one forward, one
draw for each, and a row of its own for whatever differs. Rows that search wait a little for company, so that
the retriever is asked in batches. An episode's random numbers are a function of the seed, its place and its
position: neighbours change nothing.
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
from rexrag.engine.attention import Heads, hidden_states, token_logps
from rexrag.engine.sampling.appending import CachedPlan, Group, ahead, block, single
from rexrag.engine.sampling.cache import Bank, Cache, CacheShape
from rexrag.engine.sampling.cpu_weights import Repacked
from rexrag.engine.sampling.cuda_graphs import Forward, Recorded
from rexrag.engine.sampling.decoder import Fused
from rexrag.engine.sampling.rows import SAMPLING, LiveRow, Member, Wish, wish
from rexrag.engine.sampling.speculation import Drafts
from rexrag.engine.sampling.token_draw import draw, streams, uniforms
from rexrag.errors import DataError, ModelError
from rexrag.retrieval.base import Retriever
from rexrag.types import Origin

MAX_ROWS = 512
"""Rows decoded at once; the rest wait for a place."""
PREFILL_TOKENS = 8192
"""Prompt, evidence and cue tokens in one forward (a single longer row still goes in one piece)."""
BLOCK_VALUES = 1 << 24
"""Values of a layer's copied keys and values, or of a head's scores, in one block of such rows (likewise)."""
SEARCH_SHARE = 4
"""The retriever is asked once a quarter of the live rows wait for it,"""
SEARCH_PATIENCE = 16
"""or once one of them has waited for this many steps."""
DRAFTING_BYTES = 32 << 20
"""Weights of a model whose forwards wait for memory: a drafted token costs less than a forward saved."""
SAVED_BYTES = 4 << 30
"""Caches of finished rows, kept for probes; past it the oldest go, and their probes are prefilled anew."""


class LocalSession:
    """A step's rollouts with their caches. See `engine.base.Session`."""

    def __init__(
        self,
        model: nn.Module,
        shape: CacheShape,
        heads: Sequence[Heads] | None = None,
        saved_bytes: int = SAVED_BYTES,
    ) -> None:
        """`model`: a Hugging Face causal language model with packed attention.

        heads: what `decoder.heads_of` says of it; None runs the model's own forward.
        """
        self.generated_tokens = 0
        self.prefilled_tokens = 0
        self._model, self._shape = model, shape
        self._head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self._forward: Forward = partial(hidden_states, model)
        if heads is not None:
            self._forward = Fused(model.base_model, heads)
        if shape.recorded:
            self._forward = Recorded(self._forward)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        drafting = weights >= DRAFTING_BYTES and shape.device.type == "cpu"
        self._drafts = Drafts() if drafting else None
        self._weights = Repacked(model if heads is None else self._head)
        self._cache: Cache[LiveRow] = Cache(shape)
        self._known: dict[int, LiveRow] = {}  # by id of the episode, which the row keeps alive
        self._starting: dict[Any, LiveRow] = {}
        """Rows that have run nothing yet, by what they start with."""
        self._prompts: dict[tuple[int, ...], LiveRow] = {}
        self._saved: deque[LiveRow] = deque()
        self._saved_bytes, self._saved_limit = 0, saved_bytes
        self._waiting: list[LiveRow] = []
        self._waited = 0
        self._live = 0
        """Episodes under way; each may come to need a row."""

    def close(self) -> None:
        """Free every cache and copy."""
        self._cache.banks.clear()
        self._weights.clear()
        self._forward = partial(hidden_states, self._model)
        self._known.clear()
        self._starting.clear()
        self._prompts.clear()
        self._saved.clear()
        self._waiting.clear()
        self._saved_bytes = self._live = 0

    @torch.inference_mode()
    def run(self, episodes: Sequence[Episode], retriever: Retriever, temperature: float, seed: int) -> None:
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
                while queue or self._cache.live:
                    self._admit(queue)
                    self._ask(retriever)
                    rows, plan = self._plan()
                    if rows:
                        self._sample(*self._append(rows, plan, temperature), temperature)
        except BaseException:
            self.close()
            raise

    # -- where rows come from and go to --------------------------------------------------------------------

    def _admit(self, queue: deque[Member]) -> None:
        """Start episodes: in a row that is about to do the same, from another's cache, or from nothing."""
        later: list[Member] = []
        expected = min(len(queue), MAX_ROWS)
        for _ in range(min(len(queue), MAX_ROWS - self._live)):
            member = queue.popleft()
            episode = member.episode
            prefix = [*episode.prompt, *episode.tokens]
            start = tuple(prefix), *wish(episode)
            row = self._starting.get(start)
            if row is None:
                source, shared = self._source(episode)
                if source is not None and not source.length:  # about to run the same prompt
                    later.append(member)
                    continue
                row = self._starting[start] = LiveRow(members=[])
                if source is None:
                    self._cache.reserve(row, len(prefix), expected)
                else:  # the last token of a prefix runs again: its logits say what comes next
                    length = min(shared, source.length, len(prefix) - 1)
                    self._cache.restore(row, source, length, expected)
                row.pending = prefix[row.length :]
                if self._drafts is not None and source is None:
                    self._drafts.learn((), prefix)
                self._prompts.setdefault(episode.prompt, row)
            row.members.append(member)
            self._known[id(episode)] = row
            self._live += 1
        for row in self._starting.values():
            self._advance(row)
        self._starting.clear()
        queue.extendleft(reversed(later))

    def _source(self, episode: Episode) -> tuple[LiveRow | None, int]:
        """A row to start from, and how many first tokens it shares with this episode."""
        parent = self._known.get(id(episode.parent))
        if parent is not None and parent.cached:
            return parent, len(episode.prompt) + (episode.cut or 0)
        return self._prompts.get(episode.prompt), len(episode.prompt)

    def _part(self, row: LiveRow, parts: Sequence[list[Member]]) -> list[LiveRow]:
        """A row for each part of its members: the row itself for the first, copies for the others."""
        rows = [row]
        row.members = parts[0]
        for members in parts[1:]:
            other = LiveRow(members=members, pending=[*row.pending], sampled=row.sampled)
            self._cache.restore(other, row, row.length, self._live)
            self._known |= {id(member.episode): other for member in members}
            rows.append(other)
        return rows

    def _by_wish(self, row: LiveRow) -> list[LiveRow]:
        """Rows whose episodes wait for the same."""
        if len(row.members) == 1:
            return [row]
        parts: dict[Wish, list[Member]] = {}
        for member in row.members:
            parts.setdefault(wish(member.episode), []).append(member)
        return self._part(row, list(parts.values()))

    def _advance(self, row: LiveRow) -> None:
        """Do what the episodes' state asks for, up to the next forward; draft what those say that sample."""
        for part in self._by_wish(row):
            episode = part.episode
            if episode.state is State.FORCED:
                part.pending += episode.forced
                if self._drafts is not None:
                    self._drafts.learn(part.tail, episode.forced)
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
            elif self._drafts is not None:
                part.drafted = self._drafts.draft(part.tail, episode.tokens_left - 1)
                part.pending += part.drafted

    def _finish(self, row: LiveRow) -> None:
        """Take a finished row out of the batch and keep its cache, as far as memory for that goes."""
        row.pending = []
        self._live -= len(row.members)
        self._cache.save(row)
        self._saved.append(row)
        self._saved_bytes += 0 if row.saved is None else row.saved.nbytes
        while self._saved_bytes > self._saved_limit:
            oldest = self._saved.popleft()
            self._saved_bytes -= 0 if oldest.saved is None else oldest.saved.nbytes
            oldest.saved = None
            if self._prompts.get(oldest.episode.prompt) is oldest:
                del self._prompts[oldest.episode.prompt]

    def _ask(self, retriever: Retriever) -> None:
        """Answer the waiting searches, once there are enough of them or they have waited long enough."""
        self._waited = self._waited + 1 if self._waiting else 0
        if not self._waiting:
            return
        if self._waited < SEARCH_PATIENCE and len(self._waiting) * SEARCH_SHARE < self._cache.live:
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

    # -- one step ------------------------------------------------------------------------------------------

    def _plan(self) -> tuple[list[LiveRow], CachedPlan]:
        """The rows that append something, in packed order, and how they attend."""
        for bank in list(self._cache.banks.values()):
            for row in bank.rows[::-1]:  # from the end, so that few rows move into freed slots
                if row.length + len(row.pending) > bank.capacity:
                    self._cache.reserve(row, row.length + len(row.pending), self._live)
        rows: list[LiveRow] = []
        groups: list[Group] = []
        blocks: list[tuple[Bank[LiveRow], list[LiveRow]]] = []
        for bank in self._cache.banks.values():
            active = [row for row in bank.rows if row.pending and not row.waiting]
            short = [row for row in active if len(row.pending) == 1 + len(row.drafted)]
            if short:
                counts = [len(row.pending) for row in short]
                alone = max(counts) == 1
                start = sum(len(row.pending) for row in rows)
                groups.append(single(bank, short, start) if alone else ahead(bank, short, counts, start))
                rows += short
            several = [row for row in active if len(row.pending) > 1 + len(row.drafted)]
            blocks += ((bank, part) for part in _blocks(several, bank))
        start = first = sum(len(row.pending) for row in rows)
        for bank, part in blocks:
            counts = [len(row.pending) for row in part]
            if start > first and start + sum(counts) - first > PREFILL_TOKENS:
                break
            groups.append(block(bank, part, counts, start))
            rows += part
            start += sum(counts)
        return rows, CachedPlan(groups)

    def _append(
        self, rows: list[LiveRow], plan: CachedPlan, temperature: float
    ) -> tuple[list[LiveRow], Tensor]:
        """Run what is pending; the rows that sample next, and the hidden states that each samples from.

        A row has one for its next token, and one more for each that was drafted.
        """
        ids = [token for row in rows for token in row.pending]
        positions = [p for row in rows for p in range(row.length, row.length + len(row.pending))]
        hidden = self._forward(self._shape.tensor(ids), self._shape.tensor(positions), plan)
        for row in rows:
            read = len(row.pending) - row.sampled - len(row.drafted)
            self.prefilled_tokens += read * (len(row.members) if row.episode.tokens else 1)
        ends = np.cumsum([len(row.pending) for row in rows]).tolist()
        self._score_cues(rows, ends, hidden, temperature)
        ready: list[LiveRow] = []
        last: list[int] = []
        for row, end in zip(rows, ends, strict=True):
            for part in self._by_wish(row):
                if part.episode.state is State.SAMPLE:
                    ready.append(part)
                    last += range(end - 1 - len(part.drafted), end)
                else:
                    self._advance(part)
        return ready, hidden[self._shape.tensor(last)]

    def _score_cues(self, rows: list[LiveRow], ends: list[int], hidden: Tensor, temperature: float) -> None:
        """Account for what was appended, and give episodes the log-probs of their cues."""
        cued = []
        targets: list[int] = []
        before: list[int] = []
        for row, end in zip(rows, ends, strict=True):
            if row.cue:
                cued.append(row)
                targets += row.pending[-row.cue :]
                before += range(end - 1 - row.cue, end - 1)
            row.length += len(row.pending)
            row.pending, row.sampled = [], False
        if not cued:
            return
        at, ids = self._shape.tensor(before), self._shape.tensor(targets)
        logps = token_logps(self._head, hidden[at], ids, temperature).tolist()
        for row in cued:
            for member in row.members:
                member.episode.take_forced(logps[: row.cue])
            logps = logps[row.cue :]
            row.cue = 0

    def _sample(self, rows: list[LiveRow], hidden: Tensor, temperature: float) -> None:
        """A token for each episode, and more where they were drafted."""
        if not rows:
            return
        streams: list[int] = []
        places: list[int] = []
        counts: list[int] = []
        for row in rows:
            own = [member.stream for member in row.members]
            said = len(row.episode.tokens)
            for place in range(said, said + 1 + len(row.drafted)):
                streams += own
                places += [place] * len(own)
                counts.append(len(own))
        uniform = self._shape.tensor(uniforms(streams, places))
        ids, logps = draw(self._head, hidden, temperature, uniform, counts)
        drawn = zip(ids.tolist(), logps.tolist(), strict=True)
        for row in rows:
            self._take(row, [[*islice(drawn, len(row.members))] for _ in range(1 + len(row.drafted))])

    def _take(self, row: LiveRow, drawn: list[list[tuple[int, float]]]) -> None:
        """Give a row's episodes what they drew, place by place, as long as that is what was drafted.

        drawn: token and log-prob of each member, at each place.
        """
        drafted, row.drafted = row.drafted, []
        row.length -= len(drafted)
        indices, members = list(range(len(row.members))), row.members
        for place, found in enumerate(drawn):
            tail = row.tail
            parts: dict[tuple[int, Wish], list[int]] = {}
            for index in indices:
                token, logp = found[index]
                if not math.isfinite(logp):
                    raise ModelError(f"the model's logits are not finite after {row.length} tokens")
                episode = members[index].episode
                episode.sampled(token, logp)
                parts.setdefault((token, wish(episode)), []).append(index)
            self.generated_tokens += len(indices)
            run = (drafted[place], SAMPLING) if place < len(drafted) else None
            keys = sorted(parts, key=lambda key: key != run)  # what is run already keeps the row
            rows = self._part(row, [[members[index] for index in parts[key]] for key in keys])
            for part, (token, _) in zip(rows, keys, strict=True):
                if self._drafts is not None:
                    self._drafts.learn(tail, (token,))
                part.pending, part.sampled = [token], True
            for part in rows[keys[0] == run :]:
                self._advance(part)
            if keys[0] != run:
                return
            row.length += 1
            indices = parts[keys[0]]


def _blocks(rows: list[LiveRow], bank: Bank[LiveRow]) -> list[list[LiveRow]]:
    """Rows of a bank that append several tokens, parted so that padding at most doubles a row."""
    parts: list[list[LiveRow]] = []
    room = 0
    for row in sorted(rows, key=lambda row: -len(row.pending)):
        widest = len(parts[-1][0].pending) if parts else 0
        if not room or widest > 2 * len(row.pending):
            parts.append([])
            widest = len(row.pending)
            values = bank.capacity * max(widest, 2 * bank.shape.heads * bank.shape.size)
            room = max(1, min(BLOCK_VALUES // values, PREFILL_TOKENS // widest))
        parts[-1].append(row)
        room -= 1
    return parts

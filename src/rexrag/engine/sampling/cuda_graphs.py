"""Decode steps as recorded graphs, for a GPU: one launch, where Python would start every operation by itself.

A step that appends one token to every row of a bank is the same operations on the same memory each time, as
long as the bank stays where it is. It is recorded for a power of two of rows (or all that the bank has room
for) and the bank's whole capacity, and then replayed with other tokens. Slots without a token compute too,
and what they write lies past the end of their row. Prompts, evidence and cues run as they are.

On a CPU nothing is recorded, and the same step runs operation by operation: for tests of who writes where.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rexrag.engine.sampling.appending import CachedPlan, Group
from rexrag.engine.sampling.cache import Bank
from rexrag.engine.sampling.decoder import Fused

Forward = Callable[[Tensor, Tensor, CachedPlan], Tensor]
"""(ids, positions, plan) -> last hidden state of each packed token: long [N], long [N] -> [N, hidden]."""
Replay = Callable[[], Tensor]
"""-> hidden states [rows, hidden], in memory that the next replay overwrites."""
log = logging.getLogger(__name__)
LEAST_ROWS = 8
"""Rows of the smallest recording."""


class CaptureError(RuntimeError):
    """A step could not be recorded, though it ran."""


@dataclass(slots=True)
class Recording:
    """One decode step of a bank's first slots, and the memory that it reads."""

    ids: Tensor
    """Token to append in each slot, long [rows]."""
    positions: Tensor
    """Where it goes, long [rows]."""
    replay: Replay | None = None


class Recorded:
    """A forward whose decode steps are recorded. Stale once the weights change."""

    def __init__(self, forward: Forward) -> None:
        """forward: a `Fused` decoder, or a model's own, which must not wait for the device."""
        self._forward = self._run = forward
        self._prepare: Callable[[int], Any] = lambda _: None
        if isinstance(forward, Fused):
            self._run, self._prepare = forward.run, forward.tabulate
        self._steps: WeakKeyDictionary[Bank[Any], dict[tuple[int, int], Recording]] = WeakKeyDictionary()
        self._pool: Any = None
        self._failed = False

    def __call__(self, ids: Tensor, positions: Tensor, plan: CachedPlan) -> Tensor:
        """See `Forward`. Groups of single tokens come first in the plan."""
        if not self._failed:
            try:
                return self._call(ids, positions, plan)
            except CaptureError as error:
                self._failed = True
                self._steps.clear()
                log.warning("decode steps are not recorded, and so slower: %s", error)
        return self._forward(ids, positions, plan)

    def _call(self, ids: Tensor, positions: Tensor, plan: CachedPlan) -> Tensor:
        steps = [group for group in plan.groups if group.padded is None]
        out = [self._step(group, ids[group.start : group.stop]) for group in steps]
        rest = plan.groups[len(steps) :]
        if rest:
            first = rest[0].start
            shifted = [replace(g, start=g.start - first, stop=g.stop - first) for g in rest]
            out.append(self._forward(ids[first:], positions[first:], CachedPlan(shifted)))
        return out[0] if len(out) == 1 else torch.cat(out)

    def _step(self, group: Group, ids: Tensor) -> Tensor:
        """Append one token to each row of a group.

        The other live rows have tokens pending, for which their bank has room: garbage goes where the first
        of these will.
        """
        bank = group.bank
        live = len(bank.rows)
        known = self._steps.setdefault(bank, {})
        key = bank.room, min(_rows(live), bank.room)
        if key not in known:
            for other in [other for other in known if other[0] != bank.room]:
                del known[other]  # a bank that grew lies elsewhere
            known[key] = Recording(*torch.zeros(2, key[1], dtype=torch.long, device=ids.device))
        recording = known[key]
        slots = slice(live) if group.slots is None else group.slots
        recording.ids[slots] = ids
        recording.positions[:live] = bank.shape.tensor([row.length for row in bank.rows])
        if recording.replay is None:
            recording.replay = self._record(bank, recording.ids, recording.positions)
        return recording.replay()[slots].clone()

    def _record(self, bank: Bank[Any], ids: Tensor, positions: Tensor) -> Replay:
        """Record the step that the buffers hold, which is taken on the way, more than once."""
        heads, capacity, rows = bank.shape.heads, bank.capacity, len(ids)
        tables = self._prepare(capacity)
        firsts = torch.arange(rows * heads, device=ids.device).view(rows, heads) * capacity

        def step() -> Tensor:
            every = Group(
                bank=bank,
                start=0,
                stop=rows,
                places=(firsts + positions[:, None]).flatten(),
                slots=None,
                visible=positions[:, None] + 1,
                longest=capacity,
                plain=False,
            )
            return self._run(ids, positions, CachedPlan([every]))

        if ids.device.type != "cuda":
            return step
        return self._capture(step, ids.device, keep=(ids, positions, firsts, tables))

    def _capture(self, step: Replay, device: torch.device, keep: Sequence[Any]) -> Replay:
        """A replay of `step`. Raises CaptureError.

        keep: what the step reads, beside weights and caches.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        current, stream = torch.cuda.current_stream(device), _stream(device)
        # The libraries set themselves up in a first run, on the stream that is recorded.
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                hidden = step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a failed capture leaves its own
            raise CaptureError(str(error).splitlines()[0]) from None

        def replay(kept: Sequence[Any] = keep) -> Tensor:
            graph.replay()
            return hidden

        return replay


@cache
def _stream(device: torch.device) -> Any:
    """One for all recordings: memory between operations, and the libraries' own, belong to a stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _rows(live: int) -> int:
    """Rows of the recording that serves `live` of them."""
    return max(LEAST_ROWS, 1 << (live - 1).bit_length())

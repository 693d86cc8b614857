"""Decode steps as recorded graphs, for a GPU: one launch, where Python would start every operation by itself.

A step that appends one token to every row of a bank is the same operations on the same memory each time, as
long as the bank stays where it is. It is recorded for a power of two of rows and the bank's whole capacity,
and then replayed with other tokens. Slots without a token compute too, and what they write lies past the end
of their row. Prompts, evidence and cues run as they are.

On a CPU nothing is recorded, and the same step runs operation by operation: for tests of who writes where.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rexrag.engine.local.appending import CachedPlan, Group
from rexrag.engine.local.cache import Bank
from rexrag.engine.local.decoder import Fused

Replay = Callable[[], Tensor]
"""-> hidden states [rows, hidden], in memory that the next replay overwrites."""
LEAST_ROWS = 8
"""Rows of the smallest recording."""


@dataclass(slots=True)
class Recording:
    """One decode step of a bank's first slots, and the memory that it reads."""

    ids: Tensor
    """Token to append in each slot, long [rows]."""
    positions: Tensor
    """Where it goes, long [rows]."""
    replay: Replay | None = None


Forward = Callable[[Tensor, Tensor, CachedPlan], Tensor]
"""(ids, positions, plan) -> last hidden state of each packed token: long [N], long [N] -> [N, hidden]."""


class Recorded:
    """A forward whose decode steps are recorded. Stale once the weights lie elsewhere."""

    def __init__(self, forward: Forward) -> None:
        """forward: a `Fused` decoder, or a model's own."""
        self._forward = self._run = forward
        self._prepare: Callable[[int], Any] = lambda _: None
        if isinstance(forward, Fused):
            self._run, self._prepare = forward.run, forward.tabulate
        self._steps: WeakKeyDictionary[Bank[Any], dict[tuple[int, int], Recording]] = WeakKeyDictionary()
        self._pool: Any = None

    def __call__(self, ids: Tensor, positions: Tensor, plan: CachedPlan) -> Tensor:
        """See `Forward`. Groups of single tokens come first in the plan."""
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
        key = bank.room, min(_rows(live), bank.room)  # a bank that grew lies elsewhere
        if key not in known:
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
        """A replay of `step`; `step` itself where a model's own forward waits for the device.

        keep: what the step reads, beside weights and caches.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # The libraries set themselves up in a first run, on the stream that is recorded.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                hidden = step()
        except RuntimeError:
            self._pool = None
            return step

        def replay(kept: Sequence[Any] = keep) -> Tensor:
            graph.replay()
            return hidden

        return replay


def _rows(live: int) -> int:
    """Rows of the recording that serves `live` of them."""
    return max(LEAST_ROWS, 1 << (live - 1).bit_length())

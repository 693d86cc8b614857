"""Decode steps as CUDA graphs: one launch for all operations of a step.

A step that appends one token to every row of a bank runs the same operations on the same memory each time,
as long as the bank is not reallocated. It is captured for a power of two of rows (at most the bank's slots)
and the bank's whole capacity, and replayed with other tokens. Slots without a token take part; what they
write lies past the end of their row. Prompts, evidence and cues run without a graph.

On a CPU there are no graphs: the same step runs operation by operation, which the tests use.
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
from rexrag.engine.sampling.decoder import FusedDecoder

Forward = Callable[[Tensor, Tensor, CachedPlan], Tensor]
"""(ids, positions, plan) -> last hidden state of each packed token: long [N], long [N] -> [N, hidden]."""
Replay = Callable[[], Tensor]
"""() -> hidden states [rows, hidden], in memory that the next replay overwrites."""
log = logging.getLogger(__name__)
LEAST_ROWS = 8
"""Rows of the smallest graph."""


class CaptureError(RuntimeError):
    """A decode step ran, but could not be captured."""


@dataclass(slots=True)
class CapturedStep:
    """One decode step of a bank's first slots, and the memory that it reads."""

    ids: Tensor
    """Token to append in each slot: long [rows]."""
    positions: Tensor
    """Position of that token in its row: long [rows]."""
    replay: Replay | None = None


class CudaGraphs:
    """A forward whose decode steps are captured. Not valid after the weights change."""

    def __init__(self, forward: Forward) -> None:
        """forward: a `FusedDecoder`, or a model's own forward that never waits for the device."""
        self._forward = self._run = forward
        self._prepare: Callable[[int], Any] = lambda _: None
        if isinstance(forward, FusedDecoder):
            self._run, self._prepare = forward.run, forward.tabulate
        self._steps: WeakKeyDictionary[Bank[Any], dict[tuple[int, int], CapturedStep]] = WeakKeyDictionary()
        self._pool: Any = None
        self._failed = False

    def __call__(self, ids: Tensor, positions: Tensor, plan: CachedPlan) -> Tensor:
        """See `Forward`. The plan begins with the groups that append single tokens."""
        if not self._failed:
            try:
                return self._call(ids, positions, plan)
            except CaptureError as error:
                self._failed = True
                self._steps.clear()
                log.warning("decode steps run without CUDA graphs, and so slower: %s", error)
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

        The step writes into every row of the bank. Each of the other rows has pending tokens and room for
        them: what is written there lies where its first pending token will go.
        """
        bank = group.bank
        count = len(bank.rows)
        known = self._steps.setdefault(bank, {})
        key = bank.room, min(_graph_rows(count), bank.room)
        if key not in known:
            for other in [other for other in known if other[0] != bank.room]:
                del known[other]  # a bank that grew was reallocated
            known[key] = CapturedStep(*torch.zeros(2, key[1], dtype=torch.long, device=ids.device))
        captured = known[key]
        slots = slice(count) if group.slots is None else group.slots
        captured.ids[slots] = ids
        captured.positions[:count] = bank.shape.tensor([row.length for row in bank.rows])
        if captured.replay is None:
            captured.replay = self._prepare_step(bank, captured.ids, captured.positions)
        return captured.replay()[slots].clone()

    def _prepare_step(self, bank: Bank[Any], ids: Tensor, positions: Tensor) -> Replay:
        """The decode step on these buffers, captured on a GPU. Capturing runs the step, which is harmless."""
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
        """`step` as a CUDA graph. Raises CaptureError.

        keep: tensors that the step reads, beside weights and caches; the graph keeps them alive.
        """
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        current, stream = torch.cuda.current_stream(device), _stream(device)
        # CUDA libraries initialise in a first run, which must be on the stream of the capture.
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                hidden = step()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a failed capture does not restore it
            raise CaptureError(str(error).splitlines()[0]) from None

        def replay(kept: Sequence[Any] = keep) -> Tensor:
            graph.replay()
            return hidden

        return replay


@cache
def _stream(device: torch.device) -> Any:
    """One stream for all captures: workspaces of CUDA libraries belong to a stream."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _graph_rows(count: int) -> int:
    """Rows of the graph that serves `count` rows: the next power of two."""
    return max(LEAST_ROWS, 1 << (count - 1).bit_length())

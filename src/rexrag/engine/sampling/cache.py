"""Key-value cache of rows, in banks of similar length.

A bank is one tensor [2, layers, rows, K, capacity, D]; its rows lie densely in its first slots. A row that
outgrows its bank moves to the next larger one. A decode step therefore reads, per bank, only up to the
bank's longest row (with CUDA graphs: the whole capacity), and a long row does not slow short ones down. A
finished row leaves its bank as a copy of its own length, from which a probe or another rollout of the same
prompt can start.

Shape suffixes: K key-value heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rexrag.engine.attention import LayerAttention, hidden_states
from rexrag.engine.sampling.decoder import fixed_angles
from rexrag.errors import ModelError

GROWTH = 1.3
"""Capacity of a bank relative to the next smaller one; bounds the share of a bank that is padding."""
CAPACITY_STEP = 32
"""Capacities are multiples of this number of tokens."""
GRAPH_CAPACITY_STEP = 256
"""The same with CUDA graphs: there are fewer banks, so fewer graphs."""
KEPT_BYTES = 2 << 30
"""With CUDA graphs, empty banks are kept up to this many bytes in all, because their graphs read them."""


@dataclass(eq=False, slots=True)
class CacheRow:
    """One token sequence, of which the first `length` tokens are in the cache."""

    length: int = 0
    bank: Bank[Any] | None = None
    slot: int = -1
    saved: Tensor | None = None
    """[2, layers, K, length, D] after the row has left its bank."""


R = TypeVar("R", bound=CacheRow)


class Bank(Generic[R]):
    """Rows of one capacity. `rows[i]` owns slot i."""

    def __init__(self, shape: CacheShape, capacity: int, room: int) -> None:
        self.shape, self.capacity = shape, capacity
        self.rows: list[R] = []
        # Zeros: attention multiplies the value of a masked position by 0, and 0 · NaN is NaN.
        self._allocate(shape.zeros(room, capacity))

    def _allocate(self, kv: Tensor) -> None:
        self.kv = kv
        self.room = kv.shape[2]
        keys, values = kv.unbind(0)
        self.keys, self.values = keys.unbind(0), values.unbind(0)
        self.flat = [(k.view(-1, k.shape[-1]), v.view(-1, v.shape[-1])) for k, v in self.layers()]

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.keys, self.values, strict=True))

    def add(self, row: R) -> None:
        if len(self.rows) == self.room:
            bigger = self.shape.zeros(2 * self.room, self.capacity)
            longest = max(other.length for other in self.rows)
            bigger[:, :, : self.room, :, :longest] = self.kv[..., :longest, :]
            self._allocate(bigger)
        row.bank, row.slot = self, len(self.rows)
        self.rows.append(row)

    def free(self, slot: int) -> None:
        """Remove the row of a slot. The last row moves into it."""
        last = self.rows.pop()
        if slot != len(self.rows):
            self.kv[:, :, slot, :, : last.length] = self.kv[:, :, last.slot, :, : last.length]
            self.rows[slot] = last
            last.slot = slot

    def view(self, row: R) -> Tensor:
        return self.kv[:, :, row.slot, :, : row.length]


class _KeysAndValues:
    """A plan that keeps each layer's keys and values, to measure their shapes."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: LayerAttention
    ) -> Tensor:
        self.kv[layer] = key, value
        return torch.zeros_like(query).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class CacheShape:
    layers: int
    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device
    cuda_graphs: bool = False
    """Decode steps are captured (`cuda_graphs.py`), for fixed memory: banks are few, and stay."""

    @classmethod
    def of(cls, model: nn.Module) -> CacheShape:
        """Measured by a forward of one token. Raises ModelError where layers, or keys and values, differ."""
        seen = _KeysAndValues()
        with torch.inference_mode():
            ids = torch.zeros(1, dtype=torch.long, device=next(model.parameters()).device)
            hidden_states(model, ids, ids, seen)
        first = seen.kv[0][0] if sorted(seen.kv) == list(range(len(seen.kv))) and seen.kv else None
        if first is None or any(x.shape != first.shape for pair in seen.kv.values() for x in pair):
            raise ModelError(f"{type(model).__name__}: its layers, or their keys and values, differ in shape")
        graphs = first.device.type == "cuda" and fixed_angles(model.base_model)
        return cls(len(seen.kv), first.shape[1], first.shape[3], first.dtype, first.device, graphs)

    def tensor(self, values: object) -> Tensor:
        return torch.as_tensor(values, device=self.device)

    def zeros(self, rows: int, capacity: int) -> Tensor:
        shape = (2, self.layers, rows, self.heads, capacity, self.size)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # numpy asks the system for zeroed pages, which it gets on first use; torch writes every zero.
        size = math.prod(shape) * self.dtype.itemsize
        return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(self.dtype).view(shape)


class Cache(Generic[R]):
    """All banks of a session, by capacity."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self.banks: dict[int, Bank[R]] = {}

    @property
    def row_count(self) -> int:
        """Rows in all banks."""
        return sum(len(bank.rows) for bank in self.banks.values())

    def reserve(self, row: R, length: int, expected: int = 0) -> None:
        """Make room for `length` tokens, moving the row to a larger bank where needed.

        expected: rows that a new bank should have room for.
        """
        old = row.bank
        if old is not None and old.capacity >= length:
            return
        capacity = capacity_for(length, GRAPH_CAPACITY_STEP if self.shape.cuda_graphs else CAPACITY_STEP)
        bank = self.banks.get(capacity)
        if bank is None:
            # The rows of a step grow alike: when one outgrows its bank, the others will soon.
            room = max(8, expected, len(old.rows) if old is not None else 0)
            bank = self.banks[capacity] = Bank(self.shape, capacity, room)
        if old is None:
            bank.add(row)
            return
        slot = row.slot
        bank.add(row)
        bank.view(row).copy_(old.kv[:, :, slot, :, : row.length])
        self._free(old, slot)

    def restore(self, row: R, source: R, length: int, expected: int = 0) -> None:
        """Copy the first `length` tokens of another row, in a bank or saved, into this new row."""
        self.reserve(row, length, expected)
        kept = source.saved if source.bank is None else source.bank.view(source)
        assert kept is not None and row.bank is not None
        row.length = length
        row.bank.view(row).copy_(kept[..., :length, :])

    def save(self, row: R) -> None:
        """Take a row out of its bank and keep a copy of its own length."""
        if row.bank is not None:
            row.saved = row.bank.view(row).clone()
            self._free(row.bank, row.slot)
            row.bank, row.slot = None, -1

    def _free(self, bank: Bank[R], slot: int) -> None:
        bank.free(slot)
        empty = sum(other.kv.nbytes for other in self.banks.values() if not other.rows)
        if not bank.rows and not (self.shape.cuda_graphs and empty <= KEPT_BYTES):
            del self.banks[bank.capacity]


def capacity_for(length: int, grain: int = CAPACITY_STEP) -> int:
    """The smallest bank capacity that holds `length` tokens."""
    capacity = 2 * grain
    while capacity < length:
        capacity = -(-int(capacity * GROWTH) // grain) * grain
    return capacity

"""Key-value cache of live rows, in banks of similar length.

A bank holds rows of one capacity: [2, layers, rows, K, capacity, D], its live rows densely in front. A row
that outgrows its bank moves to the next one, so one long row never makes the others pay: each decode step
reads, per bank, as much as the bank's own longest row needs (a recorded one, all that it has room for). A
finished row leaves its bank as a tight copy, from which a probe or another rollout of the same prompt can
start. A token is copied a few times in its life, and read at every step.

Shape suffixes: K key-value heads, D head size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rexrag.engine.attention import Heads, hidden_states
from rexrag.engine.sampling.decoder import fixed_angles
from rexrag.errors import ModelError

GROWTH = 1.3
"""Capacity of a bank relative to the one below: bounds what a short row pays for a longer neighbour."""
GRAIN = 32
"""Capacities are multiples of this,"""
RECORDED_GRAIN = 256
"""or of this where decode steps are recorded, so that they are few."""
KEPT_BYTES = 2 << 30
"""Banks without rows stay for their recordings, up to so many bytes in all."""


@dataclass(eq=False, slots=True)
class Row:
    """One sequence in the cache: its first `length` tokens are there."""

    length: int = 0
    bank: Bank[Any] | None = None
    slot: int = -1
    saved: Tensor | None = None
    """[2, layers, K, length, D] once it has left its bank."""


R = TypeVar("R", bound=Row)


class Bank(Generic[R]):
    """Rows of one capacity. `rows[i]` owns slot i."""

    def __init__(self, shape: CacheShape, capacity: int, room: int) -> None:
        self.shape, self.capacity = shape, capacity
        self.rows: list[R] = []
        # Zeros, not garbage: a masked position still meets its value, as 0 · value.
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
        """Give a slot back; the last row takes it."""
        last = self.rows.pop()
        if slot != len(self.rows):
            self.kv[:, :, slot, :, : last.length] = self.kv[:, :, last.slot, :, : last.length]
            self.rows[slot] = last
            last.slot = slot

    def view(self, row: R) -> Tensor:
        return self.kv[:, :, row.slot, :, : row.length]


class _Shapes:
    """A plan that looks at what each layer would cache."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, heads: Heads) -> Tensor:
        self.kv[layer] = key, value
        return torch.zeros_like(query).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class CacheShape:
    layers: int
    heads: int
    size: int
    dtype: torch.dtype
    device: torch.device
    recorded: bool = False
    """Decode steps are recorded (`recorded.py`) for a bank where it lies: banks are few, and stay."""

    @classmethod
    def of(cls, model: nn.Module) -> CacheShape:
        """Measured on one token. Raises ModelError where layers or keys and values differ in shape."""
        seen = _Shapes()
        with torch.inference_mode():
            ids = torch.zeros(1, dtype=torch.long, device=next(model.parameters()).device)
            hidden_states(model, ids, ids, seen)
        first = seen.kv[0][0] if sorted(seen.kv) == list(range(len(seen.kv))) and seen.kv else None
        if first is None or any(x.shape != first.shape for pair in seen.kv.values() for x in pair):
            raise ModelError(f"{type(model).__name__}: its layers, or their keys and values, differ in shape")
        recorded = first.device.type == "cuda" and fixed_angles(model.base_model)
        return cls(len(seen.kv), first.shape[1], first.shape[3], first.dtype, first.device, recorded)

    def tensor(self, values: object) -> Tensor:
        return torch.as_tensor(values, device=self.device)

    def zeros(self, rows: int, capacity: int) -> Tensor:
        shape = (2, self.layers, rows, self.heads, capacity, self.size)
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        # numpy asks for zeroed pages and gets them when they are touched; torch writes every zero at once.
        size = math.prod(shape) * self.dtype.itemsize
        return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(self.dtype).view(shape)


class Cache(Generic[R]):
    """All banks of a session."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self.banks: dict[int, Bank[R]] = {}

    @property
    def live(self) -> int:
        """Rows in banks."""
        return sum(len(bank.rows) for bank in self.banks.values())

    def reserve(self, row: R, length: int, expected: int = 0) -> None:
        """Make room for `length` tokens, moving the row to a larger bank where needed.

        expected: rows that a new bank should have room for.
        """
        old = row.bank
        if old is not None and old.capacity >= length:
            return
        capacity = capacity_for(length, RECORDED_GRAIN if self.shape.recorded else GRAIN)
        bank = self.banks.get(capacity)
        if bank is None:
            # Rows of a step grow together: where one outgrows its bank, the others are about to.
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
        """Copy the first `length` tokens of another row, live or saved, into this new one."""
        self.reserve(row, length, expected)
        kept = source.saved if source.bank is None else source.bank.view(source)
        assert kept is not None and row.bank is not None
        row.length = length
        row.bank.view(row).copy_(kept[..., :length, :])

    def save(self, row: R) -> None:
        """Take a row out of its bank, as a tight copy."""
        if row.bank is not None:
            row.saved = row.bank.view(row).clone()
            self._free(row.bank, row.slot)
            row.bank, row.slot = None, -1

    def _free(self, bank: Bank[R], slot: int) -> None:
        bank.free(slot)
        empty = sum(other.kv.nbytes for other in self.banks.values() if not other.rows)
        if not bank.rows and not (self.shape.recorded and empty <= KEPT_BYTES):
            del self.banks[bank.capacity]


def capacity_for(length: int, grain: int = GRAIN) -> int:
    """The smallest bank capacity that holds `length` tokens."""
    capacity = 2 * grain
    while capacity < length:
        capacity = -(-int(capacity * GROWTH) // grain) * grain
    return capacity

"""Attention of new tokens to cached ones: one kernel call for all rows of a bank.

Rows that sample append one token each, or a few with speculative ones; all slots of the bank take part, so
nothing is copied. Rows with a prompt, evidence or a cue append a block of tokens: their queries are padded to
the longest row of the block, and their keys and values are copied.

Shape suffixes: N packed tokens, H query heads, K key-value heads, D head size, G = H / K, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rexrag.engine.attention import LayerAttention, attend_grouped
from rexrag.engine.sampling.cache import Bank, CacheRow


@dataclass(slots=True)
class Group:
    """Rows of one bank and the tokens that they append: packed tokens start:stop, row after row."""

    bank: Bank[Any]
    start: int
    stop: int
    places: Tensor
    """Flat (slot, head, position) indices of the new keys."""
    slots: Tensor | None
    """Slots of the rows; None where these are the first slots of the bank in order."""
    visible: Tensor
    """How many positions each query sees: [rows of the bank, 1], or [R, n] for several tokens a row."""
    longest: int
    """Positions of the longest row after appending."""
    plain: bool
    """No mask is needed: one token a row and all rows equally long, or rows without cached tokens."""
    padded: tuple[Tensor, Tensor] | None = None
    """For several tokens a row: the packed token of each query [R, n], and the query of each packed token."""
    copied: bool = False
    """Attend to a copy of the rows' keys and values. False: to all slots of the bank, in place."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, tokens: Sequence[Tensor], settings: LayerAttention) -> Tensor:
        """Queries, keys and values of all packed tokens, [N, settings, D] each -> [stop − start, H, D]."""
        query, key, value = (x[self.start : self.stop] for x in tokens)
        for cached, new in zip(self.bank.flat[layer], (key, value), strict=True):
            cached.index_copy_(0, self.places, new.reshape(-1, new.shape[-1]).to(cached.dtype))
        keys, values = (x[layer][..., : self.longest, :] for x in (self.bank.keys, self.bank.values))
        in_place = self.padded is not None and not self.copied
        mask = self._mask(settings.window, query, query.shape[1] // key.shape[1] if in_place else 1)
        if self.padded is None:
            return self._one_token(query, keys, values, mask, settings.scale)
        queries, back = self.padded
        if in_place:
            return self._few_tokens(query[queries], keys, values, mask, settings.scale)[back]
        assert self.slots is not None
        keys, values = keys.index_select(0, self.slots), values.index_select(0, self.slots)
        out = attend_grouped(query[queries].transpose(1, 2), keys, values, mask, mask is None, settings.scale)
        return out.transpose(1, 2).flatten(0, 1)[back]

    def _one_token(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        n, q_heads, size = query.shape
        rows = n if self.slots is None else len(self.bank.rows)
        # The G query heads of a key head take the dimension of query positions, so no key is repeated.
        grouped = query.reshape(n, keys.shape[1], -1, size)
        if self.slots is not None:  # all rows of the bank compute; the results of the others are dropped
            grouped = grouped.new_zeros(rows, *grouped.shape[1:]).index_copy_(0, self.slots, grouped)
        out = nn.functional.scaled_dot_product_attention(
            grouped, keys[:rows], values[:rows], mask, scale=scale
        )
        return (out if self.slots is None else out[self.slots]).reshape(n, q_heads, size)

    def _few_tokens(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        """query [R, n, H, D] of the bank's R rows -> [R · n, H, D]."""
        rows, n, q_heads, size = query.shape
        k_heads = keys.shape[1]
        # As above: the G query heads of all n tokens take the dimension of query positions.
        grouped = query.view(rows, n, k_heads, -1, size).transpose(1, 2).reshape(rows, k_heads, -1, size)
        out = nn.functional.scaled_dot_product_attention(
            grouped, keys[:rows], values[:rows], mask, scale=scale
        )
        return out.view(rows, k_heads, n, -1, size).transpose(1, 2).reshape(rows * n, q_heads, size)

    def _mask(self, window: int | None, like: Tensor, each: int) -> Tensor | None:
        """Additive mask [rows, 1, queries · each, longest], made once for all layers, or None."""
        if window is not None and window >= self.longest:
            window = None
        if window is None and self.plain:
            return None
        if window not in self.masks:
            visible = self.visible if each == 1 else self.visible.repeat_interleave(each, dim=1)
            end = visible[:, :, None]
            position = torch.arange(self.longest, device=like.device)
            hidden = position >= end
            if window is not None:
                hidden |= position < end - window
            zeros = like.new_zeros(hidden.shape)
            self.masks[window] = zeros.masked_fill_(hidden, float("-inf"))[:, None]
        return self.masks[window]


@dataclass(slots=True)
class CachedPlan:
    """Attention of one forward over cached rows: its groups in packed order."""

    groups: Sequence[Group]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: LayerAttention
    ) -> Tensor:
        """See `attention.AttentionPlan`."""
        tokens = [x[0].transpose(0, 1) for x in (query, key, value)]
        out = [group.attend(layer, tokens, settings) for group in self.groups]
        return (out[0] if len(out) == 1 else torch.cat(out))[None]


def append_one(bank: Bank[Any], rows: Sequence[CacheRow], start: int) -> Group:
    """Rows of a bank that append one token each."""
    slots = np.array([row.slot for row in rows])
    positions = np.array([row.length for row in rows])
    longest = int(positions.max()) + 1
    lengths = np.full(len(bank.rows), longest)
    lengths[slots] = positions + 1
    tensor = bank.shape.tensor
    return Group(
        bank=bank,
        start=start,
        stop=start + len(rows),
        places=tensor(_places(bank, slots, positions)),
        slots=None if len(rows) == len(bank.rows) else tensor(slots),
        visible=tensor(lengths[:, None]),
        longest=longest,
        plain=int(lengths.min()) == longest,
    )


def append_block(bank: Bank[Any], rows: Sequence[CacheRow], counts: Sequence[int], start: int) -> Group:
    """Rows of a bank that append `counts` tokens each, from copies of their keys and values."""
    slots, before = (np.array(x) for x in zip(*((row.slot, row.length) for row in rows), strict=True))
    return _several(bank, slots, before, np.array(counts), start, copied=True)


def append_few(bank: Bank[Any], rows: Sequence[CacheRow], counts: Sequence[int], start: int) -> Group:
    """Rows of a bank, in slot order, that append a few tokens each; all rows of the bank take part."""
    slots = [row.slot for row in rows]
    before, sizes = np.zeros((2, len(bank.rows)), dtype=np.int64)
    before[slots], sizes[slots] = [row.length for row in rows], counts
    return _several(bank, np.arange(len(bank.rows)), before, sizes, start, copied=False)


def _several(bank: Bank[Any], slots: Any, before: Any, sizes: Any, start: int, copied: bool) -> Group:
    """Rows in `slots`, with `before` cached tokens, that append `sizes` tokens."""
    width, total, firsts = int(sizes.max()), int(sizes.sum()), sizes.cumsum() - sizes
    # A padded query repeats the row's last one; a row that appends nothing takes another row's.
    step = np.minimum(np.arange(width), sizes[:, None] - 1).clip(min=0)
    real = np.arange(width) < sizes[:, None]
    row, offset = real.nonzero()
    tensor = bank.shape.tensor
    return Group(
        bank=bank,
        start=start,
        stop=start + total,
        places=tensor(_places(bank, slots[row], before[row] + offset)),
        slots=tensor(slots) if copied else None,
        visible=tensor(before[:, None] + step + 1),
        longest=int((before + sizes).max()),
        plain=copied and not before.any(),
        padded=(tensor((firsts[:, None] + step).clip(max=total - 1)), tensor(real.reshape(-1).nonzero()[0])),
        copied=copied,
    )


def _places(bank: Bank[Any], slots: Any, positions: Any) -> Any:
    """Flat indices of the keys of tokens: slots and positions [n] -> [n * K]."""
    heads = np.arange(bank.shape.heads)
    places = (slots[:, None] * bank.shape.heads + heads) * bank.capacity + positions[:, None]
    return places.reshape(-1)

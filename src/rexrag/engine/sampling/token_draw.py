"""Token draws by inverse transform sampling, with one uniform number for each (seed, row, position).

The numbers come from a counter-based hash (the SplitMix64 finaliser, Steele, Lea & Flood 2014). They depend
on nothing but a row's own key and position, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rexrag.engine.attention import CHUNK_LOGITS, scaled_logits

BLOCK = 256
"""Tokens in a block of the vocabulary."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def streams(seed: int | Sequence[int], salts: Sequence[int]) -> list[int]:
    """A key of random numbers for each place 0 … n−1 under a seed; another `salts[i]` is another stream.

    Several seeds, one for each key, take the part of the places.
    """
    seeds = [seed] * len(salts) if isinstance(seed, int) else seed
    places = np.arange(len(salts)) if isinstance(seed, int) else np.zeros(len(salts), dtype=np.int64)
    mixed = _mix(np.array([one % 2**64 for one in seeds], dtype=np.uint64) + _GOLDEN)
    for part in (places, np.array(salts)):
        mixed = _mix(mixed + (part.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    keys: list[int] = mixed.tolist()
    return keys


def uniforms(keys: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """A number in [0, 1) with 53 random bits for each (key, position) pair: float64 [M]."""
    at = (np.array(positions, dtype=np.uint64) + np.uint64(1)) * _GOLDEN
    bits = _mix(np.array(keys, dtype=np.uint64) + at) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def draw_tokens(
    head: nn.Module, hidden: Tensor, temperature: float, uniform: Tensor, counts: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """hidden [R, hidden], uniform float64 [M] -> token ids long [M], natural log-probs float32 [M].

    counts: how many of the M draws, in order, come from each of the R distributions; default one each.
    Temperature 0 takes the likeliest token and reports its log-prob at temperature 1.
    """
    size = max(1, CHUNK_LOGITS // int(head.out_features))  # type: ignore[arg-type]
    each = np.array(counts or [1] * len(hidden))
    parts = []
    end = 0
    for start in range(0, len(hidden), size):
        some = each[start : start + size]
        first, end = end, end + int(some.sum())
        row = torch.as_tensor(np.arange(len(some)).repeat(some), device=hidden.device)
        parts.append(_draw(head(hidden[start : start + size]), temperature, uniform[first:end], row))
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([logps for _, logps in parts])


def _draw(logits: Tensor, temperature: float, uniform: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(scaled_logits(logits, temperature), dim=-1)
    if temperature == 0.0:
        token = logp.argmax(dim=-1)[row]
    else:
        token = invert(logp.exp(), uniform[:, None], row)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return token, logp[row, token]


def invert(probs: Tensor, uniform: Tensor, row: Tensor) -> Tensor:
    """Inverse of the distribution function: probs [R, V], uniform [M, 1], row long [M] -> outcome [M, 1].

    First the block is found, then the outcome in it, because a running sum over a large vocabulary is slow.
    Sums are in float64, because rounding would shift mass between rare tokens.
    """
    short = -probs.shape[1] % BLOCK
    blocks = (nn.functional.pad(probs, (0, short)) if short else probs).view(len(probs), -1, BLOCK)
    mass = blocks.sum(dim=-1, dtype=torch.float64)[row]
    scaled = uniform * mass.sum(dim=-1, keepdim=True)
    block, before = find(mass, scaled)
    inside = blocks[row, block[:, 0]].double()
    outcome, _ = find(inside, scaled - before)
    return block * BLOCK + outcome


def find(mass: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of `mass` [M, W] passes `point` [M, 1]: index and sum before it, [M, 1]."""
    reached = mass.cumsum(dim=-1)
    total = reached[:, -1:]
    # Clamped to [0, total), so that an outcome of probability 0 is never drawn.
    point = torch.minimum(point.clamp(min=0.0), torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(reached, point, right=True).clamp_(max=mass.shape[1] - 1)
    return index, reached.gather(1, index) - mass.gather(1, index)

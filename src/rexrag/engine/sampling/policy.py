"""The local policy: a Hugging Face causal language model that rolls out episodes and scores rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rexrag.agent.episode import Codec
from rexrag.engine.attention import LayerAttention
from rexrag.engine.learning.packing import TokenRow, pack_rows
from rexrag.engine.sampling.cache import CacheShape
from rexrag.engine.sampling.decoder import layer_attention
from rexrag.engine.sampling.sampler import SAVED_BYTES, LocalSession

SCORE_TOKENS = 8192
"""Tokens in one forward of `score`."""


class LocalPolicy:
    """See `engine.base.Policy`. `model` has packed attention, as `loading.load_model` returns it.

    A policy on the learner's own model uses the updated weights at once.
    """

    def __init__(
        self, model: nn.Module, codec: Codec, saved_bytes: int = SAVED_BYTES, autocast: bool = False
    ) -> None:
        """autocast: `score` under bfloat16 autocast, as a learner with autocast does."""
        self.model = model.eval()
        self._autocast = autocast
        self._codec = codec
        self._shape = CacheShape.of(model)
        self._saved_bytes = saved_bytes

    @property
    def codec(self) -> Codec:
        return self._codec

    @property
    def window(self) -> int | None:
        """Positions that the model was trained for; None where its configuration does not say."""
        model: Any = self.model
        config = model.config.get_text_config()
        window = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if not window or window < 0 or rope.get("rope_type", "default") != "default":
            return None  # scaled rotary positions reach further, by a rule that differs by kind
        return int(window)

    @cached_property
    def _settings(self) -> list[LayerAttention] | None:
        return layer_attention(self.model)

    def session(self) -> LocalSession:
        return LocalSession(self.model, self._shape, self._settings, self._saved_bytes)

    @torch.no_grad()
    def score(self, rows: Sequence[TokenRow], temperature: float) -> list[Tensor]:
        """See `engine.base.Policy.score`. Packed, without padding; temperature 0 scores at 1."""
        scores = [torch.zeros(0)] * len(rows)
        for pack in pack_rows(rows, range(len(rows)), SCORE_TOKENS):
            with torch.autocast(self._shape.device.type, torch.bfloat16, enabled=self._autocast):
                logps = pack.logps(self.model, temperature).cpu()
            start = 0
            for index in pack.rows:
                stop = start + len(rows[index][1])
                scores[index] = logps[start:stop].clone()
                start = stop
        return scores

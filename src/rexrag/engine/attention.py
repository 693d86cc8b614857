"""Attention over packed rows: many rows of different lengths in one forward, without padding.

A Hugging Face decoder runs on one "sequence" [1, N] that holds the tokens of all rows with their own
positions. Everything but attention works on single tokens, so only attention must know where rows begin. An
`AttentionPlan` says so. It is passed through the model's own forward as a keyword argument to the attention
function registered here. Without a plan that function is the library's scaled-dot-product attention.

Shape suffixes: N packed tokens, R rows, H query heads, K key-value heads, D head size, L key positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rexrag.errors import ModelError

ATTENTION = "rexrag-packed"


class AttentionPlan(Protocol):
    """Which tokens attend to which in one forward."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: LayerAttention
    ) -> Tensor:
        """query [1, H, N, D], key and value [1, K, N, D] -> [1, N, H, D]."""
        ...


class LayerAttention(NamedTuple):
    """Attention settings of one layer."""

    scale: float
    """Factor of the scores."""
    window: int | None
    """Positions that a query sees, its own among them; None: all."""


@dataclass
class Masks:
    """Additive masks of one forward, shared by its layers."""

    made: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def causal(self, n: int, length: int, window: int | None, like: Tensor) -> Tensor:
        """[n, length]: mask of the last n of `length` positions; -inf where a position is not seen."""
        key = (n, length, window)
        if key not in self.made:
            last = torch.arange(length - n, length, device=like.device)[:, None]
            position = torch.arange(length, device=like.device)
            hidden = position > last
            if window is not None:
                hidden |= position <= last - window
            self.made[key] = like.new_zeros(n, length).masked_fill_(hidden, float("-inf"))
        return self.made[key]


def attend_causal(
    query: Tensor, key: Tensor, value: Tensor, settings: LayerAttention, masks: Masks
) -> Tensor:
    """query [1, H, n, D] at the last n of the L positions of key and value [1, K, L, D] -> [1, H, n, D]."""
    n, length = query.shape[2], key.shape[2]
    windowed = settings.window is not None and length > settings.window
    plain = n == length and not windowed
    mask = None if plain or (n == 1 and not windowed) else masks.causal(n, length, settings.window, query)
    return attend_grouped(query, key, value, mask, plain and n > 1, settings.scale)


def attend_grouped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """query [R, H, n, D], key and value [R, K, L, D], mask additive or None -> [R, H, n, D]."""
    if query.is_cuda:  # fused CUDA kernels take grouped heads only without a mask
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=True
    )


class PrefixNode(NamedTuple):
    """The next `size` tokens of a pack, as a node of the prefix tree of its rows."""

    size: int
    parent: int | None = None
    """Index of the node before it in its rows. Tokens see their own node and all its ancestors."""


@dataclass
class PackedPlan:
    """Rows without a cache, for scoring and training. The nodes cover the pack in order."""

    nodes: Sequence[PrefixNode]
    masks: Masks = field(default_factory=Masks)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: LayerAttention
    ) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            # The CPU kernel's backward pass is up to twice as slow in bfloat16 as in float32. Scoring does
            # the same, so that its log-probs equal those of training.
            with torch.autocast("cpu", enabled=False):
                return self._attend(query.float(), key.float(), value.float(), settings)
        return self._attend(query, key, value, settings)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, settings: LayerAttention) -> Tensor:
        # Split, not sliced: the gradient of each slice would be as large as the pack.
        sizes = [node.size for node in self.nodes]
        parts = [torch.split_with_sizes(x, sizes, dim=2) for x in (query, key, value)]
        out = []
        seen: list[tuple[Tensor, Tensor]] = []
        for (_, parent), own, keys, values in zip(self.nodes, *parts, strict=True):
            if parent is not None:
                keys = torch.cat([seen[parent][0], keys], dim=2)
                values = torch.cat([seen[parent][1], values], dim=2)
            seen.append((keys, values))
            out.append(attend_causal(own, keys, values, settings, self.masks))
        return torch.cat(out, dim=2).transpose(1, 2)


UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments that change attention scores (soft-capping, sinks, biases), which no plan supports."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The signature of a transformers attention function; `plan` among the keyword arguments."""
    plan: AttentionPlan | None = kwargs.pop("plan", None)
    if plan is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    extra = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if extra:
        raise ModelError(f"{type(module).__name__}: attention with {', '.join(extra)} is not supported")
    scale: float | None = kwargs.get("scaling")
    settings = LayerAttention(
        query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("sliding_window")
    )
    layer: int = module.layer_idx  # type: ignore[assignment]
    return plan.attend(layer, query, key, value, settings), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def hidden_states(model: nn.Module, ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
    """Last hidden state of each packed token: ids, positions long [N] -> [N, hidden]."""
    mask = torch.zeros(1, 1, 1, 1, device=ids.device)  # with a 4-D mask the model does not build its own
    decoder = model.base_model
    out = decoder(  # type: ignore[operator]
        input_ids=ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False, plan=plan
    )
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def use_packed_attention(model: Any) -> None:
    """Switch a Hugging Face causal LM to packed attention and compare logits with its own forward.

    The test is two rows that share a prompt. Raises ModelError for an architecture whose attention cannot be
    replaced, or that changes its logits after the head.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    rows = [[7 * i * i % vocabulary for i in range(j, j + 12)] for j in (1, 1)]
    rows[1][8:] = [token * 5 % vocabulary for token in rows[1][8:]]
    device = model.device
    prompt, first, second = rows[0][:8], rows[0][8:], rows[1][8:]
    ids = torch.tensor([*prompt, *first, *second], device=device)
    positions = torch.tensor([*range(12), *range(8, 12)], device=device)
    try:
        with torch.inference_mode():
            own = model(input_ids=torch.tensor(rows, device=device), use_cache=False).logits.float()
            model.set_attn_implementation(ATTENTION)
            plan = PackedPlan([PrefixNode(8), PrefixNode(4, parent=0), PrefixNode(4, parent=0)])
            packed = model.get_output_embeddings()(hidden_states(model, ids, positions, plan)).float()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{type(model).__name__}: cannot run packed attention: {error}") from None
    expected = torch.cat([own[0], own[1, 8:]])
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not torch.allclose(packed, expected, atol=tolerance * float(expected.abs().max()), rtol=0.0):
        raise ModelError(
            f"{type(model).__name__}: packed attention gives other logits than the model's own forward; "
            "this architecture is not supported by the local engine"
        )


def token_logps(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Natural log-probability of each target: hidden [M, hidden], targets long [M] -> float32 [M].

    Temperature 0 (greedy) is scored at 1. The head runs in chunks and is recomputed in the backward pass, so
    that [M, vocabulary] is never in memory as a whole.
    """
    if not len(targets):
        return hidden.new_zeros(0, dtype=torch.float32)
    vocabulary = int(head.out_features)  # type: ignore[arg-type]
    size = max(1, CHUNK_LOGITS // vocabulary)
    if len(targets) <= size:
        return _logps(head, hidden, targets, temperature)
    parts = [slice(start, start + size) for start in range(0, len(targets), size)]
    return torch.cat(
        [checkpoint(_logps, head, hidden[p], targets[p], temperature, use_reentrant=False) for p in parts]
    )


CHUNK_LOGITS = 1 << 25
"""Most logits in memory at once (128 MiB in float32)."""


def scaled_logits(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32, divided by the temperature; temperature 0 (greedy) does not change them."""
    logits = logits.float()
    return logits / temperature if temperature not in (0.0, 1.0) else logits


def _logps(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logp = torch.log_softmax(scaled_logits(head(hidden), temperature), dim=-1)
    return logp.gather(1, targets[:, None])[:, 0]

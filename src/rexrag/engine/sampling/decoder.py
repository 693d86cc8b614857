"""A forward of Llama-like decoders for sampling: the same hidden states from fewer operations.

In a decode step of a few rows, the call of an operation takes longer than its arithmetic. Here queries, keys
and values are one matrix product, gate and up projections another; the residual is added by the product; the
rotary embedding is three operations on tables. `layer_attention` compares the hidden states with the model's
own forward; a model of another family, or with other hidden states, runs its own forward.

Shape suffixes: N packed tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rexrag.engine.attention import AttentionPlan, LayerAttention, PackedPlan, PrefixNode, hidden_states
from rexrag.engine.sampling.cpu_weights import COPIED_BYTES, Product, product

FAMILIES = ("llama", "mistral", "qwen2")
"""Model types (`config.model_type`) that the fused decoder serves."""
ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position only."""
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest median distance from the model's own hidden states, relative to their norm.

The median, because rounding errors can grow large in a few tokens."""
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


class FusedDecoder:
    """A decoder on merged copies of its weights. Not valid after the weights change."""

    def __init__(self, body: Any, settings: Sequence[LayerAttention]) -> None:
        """body: a causal language model's `base_model`. Raises ValueError, AttributeError: see `_check`."""
        self._body = body
        _check(body)
        self._layers = [_Layer(layer, h) for layer, h in zip(body.layers, settings, strict=True)]
        self._tables: tuple[Tensor, Tensor] = (body.norm.weight.new_zeros(0, 0),) * 2

    def __call__(self, ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """Last hidden state of each packed token: ids, positions long [N] -> [N, hidden]."""
        self.tabulate(int(positions.max()) + 1)
        return self.run(ids, positions, plan)

    def run(self, ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """The same without waiting for the device. `tabulate` must have been called for these positions."""
        turning = self._layers[0].turning // self._layers[0].size
        cos, sin = (x.index_select(0, positions).repeat(1, turning) for x in self._tables)
        x = self._body.embed_tokens(ids)
        for index, layer in enumerate(self._layers):
            x = layer(x, cos, sin, plan, index)
        return _norm(self._body.norm, x)

    def tabulate(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of at least the first `count` positions, [positions, D] each."""
        if count > len(self._tables[0]):
            weight = self._body.norm.weight
            cos, sin = self._body.rotary_emb(weight, torch.arange(2 * count, device=weight.device)[None])
            half = cos.shape[-1] // 2
            self._tables = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
        return self._tables


class _Layer:
    """One decoder layer: attention, then gate, up and down, each after its norm and beside a residual."""

    def __init__(self, layer: Any, settings: LayerAttention) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.settings, self.size = settings, int(attention.head_dim)
        self.queries = attention.q_proj.out_features
        self.turning = self.queries + attention.k_proj.out_features
        """Columns of queries and keys, which the rotary embedding turns; those of values follow."""
        columns = torch.arange(self.turning, device=attention.q_proj.weight.device)
        self.swap = columns.view(-1, 2, self.size // 2).flip(1).reshape(-1)
        """The column that each column is rotated with: half a head away."""
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = _merged(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _merged(attention.o_proj)
        self.gate_up, self.down = _merged(mlp.gate_proj, mlp.up_proj), _merged(mlp.down_proj)
        self.act = mlp.act_fn

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, index: int) -> Tensor:
        n = len(x)
        y = self.qkv(_norm(self.norms[0], x))
        turned = (y[:, : self.turning] * cos).addcmul_(y.index_select(1, self.swap), sin)
        parts = turned[:, : self.queries], turned[:, self.queries :], y[:, self.turning :]
        query, key, value = (part.view(n, -1, self.size).transpose(0, 1)[None] for part in parts)
        attended = plan.attend(index, query, key, value, self.settings)
        x = self.out(attended.reshape(n, -1), x)
        gate, up = self.gate_up(_norm(self.norms[1], x)).chunk(2, dim=-1)
        return self.down(self.act(gate).mul_(up), x)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _merged(*linears: nn.Linear) -> Product:
    """One matrix product for several linear layers of the same input."""
    if len(linears) == 1:
        return product(linears[0].weight, linears[0].bias)
    biases = [layer.bias.detach() for layer in linears if layer.bias is not None]
    if len(biases) not in (0, len(linears)):
        raise ValueError("biases of some layers of the same input")
    weight = torch.cat([layer.weight.detach() for layer in linears])
    return product(weight, torch.cat(biases) if biases else None)


def fixed_angles(body: Any) -> bool:
    """Whether rotary angles depend on the position only. Others wait for a value from the device."""
    return getattr(getattr(body, "rotary_emb", None), "rope_type", None) in ROPES


def _check(body: Any) -> None:
    """Raises ValueError for a model that is not served, AttributeError for a part that is missing."""
    if body.config.model_type not in FAMILIES or not fixed_angles(body):
        raise ValueError("another family, or angles that depend on more than the position")
    linears = [getattr(layer.self_attn, name) for layer in body.layers for name in _ATTENTION]
    linears += [getattr(layer.mlp, name) for layer in body.layers for name in _MLP]
    norms = [n for layer in body.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    parts = (*linears, *norms, body.norm, body.embed_tokens)
    known = {id(parameter) for part in parts for parameter in part.parameters()}
    if any(id(p) not in known for p in body.parameters()) or any(type(x) is not nn.Linear for x in linears):
        raise ValueError("other parts")
    # The sampler also copies the head, which has the size of the embedding.
    if sum(part.weight.nbytes for part in (*linears, body.embed_tokens)) > COPIED_BYTES:
        raise ValueError("too large to copy")


class _Observer(PackedPlan):
    """A plan that keeps the attention settings of each layer."""

    def __init__(self, segments: Sequence[PrefixNode]) -> None:
        super().__init__(segments)
        self.settings: dict[int, LayerAttention] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: LayerAttention
    ) -> Tensor:
        self.settings[layer] = settings
        return super().attend(layer, query, key, value, settings)


@torch.inference_mode()
def layer_attention(model: Any) -> list[LayerAttention] | None:
    """Attention settings of each layer, for `FusedDecoder`; None where the model must run its own forward."""
    body, device = model.base_model, model.device
    ids = torch.arange(24, device=device) * 7 % model.get_input_embeddings().num_embeddings
    positions = torch.cat([torch.arange(start, start + 12, device=device) for start in (0, 40)])
    plan = _Observer([PrefixNode(12), PrefixNode(12)])
    try:
        _check(body)
        own = hidden_states(model, ids, positions, plan).float()
        settings = [plan.settings[layer] for layer in sorted(plan.settings)]
        fused = FusedDecoder(body, settings)(ids, positions, plan).float()
    except (AttributeError, ValueError):
        return None
    far = torch.linalg.vector_norm(fused - own, dim=-1) / torch.linalg.vector_norm(own, dim=-1)
    return settings if bool(far.median() <= TOLERANCE[model.dtype]) else None

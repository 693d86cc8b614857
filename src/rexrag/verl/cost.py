"""Memory of a GPU: arithmetic from a stated model, nothing measured.

Every assumption is a named constant here. Sizes are bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rexrag.config.schema import Config
from rexrag.engine.precision import settled
from rexrag.errors import ConfigError, ModelError

GIB = 2.0**30
CONTEXT = 4.0 * GIB
"""CUDA and NCCL contexts, sleeping rollout engine, fragmentation."""
STATE_BYTES = 16
"""Of a trained parameter: float32 weight, gradient and two moments of AdamW."""
LOGIT_BYTES = 8
"""Of a token and vocabulary entry while a micro-batch trains: bfloat16, its float32 softmax, the gradient."""
LAYER_VALUES = 8
"""Values of hidden and of half the intermediate size that a recomputed layer holds for a token."""
SEQUENCES = 8
"""Full-length rollouts whose KV cache one engine has to hold at least."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder with gated feed-forward layers and grouped key-value heads."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    head_size: int = 0

    @property
    def head(self) -> int:
        return self.head_size or self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        attention = 2 * self.hidden * self.head * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Norms and biases are left out: less than a thousandth."""
        return self.layers * self.layer_parameters + self.embedding_parameters

    @property
    def kv_bytes(self) -> int:
        """Of a token's keys and values in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head * 2


KNOWN = {
    "Qwen2.5-0.5B": Shape(24, 896, 4864, 14, 2, 151936, True),
    "Qwen2.5-1.5B": Shape(28, 1536, 8960, 12, 2, 151936, True),
    "Qwen2.5-3B": Shape(36, 2048, 11008, 16, 2, 151936, True),
    "Qwen2.5-7B": Shape(28, 3584, 18944, 28, 4, 152064, False),
    "Qwen2.5-14B": Shape(48, 5120, 13824, 40, 8, 152064, False),
    "Qwen2.5-32B": Shape(64, 5120, 27648, 40, 8, 152064, False),
}
"""So that a dry run needs no download. Sizes from the models' own config.json."""


def shape_of(path: str) -> Shape:
    """The shape of a local model folder or of a model in `KNOWN`. Raises ModelError."""
    file = Path(path).expanduser() / "config.json"
    if file.is_file():
        tree = json.loads(file.read_text(encoding="utf-8"))
        heads = int(tree["num_attention_heads"])
        return Shape(
            int(tree["num_hidden_layers"]),
            int(tree["hidden_size"]),
            int(tree["intermediate_size"]),
            heads,
            int(tree.get("num_key_value_heads") or heads),
            int(tree["vocab_size"]),
            bool(tree.get("tie_word_embeddings", False)),
            int(tree.get("head_dim") or 0),
        )
    name = path.rsplit("/", 1)[-1].removesuffix("-Instruct")
    if name not in KNOWN:
        raise ModelError(
            f"policy.path = '{path}': not a folder with a config.json, and its shape is not known; "
            f"known: {', '.join(KNOWN)}"
        )
    return KNOWN[name]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one GPU. `training` and `rollout` are the two phases' totals, the rest their parts."""

    state: float
    gathered: float
    activations: float
    logits: float
    resident: float
    """Training state that stays while the rollout engine works."""
    engine: float
    """What the rollout engine takes: weights and KV cache."""
    engine_weights: float

    @property
    def training(self) -> float:
        return CONTEXT + self.state + self.gathered + self.activations + self.logits

    @property
    def rollout(self) -> float:
        return CONTEXT + self.resident + self.engine


def memory(config: Config, shape: Shape) -> Memory:
    """Peak memory of one GPU in each phase."""
    verl, gpus = config.verl, config.verl.nodes * config.verl.gpus_per_node
    width = 2 if settled(config).policy.precision == "bfloat16" else 4
    rank = config.policy.lora_rank
    if rank:  # only the adapters have a gradient and moments
        per_layer = 2 * shape.hidden * shape.head * (shape.heads + shape.kv_heads) / shape.hidden
        adapters = (
            rank * shape.layers * (4 * shape.hidden + per_layer + 3 * shape.hidden + 3 * shape.intermediate)
        )
        state = (4 * shape.parameters + STATE_BYTES * adapters) / gpus
        resident = (4 * shape.parameters + 12 * adapters) / gpus
    else:
        state = STATE_BYTES * shape.parameters / gpus
        resident = 12 * shape.parameters / gpus
    tokens = verl.tokens_per_gpu
    layer = LAYER_VALUES * (shape.hidden + shape.intermediate / 2)
    return Memory(
        state=state,
        gathered=width * (2 * shape.layer_parameters + shape.embedding_parameters) if gpus > 1 else 0.0,
        activations=width * tokens * (shape.layers * shape.hidden + layer),
        logits=LOGIT_BYTES * tokens * shape.vocabulary,
        resident=0.0 if verl.offload else resident,
        engine=verl.rollout_memory * verl.gpu_memory * GIB,
        engine_weights=2 * shape.parameters / verl.tensor_parallel,
    )


def check_memory(config: Config, shape: Shape) -> Memory:
    """Raises ConfigError with one line where a phase does not fit."""
    verl, needed = config.verl, memory(config, shape)
    limit = verl.gpu_memory * GIB
    if needed.training > limit:
        raise ConfigError(
            f"training takes {needed.training / GIB:.1f} GiB of a GPU, "
            f"verl.gpu_memory = {verl.gpu_memory:g}: "
            f"{needed.state / GIB:.1f} state, {needed.logits / GIB:.1f} logits, "
            f"{needed.activations / GIB:.1f} activations; more GPUs, a smaller verl.tokens_per_gpu, or "
            "policy.lora_rank"
        )
    cache = needed.engine - needed.engine_weights
    wanted = SEQUENCES * config.agent.total_tokens * shape.kv_bytes / verl.tensor_parallel
    if cache < wanted:
        raise ConfigError(
            f"the rollout engine gets {needed.engine / GIB:.1f} GiB, its weights take "
            f"{needed.engine_weights / GIB:.1f}, and {SEQUENCES} rollouts need {wanted / GIB:.1f} for their "
            "caches; raise verl.rollout_memory or verl.tensor_parallel"
        )
    if needed.rollout > limit:
        raise ConfigError(
            f"rollouts take {needed.rollout / GIB:.1f} GiB of a GPU, verl.gpu_memory = {verl.gpu_memory:g}: "
            f"{needed.engine / GIB:.1f} engine, {needed.resident / GIB:.1f} training state; lower "
            "verl.rollout_memory or set verl.offload = true"
        )
    return needed

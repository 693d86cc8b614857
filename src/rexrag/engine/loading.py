"""From configuration to a policy and a learner. Safetensors only, and no code from model folders."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from rexrag.agent.codec import HFCodec, load_codec
from rexrag.config.schema import Config, PolicyConfig
from rexrag.engine import lora
from rexrag.engine.attention import use_packed_attention
from rexrag.engine.learning.learner import LocalLearner
from rexrag.engine.precision import DTYPES, precision_of, settled
from rexrag.engine.sampling.policy import LocalPolicy
from rexrag.engine.sources import EMBEDDED, choose_device, identity, resolve, tokenizer_source
from rexrag.errors import ConfigError, ModelError

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "choose_device",
    "choose_trained",
    "codec_of",
    "identity",
    "load_engine",
    "load_model",
    "load_policy",
    "precision_of",
    "resolve",
    "settled",
]


def load_policy(config: PolicyConfig) -> LocalPolicy:
    """A policy for rollouts and scores alone, in the configured precision. Raises ModelError, ConfigError."""
    model, folder = load_model(config)
    return LocalPolicy(model, codec_of(model, folder))


def load_engine(config: Config) -> tuple[LocalPolicy, LocalLearner]:
    """A policy and the learner that trains it. Raises ModelError, ConfigError.

    They share one model. A sampler in bfloat16 has a copy of the float32 master weights instead, which the
    learner updates after every step.
    """
    policy = config.policy
    precision = precision_of(policy)
    model, folder = load_model(policy, dtype=torch.float32)
    codec = codec_of(model, folder)
    choose_trained(model, policy, config.seed)
    mirror = _in_precision(model, precision.dtype) if precision.autocast else None
    learner = LocalLearner(
        model,
        config.learner,
        seed=config.seed,
        autocast=precision.autocast,
        reference=config.algorithm.kl > 0,
        mirror=mirror,
    )
    return LocalPolicy(model if mirror is None else mirror, codec), learner


def codec_of(model: Any, folder: str) -> HFCodec:
    """The tokenizer of a model. Raises ModelError where a text can have ids that the model does not know.

    Special tokens are never written, except those that end a turn; some models lack rows for them.
    """
    codec = load_codec(folder)
    special = {i for i, token in codec.tokenizer.added_tokens_decoder.items() if token.special}
    written = set(codec.tokenizer.get_vocab().values()) - special | codec.eos_ids
    known, largest = model.get_input_embeddings().num_embeddings, max(written, default=0)
    if largest >= known:
        raise ModelError(f"{folder}: its tokenizer has an id {largest}, its model {known} tokens")
    return codec


def _in_precision(model: Any, dtype: torch.dtype) -> Any:
    """A frozen copy of a model in another precision."""
    made = copy.deepcopy(model).requires_grad_(False)
    _convert(made, dtype)
    return made


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert parameters. Buffers keep their precision, as in a model that is loaded in `dtype`.

    The frequencies of rotary positions, rounded to bfloat16, are a radian off after a thousand tokens.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def load_model(config: PolicyConfig, dtype: torch.dtype | None = None) -> tuple[Any, str]:
    """(a transformers causal language model with packed attention, folder or id of its tokenizer).

    It lies on its device. `dtype` None takes the configured precision. An adapter is merged into its base.
    Raises ModelError with one line for a missing folder, weights that are pickled, damaged or incomplete, and
    architectures that the local engine cannot run; ConfigError for a device.
    """
    source = resolve(config.path)
    device = choose_device(config.device)
    model = _load(source, dtype or precision_of(config, device).dtype)
    model.to(device).eval()
    use_packed_attention(model)
    return model, tokenizer_source(source)


def _load(source: str, dtype: torch.dtype) -> Any:
    """A transformers model from a resolved folder or id, on the CPU. Raises ModelError."""
    folder = Path(source)
    if lora.is_adapter(folder):
        # Merged in float32: B · A is small beside W, and would be rounded away in bfloat16.
        model = lora.merge_adapter(_load(resolve(lora.base_of(folder)), torch.float32), folder)
        model.name_or_path = source  # a LoRA on top of it has this adapter as its base
        _convert(model, dtype)
        model.config.dtype = dtype
        return model
    try:
        with quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        missing = "" if folder.exists() else "no such folder, and from a hub: "
        raise ModelError(f"{source}: {missing}no usable causal language model: {reason[:300]}") from None
    if report["missing_keys"]:
        raise ModelError(f"{source}: the weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    return model


def choose_trained(model: Any, config: PolicyConfig, seed: int) -> None:
    """Let the configured weights require a gradient, and no others. Raises ConfigError."""
    rank, last = config.lora_rank, config.train_last_layers
    if rank and last:
        raise ConfigError("policy.lora_rank and policy.train_last_layers: choose one")
    if rank:
        lora.add_lora(model, rank, seed)
        return
    model.requires_grad_(not last)
    if not last:
        return
    body = model.base_model
    count = model.config.get_text_config().num_hidden_layers
    layers = next((m for m in body.children() if isinstance(m, nn.ModuleList) and len(m) == count), None)
    if layers is None:
        raise ConfigError(f"policy.train_last_layers: {type(model).__name__} has no list of decoder layers")
    if last > count:
        raise ConfigError(f"policy.train_last_layers = {last}: the model has {count} layers")
    # The final norm is the part beside the layers that holds vectors only.
    norms = [m for m in body.children() if [p.dim() for p in m.parameters()] in ([1], [1, 1])]
    for module in (*layers[-last:], *norms):
        module.requires_grad_(True)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or loading tables of transformers: what matters of them becomes a ModelError."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_level = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity(40)  # errors only: else a line for every retry
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()

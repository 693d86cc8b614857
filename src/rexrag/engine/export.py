"""Model folders: any checkpoint of the local engine as Hugging Face files, with a LoRA merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rexrag.agent.codec import load_codec
from rexrag.config.schema import PolicyConfig
from rexrag.engine.learning.checkpoint import full_weights, write_tensors
from rexrag.engine.loading import DTYPES, load_model
from rexrag.io import atomic_folder


def export_model(model: Any, codec: Any, folder: Path) -> None:
    """Write a model folder that `policy.path` can name: tokenizer and weights, with a LoRA merged in.

    `config.json` has the dtype of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = merged_weights(model)
    model.config.dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    write_tensors(folder / "model.safetensors", weights)
    model.config.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))
    codec.tokenizer.save_pretrained(str(folder))


def export_adapter(checkpoint: Path, out: Path, dtype: str = "") -> dict[str, Any]:
    """Write an adapter's base with the adapter merged in, as a model folder; `dtype` "" is float32.

    Returns facts: where from, parameters, dtype. Raises ModelError.
    """
    model, tokenizer = load_model(PolicyConfig(path=str(checkpoint), device="cpu"), dtype=torch.float32)
    with atomic_folder(out) as fresh:
        export_model(model.to(DTYPES[dtype or "float32"]), load_codec(tokenizer), fresh)
    count = sum(parameter.numel() for parameter in model.parameters())
    return {"from": str(checkpoint), "out": str(out), "parameters": count, "dtype": dtype or "float32"}


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights under the names of the plain architecture, with W + B·A where a LoRA stands beside W."""
    modules = dict(model.named_modules())
    merged = {}
    for name, tensor in full_weights(model).items():
        if "lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain != name and name.endswith(".weight"):
            layer: Any = modules[name.removesuffix(".base_layer.weight")]
            tensor = tensor + layer.get_delta_weight("default").to(tensor)
        merged[plain] = tensor
    return merged

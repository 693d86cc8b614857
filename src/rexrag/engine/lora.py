"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) in peft's own format.

A checkpoint of a LoRA is a folder with `adapter_config.json`, which names the base model, and
`adapter_model.safetensors`. peft and transformers load it as it is. Checkpoints of 0.1.0 have
`adapter.safetensors` instead, and their base in the run's `config.toml`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rexrag.config.files import read_toml
from rexrag.errors import ConfigError, ModelError
from rexrag.io import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD_WEIGHTS = "adapter.safetensors"
"""Weights of a LoRA in a checkpoint of 0.1.0, under the names of the model's parameters."""
SCALE = 2.0
"""alpha / rank of every LoRA that is trained here."""
PREFIX = "base_model.model."
"""Before every name in peft's files."""
SETTINGS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "bias",
    "lora_bias",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
"""Settings of `adapter_config.json` that are honoured; others only matter for training, or import modules."""


def add_lora(model: Any, rank: int, seed: int) -> None:
    """Add a trainable LoRA of this rank to all linear layers of a transformers model; freeze the rest."""
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(
                r=rank,
                lora_alpha=int(SCALE * rank),
                target_modules="all-linear",
                bias="none",
                task_type="CAUSAL_LM",
            )
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter alone, and no whole model."""
    there = any((folder / name).is_file() for name in (CONFIG, OLD_WEIGHTS))
    return there and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """Path or id of the model that an adapter was trained on. Raises ModelError where nothing names it.

    A run that was moved to another machine knows its base by `policy.path` of its own configuration.
    """
    named = _config(folder).get("base_model_name_or_path") if (folder / CONFIG).is_file() else None
    if named and (Path(named).exists() or not Path(named).is_absolute()):
        return str(named)
    settings = folder.parent.parent / "config.toml"
    if settings.is_file():
        try:
            return str(read_toml(settings)["policy"]["path"])
        except (ConfigError, KeyError, TypeError) as error:
            raise ModelError(f"{settings}: does not name the base of {folder.name}: {error}") from None
    if named:
        return str(named)
    raise ModelError(f"{folder}: an adapter, and nothing names its base model (base_model_name_or_path)")


def save_adapter(folder: Path, model: Any, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Write `adapter_config.json`; returns the tensors of `adapter_model.safetensors`."""
    config = model.peft_config["default"].to_dict()
    base = Path(model.name_or_path)
    config["base_model_name_or_path"] = str(base.resolve()) if base.exists() else model.name_or_path
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    write_json(folder / CONFIG, plain)
    return {adapter_name(name): tensor for name, tensor in trained.items()}


def adapter_name(parameter: str) -> str:
    """Name of a model's LoRA parameter in peft's files, which leave the adapter's name out."""
    return PREFIX + parameter.replace(".default.", ".")


def merge_adapter(model: Any, folder: Path) -> Any:
    """A transformers model with an adapter added to its weights: W + scale · B · A.

    Raises ModelError for an adapter of another kind, damaged weights, or a model that it does not fit.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    weights = read_adapter(folder)
    settings = _config(folder) if (folder / CONFIG).is_file() else _old_config(weights)
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise ModelError(f"{folder}: an adapter of kind {kind}; only LORA is supported")
    known = {key: settings[key] for key in SETTINGS if settings.get(key) is not None}
    try:
        wrapped = get_peft_model(model, LoraConfig(**known, inference_mode=True))
        expected = {name for name in wrapped.state_dict() if ".lora_" in name}
        given = {name for name in weights if ".lora_" in name}
        if {name.replace(".default", "") for name in expected} != given:
            raise ValueError(f"{len(given)} tensors of a LoRA where the model has {len(expected)}")
        set_peft_model_state_dict(wrapped, weights)
        merged = wrapped.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder}: the adapter does not fit its base model: {reason[:200]}") from None
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors under peft's names, from a folder of either format. Raises ModelError."""
    file = folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / OLD_WEIGHTS
    if not file.is_file():
        raise ModelError(f"{folder}: an adapter without weights; expected {WEIGHTS}")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: not readable as safetensors: {error}") from None
    if file.name == WEIGHTS:
        return tensors
    return {adapter_name(name): tensor for name, tensor in tensors.items()}


def _config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`. Raises ModelError."""
    file = folder / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: expected a JSON object")
    return found


def _old_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `add_lora` made, from the tensors that a checkpoint of 0.1.0 has."""
    rank = next((len(tensor) for name, tensor in weights.items() if ".lora_A." in name), 0)
    return {"r": rank, "lora_alpha": int(SCALE * rank), "target_modules": "all-linear"}

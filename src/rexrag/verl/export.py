"""A checkpoint, of either engine, as a plain Hugging Face folder.

verl writes the weights a second time as safetensors (`checkpoint.save_contents` holds `hf_model`); those are
taken. Its own shards are pickled, and never opened here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rexrag.agent.codec import load_codec
from rexrag.config.files import load_config
from rexrag.engine.learning.checkpoint import write_tensors
from rexrag.engine.loading import DTYPES, LORA_SCALE, choose_trained, export_model, load_model
from rexrag.errors import ModelError, RunFolderError
from rexrag.io import atomic_folder, write_json

LORA_FILE = "lora_train_meta.json"
ADAPTER, OPTIMIZER = "adapter.safetensors", "optimizer.safetensors"
"""Files of a local checkpoint (`engine.local.state`)."""
EXTRA = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)
"""What a model folder holds besides its configuration and weights."""


def export(source: Path, out: Path, dtype: str = "") -> dict[str, Any]:
    """Write `out` from a run folder (its newest checkpoint) or one checkpoint. `dtype` "" keeps the file's.

    Returns facts: where from, parameters, dtype. Raises ModelError, RunFolderError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not empty; choose another --out")
    if dtype and dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}': expected {' or '.join(DTYPES)}")
    adapter = _local_adapter(source)
    if adapter is not None:
        return _merge_adapter(adapter, out, dtype)
    folder = checkpoint_folder(source)
    tensors = read_weights(folder)
    if any("lora_" in name for name in tensors):
        tensors = merge_lora(tensors, _lora_scale(folder))
    if dtype:
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    config["dtype"] = written[0]
    with atomic_folder(out) as fresh:
        write_tensors(fresh / "model.safetensors", tensors)
        write_json(fresh / "config.json", config)
        for file in _extra_files(folder):
            (fresh / file.name).write_bytes(file.read_bytes())
    count = sum(tensor.numel() for tensor in tensors.values())
    return {"from": str(folder), "out": str(out), "parameters": count, "dtype": ", ".join(written)}


def checkpoint_folder(source: Path) -> Path:
    """The folder that holds config.json and safetensors, of a run, a checkpoint or that folder itself."""
    if not source.is_dir():
        raise ModelError(f"{source}: no such folder")
    candidates = [source, source / "huggingface", source / "actor" / "huggingface", *_of_run(source)]
    for folder in candidates:
        if (folder / "config.json").is_file() and _is_whole(folder):
            return folder
    shards = [folder.parent for folder in candidates if any(folder.parent.glob("model_world_size_*.pt"))]
    if shards:
        raise ModelError(
            f"{shards[0]}: verl's shards only, no safetensors; merge them with verl's own tool: python -m "
            f"verl.model_merger merge --backend fsdp --local_dir {shards[0]} --target_dir OUT"
        )
    raise ModelError(f"{source}: no checkpoint here; expected a run folder or one of its checkpoints")


def _is_whole(folder: Path) -> bool:
    """Weights are there, and every file of them that an index names."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return all((folder / name).is_file() for name in set(named))


def _of_run(run: Path) -> list[Path]:
    """Model folders of a run's checkpoints, newest first; verl's, then the local engine's.

    What verl saved after the step that it calls its latest was cut off by a kill.
    """
    checkpoints = run / "checkpoints" if (run / "checkpoints").is_dir() else run
    numbered = [
        (int(path.name.rsplit("_", 1)[-1].rsplit("-", 1)[-1]), path)
        for path in checkpoints.glob("*step*")
        if path.is_dir() and path.name.startswith(("global_step_", "step-")) and path.name[-1].isdigit()
    ]
    latest = checkpoints / "latest_checkpointed_iteration.txt"
    last = int(latest.read_text(encoding="utf-8")) if latest.is_file() else math.inf
    newest = [path for step, path in sorted(numbered, reverse=True) if step <= last]
    return [folder for path in newest for folder in (path / "actor" / "huggingface", path)]


def _local_adapter(source: Path) -> Path | None:
    """A checkpoint of the local engine that holds a LoRA alone; of a run its newest."""
    found = [folder for folder in (source, *_of_run(source)) if (folder / "learner.json").is_file()]
    return found[0] if found and (found[0] / ADAPTER).is_file() else None


def _merge_adapter(checkpoint: Path, out: Path, dtype: str) -> dict[str, Any]:
    """The run's start with the LoRA of one of its checkpoints merged in."""
    settings = checkpoint.parent.parent / "config.toml"
    if not settings.is_file():
        raise ModelError(f"{checkpoint}: a LoRA, and {settings} that names its start is missing")
    config = load_config(settings)
    policy = config.policy.model_copy(update={"device": "cpu"})
    model, source = load_model(policy, dtype=torch.float32)
    choose_trained(model, policy, config.seed)
    weights, parameters = read_weights(checkpoint), dict(model.named_parameters())
    if not weights.keys() <= parameters.keys():
        raise ModelError(f"{checkpoint}: its LoRA does not fit {source}")
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)
    with atomic_folder(out) as fresh:
        export_model(model.to(DTYPES[dtype or policy.dtype]), load_codec(source), fresh)
    count = sum(tensor.numel() for tensor in read_weights(out).values())
    return {"from": str(checkpoint), "out": str(out), "parameters": count, "dtype": dtype or policy.dtype}


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors, an optimizer's aside. Raises ModelError."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name == OPTIMIZER:
            continue
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: not readable as safetensors: {error}") from None
    return tensors


def merge_lora(tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Plain names, and W + scale·B·A where a LoRA stands beside W (arXiv 2106.09685, §4.1)."""
    merged = {}
    for name, tensor in tensors.items():
        if "lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        module = name.removesuffix(".base_layer.weight")
        down, up = (tensors.get(f"{module}.lora_{side}.default.weight") for side in "AB")
        if name != module and down is not None and up is not None:
            tensor = (tensor.float() + scale * (up.float() @ down.float())).to(tensor.dtype)
        merged[plain] = tensor.contiguous()
    return merged


def _lora_scale(folder: Path) -> float:
    for place in (folder, folder.parent):
        if (place / LORA_FILE).is_file():
            facts = json.loads((place / LORA_FILE).read_text(encoding="utf-8"))
            return float(facts["lora_alpha"]) / float(facts["r"])
    return LORA_SCALE


def _extra_files(folder: Path) -> Iterable[Path]:
    return sorted({file for pattern in EXTRA for file in folder.glob(pattern) if file.is_file()})

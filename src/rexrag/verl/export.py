"""A checkpoint, of either engine, as a Hugging Face folder.

verl writes the weights a second time as safetensors (`checkpoint.save_contents` holds `hf_model`); those are
taken. Its own shards are pickled, and never opened here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rexrag.engine.export import export_adapter
from rexrag.engine.learning.checkpoint import write_tensors
from rexrag.engine.loading import DTYPES
from rexrag.engine.lora import SCALE, is_adapter
from rexrag.errors import ModelError, RunFolderError
from rexrag.io import atomic_folder, write_json

LORA_FILE = "lora_train_meta.json"
OPTIMIZER = "optimizer.safetensors"
"""Of a checkpoint of the local engine (`engine.learning.checkpoint`): no weights of the model."""
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
        return export_adapter(adapter, out, dtype)
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
    """A LoRA adapter, or the newest checkpoint of a run of the local engine where that is one."""
    if is_adapter(source):
        return source
    found = [folder for folder in _of_run(source) if (folder / "learner.json").is_file()]
    return found[0] if found and is_adapter(found[0]) else None


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
    return SCALE


def _extra_files(folder: Path) -> Iterable[Path]:
    return sorted({file for pattern in EXTRA for file in folder.glob(pattern) if file.is_file()})

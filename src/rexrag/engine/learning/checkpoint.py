"""Checkpoints of the learner: weights, AdamW moments, counters. Safetensors and JSON only.

A run that is resumed from a checkpoint continues bit for bit.

model.safetensors      all weights, and config.json beside it: a model folder but for the tokenizer;
                       of a LoRA, an adapter in peft's format instead (`engine.lora`)
optimizer.safetensors  exp_avg/NAME, exp_avg_sq/NAME, step/NAME
learner.json           written last: a folder without it is unfinished
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rexrag.engine import lora
from rexrag.errors import CheckpointError, ModelError
from rexrag.io import write_json

FORMAT = "rexrag-learner-1"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass
class LearnerProgress:
    """How far a learner has come: counters, and the generator that shuffles samples."""

    generator: torch.Generator
    steps: int = 0
    """Calls of `update`; the learning-rate warm-up counts them."""
    updates: int = 0
    nonfinite_updates: int = 0


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: LearnerProgress,
) -> None:
    """Raises OSError where the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "learner.json").unlink(missing_ok=True)
    if is_lora(trained):
        write_tensors(folder / lora.WEIGHTS, lora.save_adapter(folder, model, trained))
    else:
        write_tensors(folder / "model.safetensors", full_weights(model))
        model.config.save_pretrained(str(folder))  # type: ignore[union-attr,operator]
    moments = {
        f"{moment}/{parameter}": optimizer.state[tensor][moment]
        for parameter, tensor in trained.items()
        if tensor in optimizer.state
        for moment in MOMENTS
    }
    write_tensors(folder / "optimizer.safetensors", moments)
    facts = {
        "format": FORMAT,
        "steps": progress.steps,
        "updates": progress.updates,
        "nonfinite_updates": progress.nonfinite_updates,
        "generator": base64.b64encode(bytes(progress.generator.get_state().tolist())).decode("ascii"),
        "trained": sorted(trained),
    }
    write_json(folder / "learner.json", facts)


def load_checkpoint(
    folder: Path,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: LearnerProgress,
) -> None:
    """Load into a learner with the same initial checkpoint and settings; it changes only if all of it fits.

    Raises CheckpointError.
    """
    facts = _facts(folder)
    if facts["trained"] != sorted(trained):
        raise CheckpointError(f"{folder}: belongs to a run that trains other parameters")
    weights = _weights(folder, trained)
    moments = _read(folder / "optimizer.safetensors")
    for name, parameter in trained.items():
        wanted = {name: weights, **{f"{moment}/{name}": moments for moment in MOMENTS[:2] if moments}}
        for key, store in wanted.items():
            if key not in store or store[key].shape != parameter.shape:
                raise CheckpointError(f"{folder}: '{key}' is missing or not {tuple(parameter.shape)}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
            optimizer.state.pop(parameter, None)
            if moments:
                optimizer.state[parameter] = {
                    moment: moments[f"{moment}/{name}"].to(parameter.device) for moment in MOMENTS
                }
    progress.steps, progress.updates = facts["steps"], facts["updates"]
    progress.nonfinite_updates = facts["nonfinite_updates"]
    progress.generator.set_state(facts["generator"])


def is_lora(trained: Mapping[str, nn.Parameter]) -> bool:
    """Whether these are the parameters of a LoRA."""
    return any("lora_" in name for name in trained)


def _weights(folder: Path, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Saved weights under the names of the model's parameters. Raises CheckpointError."""
    if not is_lora(trained):
        return _read(folder / "model.safetensors")
    try:
        adapter = lora.read_adapter(folder)
    except ModelError as error:
        raise CheckpointError(str(error)) from None
    return {name: adapter[saved] for name in trained if (saved := lora.adapter_name(name)) in adapter}


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters once each (tied ones under their first name) and persistent buffers."""
    own = dict(model.named_parameters())
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return own | {name: value for name, value in model.state_dict().items() if name not in every}


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file that appears whole or not at all."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(flat, partial, metadata={"format": "pt"})
        partial.chmod(0o644)  # the library leaves it readable by its owner alone
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: not readable as safetensors: {error}") from None


def _facts(folder: Path) -> dict[str, Any]:
    file = folder / "learner.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        found = facts["format"]
        raw = base64.b64decode(facts["generator"], validate=True)
        read = {
            "steps": int(facts["steps"]),
            "updates": int(facts["updates"]),
            "nonfinite_updates": int(facts["nonfinite_updates"]),
            "generator": torch.tensor(list(raw), dtype=torch.uint8),
            "trained": list(facts["trained"]),
        }
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing; this is no finished learner checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged: {type(error).__name__}: {error}") from None
    if found != FORMAT:
        raise CheckpointError(f"{file}: format {found!r}, expected {FORMAT!r}")
    return read

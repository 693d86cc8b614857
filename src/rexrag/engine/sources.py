"""From `policy.path` to a model: a shipped checkpoint, a checked folder, an adapter, or an id on a hub."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

import httpx
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from transformers import AutoConfig

from rexrag.engine import lora
from rexrag.errors import ConfigError, ModelError
from rexrag.io import sha256_file

EMBEDDED = {
    "tiny-hard": "hard",
    "tiny-middle": "middle",
    "tiny-easy": "easy",
    **{"embedded": "hard", "embedded-middle": "middle", "embedded-easy": "easy"},  # of version 0.1.0
}
"""Checkpoints in the package: name in the configuration -> folder in `rexrag/data/world/checkpoints`."""
REACH_SECONDS = 10.0
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MODEL_FILES = (
    "*.safetensors",
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.jinja",
)
"""Files of a model folder that its rollouts depend on."""
FOLDERS = ("models", "runs")
"""First parts of paths that are never owners on a hub: configurations and commands put models there."""


def resolve(path: str, adapters: bool = True) -> str:
    """The folder of a model, checked for weights, or its Hugging Face id. Raises ModelError.

    adapters: whether the folder of a LoRA adapter will do. Its base is checked too.
    """
    if path in EMBEDDED:
        folder = Path(str(files("rexrag.data.world"))) / "checkpoints" / EMBEDDED[path]
        if not folder.is_dir():
            raise ModelError(f"policy.path = '{path}': this installation has no {folder}")
    else:
        folder = Path(path).expanduser()
        if not path or not folder.exists():
            close = difflib.get_close_matches(path, EMBEDDED, n=1, cutoff=0.7)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            if not may_be_id(path):
                raise ModelError(f"policy.path = '{path}': no such model folder{hint}")
            try:
                _reach(path)
            except ModelError as error:
                raise ModelError(f"{error}{hint}") from None
            return path
    if lora.is_adapter(folder):
        _check_adapter(folder, adapters)
        return str(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        raise ModelError(
            f"{folder}: {f'its weights are pickled ({pickled[0]})' if pickled else 'no weights'}; "
            "expected *.safetensors"
        )
    return str(folder)


def _check_adapter(folder: Path, wanted: bool) -> None:
    if not wanted:
        raise ModelError(
            f"{folder}: a LoRA adapter; verl needs a model: rexrag model export {folder} --out DIR"
        )
    base = lora.base_of(folder)
    try:
        resolve(base)
    except ModelError as error:
        raise ModelError(f"{folder}: an adapter of '{base}', which cannot be had: {error}") from None


def tokenizer_source(source: str) -> str:
    """Folder or id of a resolved model's tokenizer: an adapter without one has that of its base."""
    folder = Path(source)
    if lora.is_adapter(folder) and not any(folder.glob("tokenizer*")):
        return tokenizer_source(resolve(lora.base_of(folder)))
    return source


def may_be_id(path: str) -> bool:
    """Whether "name" or "owner/name" can be an id on a hub; anything else was meant as a folder."""
    owner, slash, _ = path.partition("/")
    a_folder = path.startswith((".", "/", "~")) or path.count("/") > 1
    return bool(path) and not a_folder and not (slash and owner in FOLDERS)


def _reach(name: str) -> None:
    """Ask the hub once whether the model exists; transformers would retry for more than a minute.

    Raises ModelError. Other troubles (a gated model, a file that is missing) show when it is loaded.
    """
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=REACH_SECONDS)
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        where = f"a hub ({constants.ENDPOINT}) cannot be asked"
        raise ModelError(f"{name}: no such folder, not in the cache, and {where}: {reason}") from None
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{name}: no such folder, and no name that a hub could know: {reason}") from None
    except HfHubHTTPError as error:
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            raise ModelError(f"{name}: no such folder, and no such model on {constants.ENDPOINT}") from None


def identity(source: str) -> list[str]:
    """What identifies a model: digests of a folder's files, or the commit of an id. Raises ModelError."""
    folder = Path(source)
    if folder.is_dir():
        found = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
        own = [f"{file.name} {sha256_file(file)}" for file in found]
        return own + (identity(resolve(lora.base_of(folder))) if lora.is_adapter(folder) else [])
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"policy '{source}': no such model: {reason[:200]}") from None
    return [source, str(getattr(config, "_commit_hash", None))]


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError for a device that torch cannot use here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"policy.device = '{name}': not usable on this machine: {reason}") from None

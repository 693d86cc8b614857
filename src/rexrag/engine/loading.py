"""From configuration to a policy and a learner. Safetensors only, and no code from model folders."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

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
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from rexrag.agent.codec import HFCodec, load_codec
from rexrag.config.schema import Config, PolicyConfig
from rexrag.engine.attention import use_packed_attention
from rexrag.engine.learning.checkpoint import full_weights, write_tensors
from rexrag.engine.learning.learner import LocalLearner
from rexrag.engine.sampling.policy import LocalPolicy
from rexrag.errors import ConfigError, ModelError
from rexrag.io import sha256_file

EMBEDDED = {"embedded": "hard", "embedded-middle": "middle", "embedded-easy": "easy"}
"""Starts shipped in the package: name in the configuration -> folder in `rexrag/data/world/checkpoints`."""
REACH_SECONDS = 10.0
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
MODEL_FILES = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.jinja",
)
"""What of a model folder decides what it says."""
FOLDERS = ("models", "runs")
"""Where the shipped configurations and commands put models: no owners on a hub."""
LORA_SCALE = 2.0
"""alpha / rank of every LoRA."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(config: PolicyConfig) -> LocalPolicy:
    """A policy for rollouts and scores alone, in the configured precision. Raises ModelError, ConfigError."""
    model, folder = load_model(config)
    return LocalPolicy(model, codec_of(model, folder))


def load_engine(config: Config) -> tuple[LocalPolicy, LocalLearner]:
    """A policy and the learner that trains it. Raises ModelError, ConfigError.

    They share one model; only where the sampler runs in bfloat16 it has a copy of the float32 master weights,
    refreshed after every step.
    """
    policy = config.policy
    model, folder = load_model(policy, dtype=torch.float32)
    codec = codec_of(model, folder)
    choose_trained(model, policy, config.seed)
    dtype = DTYPES[policy.dtype]
    sampler_model = None if dtype == torch.float32 else _in_precision(model, dtype)
    learner = LocalLearner(
        model,
        config.learner,
        seed=config.seed,
        autocast=policy.autocast,
        reference=config.method.kl > 0,
        sampler_model=sampler_model,
    )
    return LocalPolicy(model if sampler_model is None else sampler_model, codec), learner


def codec_of(model: Any, folder: str) -> HFCodec:
    """The tokenizer of a model. Raises ModelError where a text can have ids that the model does not know.

    Special tokens but those that end a turn are never written, and some models lack rows for them.
    """
    codec = load_codec(folder)
    special = {i for i, token in codec.tokenizer.added_tokens_decoder.items() if token.special}
    written = set(codec.tokenizer.get_vocab().values()) - special | codec.eos_ids
    known, largest = model.get_input_embeddings().num_embeddings, max(written, default=0)
    if largest >= known:
        raise ModelError(f"{folder}: its tokenizer has an id {largest}, its model {known} tokens")
    return codec


def _in_precision(model: Any, dtype: torch.dtype) -> Any:
    """A frozen copy. Buffers keep their precision, as in a model that is loaded in `dtype`.

    The frequencies of rotary positions, rounded to bfloat16, are a radian off after a thousand tokens.
    """
    made = copy.deepcopy(model).requires_grad_(False)
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return made


def load_model(config: PolicyConfig, dtype: torch.dtype | None = None) -> tuple[Any, str]:
    """(a transformers causal language model with packed attention, its folder or id), on its device.

    `dtype` None takes the configured one. Raises ModelError with one line for a missing folder, weights that
    are pickled, damaged or incomplete, and architectures that the local engine cannot run; ConfigError for a
    device.
    """
    source = resolve(config.path)
    device = choose_device(config.device)
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype or DTYPES[config.dtype],
                attn_implementation="sdpa",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        missing = "" if Path(source).exists() else "no such folder, and from a hub: "
        raise ModelError(f"{source}: {missing}no usable causal language model: {reason[:300]}") from None
    if report["missing_keys"]:
        raise ModelError(f"{source}: the weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
    model.to(device).eval()
    use_packed_attention(model)
    return model, source


def resolve(path: str) -> str:
    """A folder checked for weights, an embedded start, or a Hugging Face id as it is. Raises ModelError."""
    if path in EMBEDDED:
        folder = Path(str(files("rexrag.data.world"))) / "checkpoints" / EMBEDDED[path]
        if not folder.is_dir():
            raise ModelError(f"policy.path = '{path}': this installation has no {folder}")
    else:
        folder = Path(path).expanduser()
        if not path or not folder.exists():
            if _may_be_id(path):
                _reach(path)
                return path
            raise ModelError(f"policy.path = '{path}': no such model folder")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        raise ModelError(
            f"{folder}: {f'its weights are pickled ({pickled[0]})' if pickled else 'no weights'}; "
            "expected *.safetensors"
        )
    return str(folder)


def _may_be_id(path: str) -> bool:
    """ "name" and "owner/name" can be ids on a hub; anything else was meant as a folder."""
    owner, slash, _ = path.partition("/")
    a_folder = path.startswith((".", "/", "~")) or path.count("/") > 1
    return bool(path) and not a_folder and not (slash and owner in FOLDERS)


def _reach(name: str) -> None:
    """Ask once whether there is such a model; a library that gets no answer asks on for more than a minute.

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
    """Who a model is: digests of the files of a folder, or the commit of an id. Raises ModelError."""
    folder = Path(source)
    if folder.is_dir():
        files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()})
        return [f"{file.name} {sha256_file(file)}" for file in files]
    try:
        found = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"policy '{source}': no such model: {reason[:200]}") from None
    return [source, str(getattr(found, "_commit_hash", None))]


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError for a device that torch cannot use here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"policy.device = '{name}': not usable on this machine: {reason}") from None


def choose_trained(model: Any, config: PolicyConfig, seed: int) -> None:
    """Let the configured weights require a gradient, and no others. Raises ConfigError."""
    rank, last = config.lora_rank, config.train_last_layers
    if rank and last:
        raise ConfigError("policy.lora_rank and policy.train_last_layers: choose one")
    if rank:
        _add_lora(model, rank, seed)
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


def _add_lora(model: Any, rank: int, seed: int) -> None:
    from peft import LoraConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=int(LORA_SCALE * rank), target_modules="all-linear", bias="none")
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def export_model(model: Any, codec: Any, folder: Path) -> None:
    """Write a model folder that `policy.path` can name: tokenizer and weights, with a LoRA merged in."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", merged_weights(model))
    model.config.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))
    codec.tokenizer.save_pretrained(str(folder))


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


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or loading tables: what matters of them becomes a ModelError."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_level = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity(40)  # errors only: else a line for every time that it tries again
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()

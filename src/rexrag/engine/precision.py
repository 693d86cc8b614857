"""float32 or bfloat16: what `policy.precision` means for a policy on a device.

bfloat16 means: the sampler's weights in bfloat16, and bfloat16 autocast over the learner's float32 master
weights. Sampler and learner then give a token different log-probs, and the sampler-mismatch weight corrects
for that (`method.weights.mismatch_weights`).
"""

from __future__ import annotations

import platform
from typing import Literal, NamedTuple

import torch

from rexrag.config.schema import Config, PolicyConfig
from rexrag.engine.sources import EMBEDDED, choose_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MISMATCH_CAP = 2.0
"""`mismatch_cap` of a run with a bfloat16 sampler, unless its algorithm sets one."""


class Precision(NamedTuple):
    name: Literal["float32", "bfloat16"]
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the sampler's weights."""
        return DTYPES[self.name]

    @property
    def autocast(self) -> bool:
        """Whether the learner runs under bfloat16 autocast."""
        return self.name == "bfloat16"


def precision_of(policy: PolicyConfig, device: torch.device | str | None = None) -> Precision:
    """The precision of a policy, and why. `device` None takes the configured one. Raises ConfigError.

    `precision_of(PolicyConfig())` says why the shipped checkpoints run in float32.
    """
    if policy.precision != "auto":
        return Precision(policy.precision, "set by policy.precision")
    if policy.path in EMBEDDED:
        return Precision("float32", f"{policy.path} is pinned to float32, as its published figures")
    return automatic(choose_device(policy.device) if device is None else torch.device(device))


def automatic(device: torch.device) -> Precision:
    """What `policy.precision = "auto"` gives on a device, and why."""
    unit = bfloat16_unit(device)
    if unit:
        return Precision("bfloat16", f"the {device.type.upper()} multiplies in bfloat16 ({unit})")
    return Precision("float32", f"the {device.type.upper()} has no bfloat16 units")


def bfloat16_unit(device: torch.device) -> str:
    """The name of what multiplies in bfloat16 on a device; "" where nothing does."""
    if device.type == "cuda":
        # Emulation of bfloat16 on an older GPU is slower than float32.
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            return ""
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return ""
    if platform.machine().lower() in ("aarch64", "arm64"):
        try:
            return "ARM bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ""
        except (AttributeError, RuntimeError):  # a build of torch without oneDNN
            return ""
    if torch.cpu._is_amx_tile_supported():
        return "amx_bf16"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else ""


def settled(config: Config) -> Config:
    """A run's configuration with its precision decided, and `mismatch_cap` on for a bfloat16 sampler.

    A run writes this into its `config.toml`, so that it is resumed and evaluated in the same precision on any
    machine. verl's workers are GPUs, whatever the driver has. A `mismatch_cap` that the configuration sets
    stays, 0 too. Raises ConfigError for a device.
    """
    policy = config.policy
    on_gpu = config.engine == "verl" and policy.precision == "auto" and policy.path not in EMBEDDED
    name = "bfloat16" if on_gpu else precision_of(policy).name
    changes: dict[str, object] = {"policy": policy.model_copy(update={"precision": name})}
    algorithm = config.algorithm
    corrected = getattr(algorithm, "suffix_weight", "") == "truncated-is"
    if name == "bfloat16" and "mismatch_cap" not in algorithm.model_fields_set and not corrected:
        changes["algorithm"] = algorithm.model_copy(update={"mismatch_cap": MISMATCH_CAP})
    return config.model_copy(update=changes)

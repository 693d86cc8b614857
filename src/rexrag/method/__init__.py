"""The method as pure functions of tensors: no model, no IO, randomness only through a passed generator."""

from rexrag.method.advantages import group_advantages
from rexrag.method.cues import CueTrie
from rexrag.method.densities import mixture_log_density, probe_log_density
from rexrag.method.filters import keep_probes
from rexrag.method.objective import clipped_surrogate, k3_kl
from rexrag.method.weights import trajectory_weight

__all__ = [
    "CueTrie",
    "clipped_surrogate",
    "group_advantages",
    "k3_kl",
    "keep_probes",
    "mixture_log_density",
    "probe_log_density",
    "trajectory_weight",
]

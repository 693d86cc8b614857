"""Corrections of the gradient for a batch in which some rollouts are probes [METHOD §3].

| module | algorithm |
|---|---|
| `none` | `grpo`, `dapo`; `rex-rag` with `correction = "none"` |
| `mixture` | `rex-rag`: the paper's density of each token |
| `context_distillation` | `rex-rag-distill`: probes without their cue |
| `base` | the protocol, and what they share |
"""

from __future__ import annotations

from rexrag.config.algorithms import RexRag, RexRagDistill, Shared
from rexrag.method.corrections.base import Correction
from rexrag.method.corrections.context_distillation import ContextDistillation
from rexrag.method.corrections.mixture import Mixture
from rexrag.method.corrections.none import Uncorrected
from rexrag.method.cues import CueTrie

__all__ = ["Correction", "correction_of"]


def correction_of(algorithm: Shared, trie: CueTrie | None) -> Correction:
    """The correction of an algorithm. trie: the cue pool, None where probes carry no cue."""
    if isinstance(algorithm, RexRagDistill):
        return ContextDistillation(algorithm)
    if isinstance(algorithm, RexRag):
        uncorrected = algorithm.correction == "none"
        return Uncorrected.of(algorithm, trie) if uncorrected else Mixture(algorithm, trie)
    return Uncorrected()

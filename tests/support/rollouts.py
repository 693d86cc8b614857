"""Finished rollouts, probes and groups made by hand, with tokens that stand for themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rexrag.method import CueTrie, clipped_surrogate, group_advantages
from rexrag.method.corrections import correction_of
from rexrag.method.rows import Streams, pad
from rexrag.types import Origin, Probe, Question, Rollout, RolloutGroup, StopReason, Turn

P, C, E, N = (int(o) for o in (Origin.POLICY, Origin.CUE, Origin.EVIDENCE, Origin.NOTICE))
QUESTION = Question("q", "Who?", ("x",))
TRIE = CueTrie([[20, 21], [20, 22, 23], [20, 22, 24]])


def rollout(
    origins: Sequence[int],
    logps: Sequence[float] | None = None,
    tokens: Sequence[int] | None = None,
    **changes: Any,
) -> Rollout:
    """An answered rollout; its answer is wrong unless `correct=True` is said."""
    n = len(origins)
    answer = changes.get("answer", "y")
    given = {
        "question": QUESTION,
        "prompt": (1, 2),
        "tokens": tuple(tokens if tokens is not None else range(3, 3 + n)),
        "origins": tuple(origins),
        "logps": tuple(logps if logps is not None else [-0.1 * t for t in range(n)]),
        "turns": (Turn(0, n, "answer", "y", action_start=max(0, n - 2)),),
        "stop": StopReason.ANSWER if answer is not None else StopReason.TURNS,
        "answer": answer,
        "reward": float(changes.get("correct", False)),
    }
    return Rollout(**{**given, **changes})


def probe_of(
    parent: Rollout, cue: int | None, after: Sequence[int], logps: Sequence[float], **changes: Any
) -> Probe:
    """A kept probe of `parent`: its tokens up to the answer, cue `cue` of TRIE, and tokens of these origins.

    logps: of the cue, then of what follows.
    """
    cut, said = parent.answer_start, () if cue is None else TRIE.cues[cue]
    assert cut is not None
    made = rollout(
        [*parent.origins[:cut], *[C] * len(said), *after],
        [*parent.logps[:cut], *logps],
        [*parent.tokens[:cut], *said, *range(50, 50 + len(after))],
        **changes,
    )
    return Probe(made, parent, cut, cue, len(said), kept=True)


def two_groups(seed: int = 0) -> tuple[RolloutGroup, RolloutGroup]:
    """Three base rollouts a question, one of the six correct, and a kept probe for the second of each."""
    g = torch.Generator().manual_seed(seed)

    def drawn(origins: Sequence[int]) -> list[float]:
        logps = (-torch.rand(len(origins), generator=g) * 3).tolist()
        return [v if o in (P, C) else 0.0 for v, o in zip(logps, origins, strict=True)]

    def base(origins: Sequence[int], **changes: Any) -> Rollout:
        return rollout(origins, drawn(origins), **changes)

    inserted = [E, E, N, P, P]
    first = base([P, P, E, P, P, P], turns=(Turn(0, 6, "answer", "y", action_start=4, thought_end=3),))
    second = base([P, P, P, P], turns=(Turn(0, 4, "answer", "y", action_start=2),))
    return (
        RolloutGroup(
            QUESTION,
            (base([P] * 3 + inserted, correct=True), first, base([P] * 5 + inserted)),
            (probe_of(first, 0, [P, P, E, P], drawn([C, C, P, P, E, P])),),
        ),
        RolloutGroup(
            QUESTION,
            (base([P] * 6 + inserted), second, base([P] * 8 + inserted)),
            (probe_of(second, 1, [P], drawn([C, C, C, P]), correct=True),),
        ),
    )


def loss_and_gradient(groups, algorithm, trie=TRIE, move=0.1) -> tuple[torch.Tensor, torch.Tensor, Streams]:
    """(loss, its gradient [B, T], streams) of the rows of `groups` once log π has moved by `move`."""
    correction = correction_of(algorithm, trie)
    batch = pad(correction.rows(groups))
    streams = correction.streams(batch)
    logp = (batch.policy_logp + move).requires_grad_(True)
    loss, _ = clipped_surrogate(
        logp,
        streams.behaviour_logp,
        group_advantages(batch.correct.float(), batch.groups),
        streams.mask,
        weight=streams.weight,
        truncated=streams.truncated,
    )
    return loss.detach(), torch.autograd.grad(loss, logp)[0], streams

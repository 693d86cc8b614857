"""Rollouts as rows of `rollouts.jsonl.zst`: what was said, by whom, how likely, and with what weight."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch

from rexrag.agent.episode import Codec
from rexrag.method.rows import Row
from rexrag.training.step import Collected
from rexrag.types import Origin, Rollout


def trace_rows(step: Collected, number: int, codec: Codec, limit: int) -> list[dict[str, Any]]:
    """At most `limit` rollouts of a step: probes with their parents first, then base rollouts."""
    places = _places(step)
    chosen: list[tuple[str, int]] = []
    for index, probe in enumerate(step.probes):
        chosen += [("base", probe.parent or 0), ("probe", index)]
    chosen += [("base", index) for index in range(len(step.base))]
    unique = list(dict.fromkeys(chosen))[:limit]
    return [_row(step, number, codec, kind, index, places.get((kind, index))) for kind, index in unique]


def _places(step: Collected) -> dict[tuple[str, int], int]:
    """Row of the batch that each trained rollout became."""
    places = {("base", index): index for index in range(len(step.base))}
    kept = [index for index, keep in enumerate(step.kept.tolist()) if keep]
    return places | {("probe", index): len(step.base) + i for i, index in enumerate(kept)}


def _row(
    step: Collected, number: int, codec: Codec, kind: str, index: int, place: int | None
) -> dict[str, Any]:
    rollout = step.base[index] if kind == "base" else step.probes[index]
    ratios = None if place is None else _ratios(step, place, rollout)
    question = rollout.question
    trained = None if ratios is None else [r for r in ratios if r is not None]
    return {
        "step": number,
        "index": index,
        "kind": kind,
        "kept": place is not None,
        "question": {
            "id": question.id,
            "text": question.text,
            "answers": list(question.answers),
            "hops": question.hops,
            "kind": question.kind,
        },
        "group": question.group,
        "parent": rollout.parent,
        "cut": rollout.cut,
        "cue": rollout.cue,
        "cue_text": None
        if rollout.cut is None
        else codec.decode(rollout.tokens[rollout.cut : rollout.cut + rollout.cue_length]),
        "score": float(step.scores[index]) if kind == "probe" else None,
        "advantage": None if place is None else float(step.advantages[place]),
        "reward": rollout.reward,
        "em": rollout.em,
        "answer": rollout.answer,
        "stop": str(rollout.stop),
        "weight": sum(trained) / len(trained) if trained else None,
        "segments": list(_segments(rollout, codec, ratios)),
        "tokens": list(rollout.tokens),
        "origins": list(rollout.origins),
        "logps": [round(logp, 5) for logp in rollout.logps],
    }


def _ratios(step: Collected, place: int, rollout: Rollout) -> list[float | None]:
    """π_old/μ times the weight of each trained token of a rollout; a spliced row has none of its cue."""
    row: Row = step.rows[place]
    n = len(row.tokens)
    old = torch.tensor(row.policy_logp)
    ratio = torch.exp(old - step.streams.behaviour_logp[place, :n]) * step.streams.weight[place, :n]
    mask = step.streams.mask[place, :n].tolist()
    found = [float(r) if m else None for r, m in zip(ratio.tolist(), mask, strict=True)]
    if row.tokens == rollout.tokens:
        return found
    left_out = len(rollout.tokens) - n  # from the end of the thought before the cut to the end of the cue
    return [*found[: row.cut], *[None] * left_out, *found[row.cut :]]


def _segments(rollout: Rollout, codec: Codec, ratios: list[float | None] | None) -> Iterator[dict[str, Any]]:
    """Runs of one origin, split at a probe's cut."""

    def label(position: int) -> tuple[int, bool]:
        return rollout.origins[position], rollout.cut is not None and position >= rollout.cut

    for (origin, _), run in groupby(range(len(rollout.tokens)), key=label):
        places = list(run)
        here = [r for i in places if (r := ratios[i]) is not None] if ratios else []
        yield {
            "origin": Origin(origin).name.lower(),
            "text": codec.decode([rollout.tokens[i] for i in places]),
            "logp": round(sum(rollout.logps[i] for i in places), 4),
            "weight": round(sum(here) / len(here), 4) if here else None,
        }

"""Rollouts as rows of `rollouts.jsonl.zst`: what was said, by whom, how likely, and with what weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch

from rexrag.agent.episode import Codec
from rexrag.types import Origin, Probe, Rollout, Sample, StepBatch


def trace_rows(batch: StepBatch, number: int, codec: Codec, limit: int) -> list[dict[str, Any]]:
    """At most `limit` rollouts of a step: probes with their parents first, then base rollouts."""
    place = {id(rollout): index for index, rollout in enumerate(batch.rollouts)}
    trained = {id(sample.source): sample for sample in batch.samples}

    def base_row(rollout: Rollout) -> dict[str, Any]:
        sample = trained.get(id(rollout))
        about = {"index": place[id(rollout)], "kind": "base", "kept": sample is not None, "score": None}
        return _row(rollout, sample, None, codec) | about

    rows: dict[int, Callable[[], dict[str, Any]]] = {}
    for index, probe in enumerate(batch.probes):
        about = {"index": index, "kind": "probe", "kept": probe.kept, "score": probe.score}
        about["parent"] = place[id(probe.parent)]
        rows.setdefault(id(probe.parent), partial(base_row, probe.parent))
        rows[id(probe)] = partial(_probe_row, probe, trained.get(id(probe.rollout)), codec, about)
    for rollout in batch.rollouts:
        rows.setdefault(id(rollout), partial(base_row, rollout))
    return [{"step": number, **make()} for make in list(rows.values())[:limit]]


def _probe_row(probe: Probe, sample: Sample | None, codec: Codec, about: dict[str, Any]) -> dict[str, Any]:
    return _row(probe.rollout, sample, probe, codec) | about


def _row(rollout: Rollout, sample: Sample | None, probe: Probe | None, codec: Codec) -> dict[str, Any]:
    question = rollout.question
    ratios = None if sample is None else _ratios(rollout, sample, probe)
    trained = None if ratios is None else [r for r in ratios if r is not None]
    cue = None if probe is None else rollout.tokens[probe.cut : probe.cut + probe.cue_length]
    return {
        "question": {
            "id": question.id,
            "text": question.text,
            "answers": list(question.answers),
            "hops": question.hops,
            "kind": question.kind,
        },
        "group": question.group,
        "parent": None,
        "cut": None if probe is None else probe.cut,
        "cue": None if probe is None else probe.cue,
        "cue_text": None if cue is None else codec.decode(cue),
        "advantage": None if sample is None else sample.advantage,
        "reward": rollout.reward,
        "em": rollout.em,
        "correct": rollout.correct,
        "answer": rollout.answer,
        "stop": str(rollout.stop),
        "weight": sum(trained) / len(trained) if trained else None,
        "segments": list(_segments(rollout, probe, codec, ratios)),
        "tokens": list(rollout.tokens),
        "origins": list(rollout.origins),
        "logps": [round(logp, 5) for logp in rollout.logps],
    }


def _ratios(rollout: Rollout, sample: Sample, probe: Probe | None) -> list[float | None]:
    """π_old/μ times the weight of each trained token of a rollout; a row without the cue has none of it."""
    old, behaviour = torch.tensor(sample.policy_logp), torch.tensor(sample.behaviour_logp)
    weight = torch.tensor(sample.weight) if sample.weight else torch.ones_like(old)
    ratio = (torch.exp(old - behaviour) * weight).tolist()
    found = [float(r) if m else None for r, m in zip(ratio, sample.mask, strict=True)]
    if probe is None or sample.tokens == rollout.tokens:
        return found
    left_out = len(rollout.tokens) - len(found)  # from the end of the thought to the end of the cue
    cut = probe.cut + probe.cue_length - left_out
    return [*found[:cut], *[None] * left_out, *found[cut:]]


def _segments(
    rollout: Rollout, probe: Probe | None, codec: Codec, ratios: list[float | None] | None
) -> Iterator[dict[str, Any]]:
    """Runs of one origin, split at a probe's cut."""

    def label(position: int) -> tuple[int, bool]:
        return rollout.origins[position], probe is not None and position >= probe.cut

    for (origin, _), run in groupby(range(len(rollout.tokens)), key=label):
        places = list(run)
        here = [r for i in places if (r := ratios[i]) is not None] if ratios else []
        yield {
            "origin": Origin(origin).name.lower(),
            "text": codec.decode([rollout.tokens[i] for i in places]),
            "logp": round(sum(rollout.logps[i] for i in places), 4),
            "weight": round(sum(here) / len(here), 4) if here else None,
        }

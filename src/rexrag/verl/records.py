"""Questions and rollouts as plain rows that verl can carry through files and its queue, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rexrag.agent.episode import Episode
from rexrag.agent.prompts import render_prompt
from rexrag.types import Origin, Probe, Question, Rollout, StopReason, Turn

AGENT = "rexrag"
"""Name of the agent loop, of the trainer, and of our entry in a row's extra fields."""
STATE_FILE = "rexrag.json"
"""Our part of one of verl's checkpoints: counts, success of probes, digests, lengths of the logs."""

_MODEL_TOKENS = (int(Origin.POLICY), int(Origin.CUE))
_CARRIED = ("stop", "answer", "reward", "em", "correct", "forced_last_turn")
_PROBE = ("cut", "cue", "cue_length")


def question_row(question: Question, place: int, template: str) -> dict[str, Any]:
    """A question in verl's data format. `place` is its number in the file."""
    return {
        "data_source": question.source,
        "agent_name": AGENT,
        "prompt": [{"role": "user", "content": render_prompt(template, question.text)}],
        "ability": "search",
        "reward_model": {"style": "rule", "ground_truth": {"target": list(question.answers)}},
        "extra_info": {"index": place, **asdict(question), "answers": list(question.answers)},
    }


def question_of(extra_info: Mapping[str, Any]) -> Question:
    """The question that `question_row` wrote."""
    known = {name: extra_info[name] for name in Question.__dataclass_fields__}
    return Question(**known | {"answers": tuple(extra_info["answers"])})


def rollout_record(rollout: Rollout, episode: Episode) -> dict[str, Any]:
    """All of a rollout that is not a stream of tokens or log-probs; plain values only.

    episode: that it came from; a fork says where it was cut.
    """
    return {
        "probe": None if episode.cut is None else {name: getattr(episode, name) for name in _PROBE},
        "question": {**asdict(rollout.question), "answers": list(rollout.question.answers)},
        "origins": list(rollout.origins),
        "turns": [{**asdict(turn), "documents": list(turn.documents)} for turn in rollout.turns],
        **{name: getattr(rollout, name) for name in _CARRIED},
        "stop": str(rollout.stop),
    }


def rollout_of(
    record: Mapping[str, Any], prompt: Sequence[int], tokens: Sequence[int], logps: Sequence[float]
) -> Rollout:
    """The rollout again, with log-probs that may have come from elsewhere.

    logps: one for each token; those of EVIDENCE and NOTICE tokens are set to 0.0, as `Rollout` asks.
    """
    origins = tuple(record["origins"])
    known = {name: record[name] for name in _CARRIED}
    return Rollout(
        **known | {"stop": StopReason(record["stop"])},
        question=question_of(record["question"]),
        prompt=tuple(prompt),
        tokens=tuple(tokens),
        origins=origins,
        logps=tuple(
            logp if origin in _MODEL_TOKENS else 0.0 for logp, origin in zip(logps, origins, strict=True)
        ),
        turns=tuple(Turn(**{**turn, "documents": tuple(turn["documents"])}) for turn in record["turns"]),
    )


def probe_of(record: Mapping[str, Any], rollout: Rollout, parent: Rollout) -> Probe:
    """The probe that a rollout's record says it is."""
    return Probe(rollout, parent, **record["probe"])

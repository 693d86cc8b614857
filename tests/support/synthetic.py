"""Invented run folders for tests: plausible curves and traces. Nothing here was measured."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zstandard

from rexrag.report.rollouts import ORIGINS

HOSTILE = (
    "</script><img src=x onerror=\"document.documentElement.dataset.pwned='1'\">",
    "<script>document.documentElement.dataset.pwned='2'</script>",
    "<svg/onload=\"document.documentElement.dataset.pwned='3'\">",
    "javascript:alert(1) &lt;b&gt; \u2028\u2029 \u0000 \ud83d <!-- ]]> ${1} '\"",
)
"""Text that would run, or break the page, if it were taken for markup."""

Json = dict[str, Any]


def interval(value: float, n: int = 300) -> Json:
    half = 1.96 * math.sqrt(max(1e-9, value * (1 - value)) / n)
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}


def write_run(
    folder: Path,
    *,
    arm: str = "rex-rag-distill",
    seed: int = 0,
    steps: int = 60,
    start: float = 0.31,
    end: float = 0.68,
    finished: bool = True,
    control: bool = False,
    hostile: bool = False,
    rollouts_per_step: int = 6,
) -> Path:
    """Write an invented run folder; `control` puts a plain GRPO run inside it."""
    folder.mkdir(parents=True)
    rng = random.Random(f"{arm}/{seed}")
    probing = arm != "grpo"
    evil = HOSTILE[0] if hostile else ""
    name = f"world-quickstart {evil}".strip()
    planned = steps if finished else steps * 2
    (folder / "config.toml").write_text(
        f"name = {json.dumps(name)}\nseed = {seed}\n\n[method]\nprobe = {str(probing).lower()}\n"
        f'realignment = "internalize"\n\n[train]\nsteps = {planned}\nquestions = 32\n',
        encoding="utf-8",
    )
    _json(
        folder / "environment.json", {"python": "3.11", "torch": "2.13.0", "commit": "0" * 40, "note": evil}
    )
    curve = [start + (end - start) * (1 - math.exp(-3.2 * step / steps)) for step in range(steps + 1)]
    _lines(
        folder / "metrics.jsonl", [_metrics(rng, step, curve[step], probing) for step in range(1, steps + 1)]
    )
    _lines(folder / "eval.jsonl", _evaluations(rng, curve, steps, probing, finished))
    write_rollouts(folder / "rollouts.jsonl.zst", _rollouts(rng, curve, probing, hostile, rollouts_per_step))
    if finished:
        rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()]
        held = [row["em"] for row in rows if row["set"] == "held-out"]
        rise = held[-1]["value"] - held[0]["value"]
        last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        summary = {
            "name": name,
            "arm": arm,
            "seed": seed,
            "steps": steps,
            "em_before": held[0],
            "em_after": held[-1],
            "rise": {"value": rise, "low": rise - 0.06, "high": rise + 0.06},
        }
        _json(
            folder / "summary.json",
            {**summary, **{key: last[key] for key in ("generated_tokens", "seconds")}},
        )
    if control:
        write_run(
            folder / "control",
            arm="grpo",
            seed=seed,
            steps=steps,
            start=start,
            end=end - 0.09,
            hostile=hostile,
        )
    return folder


def write_rollouts(path: Path, rows: list[Json], frame: int = 64) -> None:
    """Concatenated zstd frames of `frame` rows, as a run appends them."""
    compressor = zstandard.ZstdCompressor()
    with path.open("wb") as file:
        for at in range(0, len(rows), frame):
            text = "".join(json.dumps(row) + "\n" for row in rows[at : at + frame])
            file.write(compressor.compress(text.encode("utf-8")))


def _json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _lines(path: Path, rows: list[Json]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _metrics(rng: random.Random, step: int, level: float, probing: bool) -> Json:
    def near(value: float, spread: float = 0.08) -> float:
        return max(0.0, value * (1 + rng.gauss(0, spread)))

    wrong = near(0.92 * (1 - level), 0.06)
    row: Json = {
        "step": step,
        "generated_tokens": int(step * (4300 if probing else 3650)),
        "prefilled_tokens": step * 9000,
        "seconds": step * (7.9 if probing else 6.4),
        "em/train": min(1.0, near(level - 0.05)),
        "reward/mean": near(level - 0.05),
        "dead_ends/rate": wrong,
        "groups/all_wrong_before": near(0.62 * (1 - level)),
        "groups/no_signal": near(0.42, 0.1),
        "tokens/policy": near(3650),
        "tokens/evidence": near(5400),
        "tokens/notice": near(60, 0.4),
        "tokens/cue": None,
        "loss": rng.gauss(0, 0.01),
        "grad_norm": near(0.6, 0.2),
        "lr": 3e-4,
        "kl": None,
        "rows": 160,
        "rows_skipped": 0,
        "searches/mean": near(1.2 + 0.7 * level, 0.04),
        "alpha": 0.0,
        "ess": 1.0,
        "ratio/base": 1 + rng.gauss(0, 0.002),
        "clip/base": near(0.004, 0.5),
        "time/rollout": near(3.4),
        "time/score": near(0.7),
        "time/update": near(1.9),
    }
    if not probing:
        return row
    drawn = max(1, round(near(160 * wrong * 0.3)))
    right = round(drawn * (0.25 + 0.3 * level))
    kept = min(drawn, round(160 * 0.1))
    return row | {
        "groups/all_wrong_after": row["groups/all_wrong_before"] * near(0.62, 0.06),
        "probes/drawn": drawn,
        "probes/right": right,
        "probes/kept": kept,
        "probes/kept_right": round(kept * right / drawn),
        "tokens/policy": near(4300),
        "tokens/cue": drawn * 13,
        "alpha": kept / (160 + kept),
        "failure_rate": wrong,
        "keep_ratio": 0.1,
        "ess": min(1.0, near(0.93, 0.02)),
        "ratio/prefix": near(0.98, 0.01),
        "ratio/cue": near(0.06, 0.3) if step % 7 else None,
        "ratio/suffix": near(1.0, 0.03),
        "clip/prefix": near(0.006, 0.5),
        "clip/cue": near(0.3, 0.2),
        "clip/suffix": near(0.03, 0.3),
        "time/probe": near(1.4),
    }


def _evaluations(
    rng: random.Random, curve: list[float], steps: int, probing: bool, finished: bool
) -> list[Json]:
    rows = []
    every = max(1, steps // 6)
    for step in [*range(0, steps, every), *([steps] if finished else [])]:
        for name, shift in (("held-out", 0.0), ("fresh", 0.02)):
            em = min(0.99, max(0.01, curve[step] + shift + rng.gauss(0, 0.012)))
            easy, hard = min(0.99, em + 0.1), max(0.01, em - 0.1)
            rows.append(
                {
                    "step": step,
                    "generated_tokens": step * (4300 if probing else 3650),
                    "set": name,
                    "em": interval(em),
                    "f1": interval(min(1.0, em + 0.03)),
                    "by_hops": {"1": interval(easy, 150), "2": interval(hard, 150)},
                    "searches": 1.2 + em,
                    "unanswered": 0.02,
                    "seconds": 4.0,
                }
            )
    return rows


# ---- rollouts

PEOPLE = (
    "Anna Berg",
    "Otto Falk",
    "Clara Holm",
    "Hugo Strand",
    "Vera Lund",
    "Emil Dahl",
    "Ruth Weiss",
    "Karl Novak",
)
PLACES = ("Oskel", "Tarn", "Velmora", "Brunfeld", "Kessin", "Aldova", "Mirrow", "Dunhal")
COUNTRIES = ("Velland", "Ostria", "Karvania", "Morland")
CUES = (
    "<think> maybe this is not the right one i should look again",
    "<think> that may be wrong i need to search once more",
    "<think> something is missing here so i should search again",
)


def evidence(rng: random.Random, title: str, fact: str, extra: str = "") -> str:
    other = rng.choice([place for place in PLACES if place != title])
    return (
        f"\n\n<information>Doc 1(Title: {title}) {fact} {extra}\n"
        f"Doc 2(Title: {other}) {other} is a town of {rng.randint(9, 400)} thousand.</information>\n\n"
    )


def segment(rng: random.Random, origin: str, text: str) -> Json:
    inserted = origin in ("evidence", "notice")
    logp = 0.0 if inserted else -len(text.split()) * rng.uniform(0.1, 0.5) * (6 if origin == "cue" else 1)
    return {
        "origin": origin,
        "text": text,
        "logp": logp,
        "weight": None if inserted else rng.uniform(0.92, 1.08),
    }


def rollout(
    step: int, index: int, kind: str, question: Json, segments: list[Json], answer: str | None, **more: Any
) -> Json:
    em = float(answer in question["answers"])
    # Words stand in for tokens, so that origins agree with segments as they do in a real run.
    origins = [ORIGINS.index(one["origin"]) for one in segments for _ in one["text"].split()]
    tokens = len(origins)
    row = {
        "step": step,
        "index": index,
        "kind": kind,
        "kept": True,
        "question": question,
        "group": question["id"],
        "parent": None,
        "cut": None,
        "cue": None,
        "cue_text": None,
        "score": None,
        "advantage": 1.2 if em else -0.6,
        "reward": em,
        "em": em,
        "answer": answer,
        "stop": "answer" if answer else "turns",
        "weight": 1.0,
        "segments": segments,
        "tokens": list(range(tokens)),
        "origins": origins,
        "logps": [-0.3] * tokens,
    }
    return row | more


def _rollouts(
    rng: random.Random, curve: list[float], probing: bool, hostile: bool, per_step: int
) -> list[Json]:
    rows: list[Json] = []
    for step in range(1, len(curve)):
        for pair in range(per_step // 2):
            rows += _pair(
                rng, step, 2 * pair, curve[step], probing, HOSTILE[(step + pair) % 4] if hostile else ""
            )
    return rows


def _pair(rng: random.Random, step: int, index: int, level: float, probing: bool, evil: str) -> list[Json]:
    """A base rollout, and its probe where it was a dead end."""
    person, place, wrong = rng.choice(PEOPLE), *rng.sample(PLACES, 2)
    country, elsewhere = rng.sample(COUNTRIES, 2)
    question = {
        "id": f"q{step}-{index}",
        "text": f"In which country was {person} born? {evil}".strip(),
        "answers": [country.lower(), f"the republic of {country.lower()}"],
        "hops": 2,
        "kind": "birth-country",
    }
    begin = [
        segment(
            rng,
            "policy",
            f"<think> i need the town {person} was born in </think>\n<search> {person} birthplace </search>",
        ),
        segment(
            rng, "evidence", evidence(rng, person, f"{person} was a painter who was born in {place}.", evil)
        ),
    ]
    right = rng.random() < level
    given = country if right else elsewhere
    thought = f"<think> {person} was born in {place}, which must be in {given} </think>\n"
    base = rollout(
        step,
        index,
        "base",
        question,
        [*begin, segment(rng, "policy", f"{thought}<answer> {given} </answer>")],
        given.lower(),
    )
    if rng.random() < 0.08:
        notice = segment(rng, "notice", "\nMy action is not correct. I should search or answer.\n")
        base = rollout(step, index, "base", question, [*begin, notice], None)
        return [base]
    if right or not probing:
        return [base]
    better = rng.random() < 0.3 + 0.4 * level
    final = country if better else rng.choice([elsewhere, wrong])
    cue = rng.randrange(len(CUES))
    branch = [
        segment(rng, "cue", CUES[cue]),
        segment(rng, "policy", f" </think>\n<search> {place} country </search>"),
        segment(rng, "evidence", evidence(rng, place, f"{place} is a town in the north of {country}.")),
        segment(rng, "policy", f"<think> {place} lies in {final} {evil}</think>\n<answer> {final} </answer>"),
    ]
    cut = sum(len(one["text"].split()) for one in begin) + len(thought.split())
    probe = rollout(
        step,
        index,
        "probe",
        question,
        [*begin, segment(rng, "policy", thought), *branch],
        final.lower(),
        parent=index,
        cut=cut,
        cue=cue,
        cue_text=CUES[cue],
        score=-2.7 + rng.gauss(0, 0.4),
        kept=rng.random() < 0.6,
        weight=rng.uniform(0.8, 1.1),
    )
    return [base, probe]

"""What a start can do, and how it fails: the printed property of every shipped policy.

    python benchmarks/starts.py                       # both shipped starts
    python benchmarks/starts.py FOLDER … --worlds 10  # other model folders
    python benchmarks/starts.py --record              # also written into each start's start.json

Each of `--worlds` fresh fictional worlds asks `--questions` held-out questions, one rollout for each. Shares
come with their count and a 95 % Wilson interval. A dead end is a wrong answer at temperature 1; "recovered"
continues it once at temperature 1, from before its answer tag, under what the row names.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rexrag.agent.episode import Episode
from rexrag.agent.prompts import cue_pool
from rexrag.config import PolicyConfig
from rexrag.data.demonstrations import HARD_KINDS
from rexrag.data.world import World
from rexrag.engine.local.loading import load_policy, resolve
from rexrag.engine.local.policy import LocalPolicy
from rexrag.engine.local.warmup import EMBEDDED_AGENT
from rexrag.io import write_json
from rexrag.retrieval.bm25 import BM25Retriever
from rexrag.types import Origin, Question, Rollout

TOPK = 2
FIRST_WORLD = 7_000_000
"""Seeds of the worlds: far from those that a warm-up draws only by chance (1 in 10⁹ each)."""
UNRELATED = "question where who country company spouse place of is the born based".split()  # noqa: SIM905


@dataclass(frozen=True)
class Share:
    """k of n, with a 95 % Wilson interval (Wilson 1927)."""

    k: float
    n: int

    def interval(self) -> tuple[float, float]:
        if not self.n:
            return 0.0, 1.0
        z, p, n = 1.959964, self.k / self.n, self.n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        if not self.n:
            return "   –"
        low, high = self.interval()
        return f"{self.k / self.n:7.4f}  [{low:.4f}, {high:.4f}]  n = {self.n}"

    def row(self) -> dict[str, float]:
        low, high = self.interval()
        value = self.k / self.n if self.n else float("nan")
        return {"value": round(value, 5), "low": round(low, 5), "high": round(high, 5), "n": self.n}


@dataclass
class Run:
    """All rollouts of all worlds under one temperature."""

    episodes: list[Episode]
    rollouts: list[Rollout]

    def share(
        self, of: Callable[[Rollout], bool], among: Callable[[Rollout], bool] = lambda _: True
    ) -> Share:
        chosen = [r for r in self.rollouts if among(r)]
        return Share(sum(of(r) for r in chosen), len(chosen))


class Fresh:
    """Fresh worlds with their questions and retrievers."""

    def __init__(self, policy: LocalPolicy, worlds: int, questions: int, seed: int) -> None:
        self.policy = policy
        self.worlds = []
        for i in range(worlds):
            world = World(FIRST_WORLD + 1000 * seed + i)
            asked = world.questions("held-out", questions, seed)
            self.worlds.append((asked, BM25Retriever.build(world.documents)))
        self.generated = 0

    def run(self, temperature: float, only: Callable[[Question], bool] = lambda _: True) -> list[Run]:
        """One rollout of each question; a run for each world."""
        runs = []
        for i, (questions, retriever) in enumerate(self.worlds):
            chosen = [q for q in questions if only(q)]
            episodes = [Episode(q, self.policy.codec, EMBEDDED_AGENT, TOPK) for q in chosen]
            self._drive(episodes, retriever, temperature, seed=i)
            runs.append(Run(episodes, [e.rollout() for e in episodes]))
        return runs

    def probe(
        self, runs: Sequence[Run], which: Callable[[Rollout], bool], cues: Sequence[str], seed: int
    ) -> list[tuple[Rollout, Rollout]]:
        """(parent, probe) of every chosen rollout that answered, under a random one of `cues`, if any."""
        rng = random.Random(seed)
        encode = self.policy.codec.encode
        pairs = []
        for i, (run, (_, retriever)) in enumerate(zip(runs, self.worlds, strict=True)):
            chosen = [
                (e, r) for e, r in zip(run.episodes, run.rollouts, strict=True) if which(r) and r.answer
            ]
            numbers = [rng.randrange(len(cues)) if cues else None for _ in chosen]
            probes = [
                e.fork(encode(cues[k]) if k is not None else (), k, 0)
                for (e, _), k in zip(chosen, numbers, strict=True)
            ]
            self._drive(probes, retriever, 1.0, seed=1000 * seed + i)
            pairs += [(r, p.rollout()) for (_, r), p in zip(chosen, probes, strict=True)]
        return pairs

    def _drive(
        self, episodes: list[Episode], retriever: BM25Retriever, temperature: float, seed: int
    ) -> None:
        session = self.policy.session()
        session.run(episodes, retriever, temperature, seed)
        self.generated += session.generated_tokens
        session.close()


def right(rollout: Rollout) -> bool:
    return rollout.em == 1.0


def hard(rollout: Rollout) -> bool:
    return rollout.question.kind in HARD_KINDS


def hops(count: int) -> Callable[[Rollout], bool]:
    return lambda rollout: rollout.question.hops == count


def dead_end(rollout: Rollout) -> bool:
    return rollout.answer is not None and rollout.em == 0.0


def cue_variants(policy: LocalPolicy) -> dict[str, list[str]]:
    """What a dead end is continued under: name -> texts to draw from."""
    pool = list(cue_pool("tiny"))
    rng = random.Random(0)
    words = [cue.split()[1:] for cue in pool]
    return {
        "resample, no cue": [],
        "pool cue (tiny)": pool,
        "demonstrated doubts (tiny_demo)": list(cue_pool("tiny_demo")),
        "shuffled cue words": [" ".join(["<think>", *rng.sample(w, len(w))]) for w in words],
        "unrelated words": [" ".join(["<think>", *rng.choices(UNRELATED, k=len(w))]) for w in words],
        "a bare <think>": ["<think>"],
    }


def doubts_itself(policy: LocalPolicy) -> Callable[[Rollout], bool]:
    """Does the policy open a second thought in a turn by itself?"""
    (opening,), (closing,) = policy.codec.encode("<think>"), policy.codec.encode("</think>")

    def check(rollout: Rollout) -> bool:
        policy_only = zip(rollout.tokens, rollout.tokens[1:], rollout.origins[1:], strict=False)
        return any(a == closing and b == opening and o == int(Origin.POLICY) for a, b, o in policy_only)

    return check


def auc(pairs: Sequence[tuple[Rollout, Rollout]]) -> tuple[float, float, int]:
    """(area under the curve, its standard error, n): mean cue log-prob as a predictor of a probe's success.

    Standard error: Hanley & McNeil 1982.
    """
    scores: dict[bool, list[float]] = {True: [], False: []}
    for _, probe in pairs:
        assert probe.cut is not None
        cue = probe.logps[probe.cut : probe.cut + probe.cue_length]
        scores[right(probe)].append(sum(cue) / len(cue))
    good, bad = scores[True], scores[False]
    if not good or not bad:
        return float("nan"), float("nan"), len(good) + len(bad)
    area = sum((g > b) + 0.5 * (g == b) for g in good for b in bad) / (len(good) * len(bad))
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (len(good) - 1) * (q1 - area**2) + (len(bad) - 1) * (q2 - area**2)
    return area, math.sqrt(max(0.0, variance) / (len(good) * len(bad))), len(good) + len(bad)


def joined(runs: Sequence[Run]) -> Run:
    return Run([e for run in runs for e in run.episodes], [r for run in runs for r in run.rollouts])


def measure(policy: LocalPolicy, worlds: int, questions: int, seed: int) -> dict[str, object]:
    """Print the table of one start and return it."""
    fresh = Fresh(policy, worlds, questions, seed)
    table: dict[str, object] = {}

    def show(name: str, share: Share) -> None:
        table[name] = share.row()
        print(f"  {name:52} {share}", flush=True)

    greedy = joined(fresh.run(0.0))
    show("greedy EM", greedy.share(right))
    for count in (1, 2, 3):
        show(f"greedy EM, {count} hop", greedy.share(right, hops(count)))
    show("greedy EM, hard kinds", greedy.share(right, hard))
    show("greedy EM, other kinds", greedy.share(right, lambda r: not hard(r)))
    by_world = fresh.run(1.0)
    sampled = joined(by_world)
    show("EM at T = 1", sampled.share(right))
    show("hard kinds: right by chance at T = 1", sampled.share(right, hard))
    show("other kinds: right at T = 1", sampled.share(right, lambda r: not hard(r)))
    show("dead ends at T = 1", sampled.share(dead_end))
    show("no answer at T = 1", sampled.share(lambda r: r.answer is None))
    show("doubts by itself at T = 1", sampled.share(doubts_itself(policy)))
    for kind, which in (
        ("hard", lambda r: dead_end(r) and hard(r)),
        ("other", lambda r: dead_end(r) and not hard(r)),
    ):
        for number, (name, cues) in enumerate(cue_variants(policy).items()):
            pairs = fresh.probe(by_world, which, cues, seed=number)
            show(f"{kind} dead ends recovered: {name}", Share(sum(right(p) for _, p in pairs), len(pairs)))
            if name.startswith("pool cue") and kind == "hard":
                area, error, n = auc(pairs)
                table["AUC of mean cue log-prob for success"] = {"value": area, "error": error, "n": n}
                auc_text = f"{area:7.4f}  ± {error:.4f} (s.e.)  n = {n}"
                print(f"  {'AUC of mean cue log-prob for success':52} {auc_text}")
                first = [math.exp(p.logps[p.cut]) for _, p in pairs if p.cut is not None]
                table["p(second <think> | hard dead end)"] = {
                    "value": sum(first) / max(1, len(first)),
                    "n": len(first),
                }
                print(f"  {'p(second <think> | hard dead end)':52} {sum(first) / max(1, len(first)):7.4f}")
    for name in ("pool cue (tiny)", "a bare <think>"):
        pairs = fresh.probe(by_world, right, cue_variants(policy)[name], seed=99)
        show(f"right answers that survive: {name}", Share(sum(right(p) for _, p in pairs), len(pairs)))
    rate = sum(len(r.tokens) for r in sampled.rollouts) / len(sampled.rollouts)
    said = sum(r.count(Origin.POLICY) for r in sampled.rollouts) / len(sampled.rollouts)
    table["tokens a rollout"] = {"all": round(rate, 1), "generated": round(said, 1)}
    print(f"  {'tokens a rollout at T = 1: all, generated':52} {rate:7.1f} {said:7.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("starts", nargs="*", default=["embedded", "embedded-easy"])
    parser.add_argument("--worlds", type=int, default=10)
    parser.add_argument("--questions", type=int, default=300, help="a world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="write the table into start.json")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tables = {}
    for start in options.starts:
        began = time.perf_counter()
        print(
            f"{start}: {options.worlds} worlds x {options.questions} questions, seed {options.seed}",
            flush=True,
        )
        policy = load_policy(PolicyConfig(path=start, device="cpu"))
        tables[start] = measure(policy, options.worlds, options.questions, options.seed)
        print(f"  {time.perf_counter() - began:.0f} s")
        if options.record:
            file = Path(resolve(start)) / "start.json"
            facts = json.loads(file.read_text(encoding="utf-8"))
            command = f"python benchmarks/starts.py {start} --worlds {options.worlds} --questions " \
                      f"{options.questions} --seed {options.seed}"  # fmt: skip
            write_json(file, facts | {"measured": {"command": command, **tables[start]}})
    if options.json:
        print(json.dumps(tables, indent=2))


if __name__ == "__main__":
    main()

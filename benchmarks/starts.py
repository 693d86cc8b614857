"""What a start can do, and how it fails: the printed property of every shipped policy.

    python benchmarks/starts.py                       # the shipped starts
    python benchmarks/starts.py FOLDER … --worlds 10  # other model folders
    python benchmarks/starts.py --record              # also written into each start's start.json

Each of `--worlds` fresh fictional worlds asks `--questions` held-out questions: once greedily, once at
temperature 1. Hard questions are those of the kinds on which the demonstrator gave up. Shares come with a
95 % Wilson interval. A dead end is a wrong answer at temperature 1; "recovered" continues it once at
temperature 1, from before its answer tag, under what the row names.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch

from rexrag.agent.prompts import cue_pool
from rexrag.config import presets
from rexrag.config.schema import PolicyConfig
from rexrag.data.world.demonstrator import HARD_KINDS
from rexrag.data.world.generator import World
from rexrag.engine.loading import EMBEDDED, load_policy, resolve
from rexrag.engine.sampling.policy import LocalPolicy
from rexrag.experiments.diagnosis import WITH_CUE, WITHOUT_CUE, Figure, Observed, describe, lines, observe
from rexrag.io import write_json
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.stats import share
from rexrag.types import Origin, Question

FIRST_WORLD = 7_000_000
"""Seeds of the worlds: far from those that a warm-up draws only by chance (1 in 10⁹ each)."""
UNRELATED = "question where who country company spouse place of is the born based".split()  # noqa: SIM905


def cue_variants() -> dict[str, list[str]]:
    """What a dead end is continued under: name -> texts to draw from."""
    pool = list(cue_pool("tiny"))
    rng = random.Random(0)
    words = [cue.split()[1:] for cue in pool]
    return {
        WITHOUT_CUE: [],
        WITH_CUE: pool,
        "the doubts of its demonstrations": list(cue_pool("tiny_demo")),
        "a cue's words, shuffled": [" ".join(["<think>", *rng.sample(w, len(w))]) for w in words],
        "unrelated words": [" ".join(["<think>", *rng.choices(UNRELATED, k=len(w))]) for w in words],
        "a bare <think>": ["<think>"],
    }


def is_hard(question: Question) -> bool:
    return question.kind in HARD_KINDS


def measure(policy: LocalPolicy, worlds: int, questions: int, seed: int) -> dict[str, Figure]:
    """The figures of one start over all worlds."""
    config = presets.resolve(None)
    seen = Observed()
    for i in range(worlds):
        world = World(FIRST_WORLD + 1000 * seed + i)
        retriever = BM25Retriever.build(world.documents)
        asked = world.questions("held-out", questions, seed)
        seen.add(observe(policy, retriever, asked, config, rollouts=1, seed=i, cues=cue_variants()))
    by_hops = {}
    for hops in (1, 2, 3):
        right = [r.em == 1.0 for r in seen.greedy if r.question.hops == hops]
        by_hops[f"greedy EM, {hops} hop"] = share(sum(right), len(right))
    for probes in seen.probes.values():  # the other kinds' dead ends are few and of another sort
        probes[:] = [probe for probe in probes if is_hard(probe.parent.question)]
    said = [r.count(Origin.POLICY) for r in seen.sampled]
    tokens = {"value": round(sum(said) / len(said), 2), "n": len(said)}
    figures = by_hops | describe(seen, policy, is_hard) | {"tokens generated a rollout": tokens}
    return {name: {k: round(v, 5) for k, v in figure.items()} for name, figure in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("starts", nargs="*", default=sorted(EMBEDDED))
    parser.add_argument("--worlds", type=int, default=10)
    parser.add_argument("--questions", type=int, default=300, help="a world")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write the figures into start.json")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {}
    for start in options.starts:
        began = time.perf_counter()
        print(
            f"{start}: {options.worlds} worlds x {options.questions} questions, seed {options.seed}",
            flush=True,
        )
        policy = load_policy(PolicyConfig(path=start, device="cpu"))
        tables[start] = measure(policy, options.worlds, options.questions, options.seed)
        for what, value, n in lines(tables[start]):
            print(f"  {what:58} {value:>26}  n = {n}")
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)
        if options.record:
            file = Path(resolve(start)) / "start.json"
            facts = json.loads(file.read_text(encoding="utf-8"))
            command = (
                f"python benchmarks/starts.py {start} --worlds {options.worlds} "
                f"--questions {options.questions} --seed {options.seed}"
            )
            write_json(file, facts | {"measured": {"command": command, **tables[start]}})
    if options.json:
        print(json.dumps(tables, indent=2))


if __name__ == "__main__":
    main()

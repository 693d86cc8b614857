"""What a probe costs beside a rollout from scratch: this sampler, and reading everything again every turn.

    python benchmarks/probe.py                                              # a shipped checkpoint
    python benchmarks/probe.py --model models/smollm2-2wiki --rollouts 32
    python benchmarks/probe.py --probability 0.2                            # few probes, as in a real step

`--rollouts` rollouts are drawn; each that answered is cut before its answer and goes on under a cue, whether
it was wrong or not, so that both batches are about as large. `local` starts a probe from its parent's cache.
`official` is the official code's way on transformers: every turn decodes and encodes the whole row and
prefills it again, in one left-padded batch; a probe starts from its text.

Cost: seconds (or tokens read and sampled by the model, padding included) of a probe over those of a rollout.
Share of new: tokens that are new in a probe (sampled, cue, evidence) over all tokens of a rollout (prompt
counted once for its group). The goal is a cost in seconds of at most that share + 0.10.
Share of sampled: tokens sampled in a probe over those of a rollout. Forwards: those of the whole batch
of probes over those of the batch of rollouts, which time follows where a few long rows run on alone.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from clock import counted_forwards
from common import (
    DTYPES,
    Work,
    configure,
    grouped,
    machine,
    median,
    parser,
    questions_and_retriever,
    spread,
    table,
    write,
)
from rexrag.agent.episode import Episode, State
from rexrag.config.schema import Config
from rexrag.engine.loading import load_policy, resolve
from rexrag.engine.sampling.policy import LocalPolicy
from rexrag.retrieval.base import Retriever
from rexrag.training.components import load_cues
from rexrag.types import Origin, Question
from turns import Generate, drive

Run = Callable[[Sequence[Episode], int], int]
"""Runs episodes under a seed; how many tokens the model ran for it."""


def local(policy: LocalPolicy, retriever: Retriever, temperature: float) -> tuple[Run, Callable[[], None]]:
    session = policy.session()

    def run(episodes: Sequence[Episode], seed: int) -> int:
        before = session.generated_tokens + session.prefilled_tokens
        session.run(episodes, retriever, temperature, seed)
        return session.generated_tokens + session.prefilled_tokens - before

    return run, session.close


def official(engine: Generate, policy: LocalPolicy, retriever: Retriever) -> tuple[Run, Callable[[], None]]:
    def run(episodes: Sequence[Episode], seed: int) -> int:
        torch.manual_seed(seed)
        before, old = engine.read_tokens, sum(len(e.tokens) for e in episodes)
        drive(episodes, retriever, engine, policy.codec)  # type: ignore[arg-type]
        return engine.read_tokens - before + sum(len(e.tokens) for e in episodes) - old

    return run, lambda: None


def forks(
    episodes: Sequence[Episode], cues: Sequence[Sequence[int]], probability: float, seed: int
) -> list[Any]:
    """A probe of each answered rollout, by a coin."""
    rng = random.Random(seed)
    chosen = [e for e in episodes if e.answer is not None and rng.random() < probability]
    made = []
    for parent in chosen:
        cue = rng.randrange(len(cues))
        made.append(parent.fork(cues[cue], cue))
    return [probe for probe in made if probe.state is not State.DONE]


def one_round(
    run: Run,
    questions: Sequence[Question],
    policy: LocalPolicy,
    config: Config,
    probability: float,
    seed: int,
    forwards: list[int],
) -> dict[str, float]:
    """Rollouts, then probes of them. `forwards` grows by one entry with each forward of the model."""
    trie = load_cues(config, policy.codec)
    assert trie is not None
    episodes = [
        Episode(question, policy.codec, config.agent, config.retriever.topk) for question in questions
    ]
    before, start = len(forwards), time.perf_counter()
    base_tokens = run(episodes, seed)
    base_seconds, base_forwards = time.perf_counter() - start, len(forwards) - before
    probes = forks(episodes, trie.cues, probability, seed)
    if not probes:
        raise SystemExit("no rollout answered, or the coin spared them all: there is nothing to probe")
    before, start = len(forwards), time.perf_counter()
    probe_tokens = run(probes, seed + 1)
    probe_seconds, probe_forwards = time.perf_counter() - start, len(forwards) - before
    base, cut = Work.of([e.rollout() for e in episodes]), sum(p.cut for p in probes)
    new = sum(len(p.tokens) for p in probes) - cut
    sampled = sum(p.rollout().origins[p.cut :].count(Origin.POLICY) for p in probes) / len(probes)
    share = (new / len(probes)) / ((base.prompts + base.generated + base.appended) / len(episodes))
    cost = (probe_seconds / len(probes)) / (base_seconds / len(episodes))
    return {
        "rollouts": len(episodes),
        "probes": len(probes),
        "rollout_s": base_seconds / len(episodes),
        "probe_s": probe_seconds / len(probes),
        "rollout_tokens": base_tokens / len(episodes),
        "probe_tokens": probe_tokens / len(probes),
        "cost": cost,
        "token_cost": (probe_tokens / len(probes)) / (base_tokens / len(episodes)),
        "share_of_new": share,
        "share_of_sampled": sampled / (base.generated / len(episodes)),
        "forwards": probe_forwards / base_forwards,
        "above_share": cost - share,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rollouts", type=int, default=64)
    options.add_argument("--group", type=int, default=5, help="rollouts of one question, as configured")
    options.add_argument("--probability", type=float, default=1.0, help="chance that a rollout is probed")
    args = options.parse_args()
    config = configure(args)
    questions, retriever = questions_and_retriever(config)
    policy = load_policy(config.policy)
    temperature = config.agent.temperature
    engine = Generate(resolve(args.model), policy.codec, DTYPES[args.dtype], temperature)  # type: ignore[arg-type]
    runs: dict[str, list[dict[str, float]]] = {"local": [], "official": []}
    with counted_forwards(policy.model, engine.model) as forwards:
        for number in range(-1, args.rounds):  # round -1 warms up and is not counted
            chosen = grouped(questions, args.rollouts, args.group, number * args.rollouts // args.group)
            for name in runs if number % 2 else [*runs][::-1]:
                opened = local(policy, retriever, temperature)
                run, close = opened if name == "local" else official(engine, policy, retriever)
                seed = args.seed + 2 * number + 2
                found = one_round(run, chosen, policy, config, args.probability, seed, forwards)
                close()
                if number >= 0:
                    runs[name].append(found)
                    print(f"  round {number + 1}, {name}: cost {found['cost']:.3f}", file=sys.stderr)
    middle = {name: {key: median(r[key] for r in of) for key in of[0]} for name, of in runs.items()}
    header = ["", "s/rollout", "s/probe", "cost", "lowest–highest"]
    header += ["token cost", "new", "sampled", "forwards", "above"]
    keys = ["rollout_s", "probe_s", "cost", "", "token_cost"]
    keys += ["share_of_new", "share_of_sampled", "forwards", "above_share"]
    probes = middle["local"]["probes"]
    print(f"{args.model}: {args.rollouts} rollouts, {probes:.0f} probes, {args.rounds} rounds")
    rows = [
        (name, *(m[key] if key else spread([r["cost"] for r in runs[name]]) for key in keys))
        for name, m in middle.items()
    ]
    print(table(header, rows))
    pairs = zip(runs["official"], runs["local"], strict=True)
    ratio = median(theirs["probe_s"] / ours["probe_s"] for theirs, ours in pairs)
    print(f"a probe the official way takes {ratio:.1f} times as long")
    figures = {"machine": machine(args.dtype), "model": args.model, "median": middle, "rounds": runs}
    write(args.json, {**figures, "official_over_local_probe": ratio})


if __name__ == "__main__":
    main()

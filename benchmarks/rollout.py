"""Generated tokens a second of multi-turn search rollouts: this sampler and what one would use instead.

    python benchmarks/rollout.py                                   # a shipped checkpoint, 64 and 256 rollouts
    python benchmarks/rollout.py --model models/smollm2-2wiki --rollouts 8,32,128
    python benchmarks/rollout.py --trl-python /path/bin/python --vllm-python /path/bin/python
    python benchmarks/rollout.py --engines local --rounds 9        # this sampler alone

The same questions, prompts, BM25 retriever, stop rules, token budget and temperature for each engine:
  local         this sampler: caches are kept over turns, a prompt is read once for its group
  transformers  one left-padded `generate` a turn, stopped at the closing tags; the whole row is read again
  trl           GRPOTrainer's own generation of a turn (its transformers path), likewise
  vllm          prefix caching; every row goes on by itself; with log-probs, as local has them
Each engine is a process of its own; rounds are interleaved, medians are shown. TRL and vLLM need interpreters
in which they and this package's dependencies are installed; they are left out where none is named.

Generated tokens are those that the policy sampled; the time includes reading prompts and evidence,
searching and bookkeeping. Distinct counts tokens that several rollouts have after the same beginning once:
no more than this share has to be run. The roofline is for an engine that shares prompts alone, the least time
for the same tokens with all rollouts at work at once: a decode step reads the weights and the rows' caches at
the measured bandwidth or computes at the measured speed of a matrix product, whichever takes longer, and
prefill computes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import (
    Size,
    configure,
    grouped,
    machine,
    median,
    parser,
    questions_and_retriever,
    roofline,
    spread,
    table,
    write,
)
from rexrag.agent.episode import Episode
from rexrag.config.schema import Config
from rexrag.engine.loading import EMBEDDED, load_policy, resolve
from rexrag.engine.sampling.policy import LocalPolicy
from rexrag.retrieval.base import Retriever
from rexrag.types import Origin, Question

HERE = Path(__file__).parent


class Worker:
    """A `worker.py` process."""

    def __init__(self, engine: str, python: str, given: dict[str, Any]) -> None:
        paths = [str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), engine, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        self._read()

    def ask(self, **asked: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self.process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"{self.process.args}: ended with {self.process.wait()}")


def measure(
    workers: dict[str, Worker], rollouts: int, args: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Interleaved rounds: in each, every engine draws the same questions. The order turns round."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for name in workers:  # a short run first: libraries compile and allocate
        workers[name].ask(rollouts=args.group, group=args.group, first=0, seed=1)
    for number in range(args.rounds):
        names = list(workers)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            asked = {"rollouts": rollouts, "group": args.group, "first": number * rollouts // args.group}
            answer = workers[name].ask(**asked, seed=args.seed + number)
            runs[name].append(answer)
            rate = answer["generated"] / answer["seconds"]
            print(f"  {rollouts} rollouts, round {number + 1}, {name}: {rate:.0f} tok/s", file=sys.stderr)
    return runs


def summary(
    runs: dict[str, list[dict[str, Any]]], size: Size, limits: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Per engine: median tokens a second, ratio to the local sampler by round, share of the roofline."""
    out = {}
    speeds = {name: [run["generated"] / run["seconds"] for run in of] for name, of in runs.items()}
    for name, of in runs.items():
        figures = {key: median(run[key] for run in of) for key in of[0]}
        prefill = (figures["prompts"] + figures["appended"]) / figures["generated"]
        roof = roofline(
            size, figures["rollouts"], figures["context"], prefill,
            limits["read_gb_per_s"] * 1e9, limits["gemm_gflops"] * 1e9,
        )  # fmt: skip
        rates = speeds[name]
        out[name] = {"tokens_per_s": median(rates), "rates": rates, "roofline": roof}
        out[name] |= {"share_of_roofline": median(rates) / roof, "work": figures}
        if "local" in speeds:
            ratios = [mine / rate for mine, rate in zip(speeds["local"], rates, strict=True)]
            out[name] |= {"local_over_this": median(ratios), "ratios": ratios}
    return out


def agreement(
    policy: LocalPolicy, config: Config, questions: list[Question], retriever: Retriever, seed: int
) -> dict[str, float]:
    """The sampler's log-probs against the learner's scores of the same rows, largest and mean difference."""
    chosen = grouped(questions, 16, 4)
    episodes = [Episode(question, policy.codec, config.agent, config.retriever.topk) for question in chosen]
    session = policy.session()
    session.run(episodes, retriever, config.agent.temperature, seed)
    session.close()
    rows = [episode.rollout() for episode in episodes]
    scores = policy.score([(row.prompt, row.tokens) for row in rows], config.agent.temperature)
    gaps = [
        abs(float(score) - logp)
        for row, logps in zip(rows, scores, strict=True)
        for score, logp, origin in zip(logps, row.logps, row.origins, strict=True)
        if origin == Origin.POLICY
    ]
    return {"largest": max(gaps), "mean": sum(gaps) / len(gaps), "tokens": len(gaps)}


def show(count: int, found: dict[str, dict[str, Any]]) -> None:
    rows = [
        (
            name, f["tokens_per_s"], spread(f["rates"]), f.get("local_over_this", "–"),
            f["share_of_roofline"], f["work"]["generated"] / count, f["work"]["appended"] / count,
            f["work"]["turns"], f["work"]["distinct"],
        )
        for name, f in found.items()
    ]  # fmt: skip
    header = (
        "engine",
        "tok/s",
        "lowest–highest",
        "ours ÷ it",
        "of roof",
        "generated",
        "appended",
        "turns",
        "distinct",
    )
    print(f"\n{count} rollouts (generated, appended, turns: of one rollout; distinct: share of their tokens)")
    print(table(header, rows))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rollouts", default="", help="numbers with commas; default 64,256 or 8,32,128")
    options.add_argument("--group", type=int, default=5, help="rollouts of one question, as configured")
    options.add_argument("--engines", default="local,transformers")
    options.add_argument("--trl-python", default="", help="an interpreter that has trl")
    options.add_argument("--vllm-python", default="", help="an interpreter that has vllm")
    args = options.parse_args()
    config = configure(args)
    counts = args.rollouts or ("64,256" if args.model in EMBEDDED else "8,32,128")
    limits = machine(args.dtype)
    policy = load_policy(config.policy)
    size = Size.of(policy.model)
    differences = agreement(policy, config, *questions_and_retriever(config), args.seed)
    del policy
    pythons = dict.fromkeys(args.engines.split(","), sys.executable)
    pythons |= {n: p for n, p in (("trl", args.trl_python), ("vllm", args.vllm_python)) if p}
    given = {"config": config.model_dump(mode="json"), "folder": resolve(args.model), "threads": args.threads}
    workers = {name: Worker(name, python, given) for name, python in pythons.items()}
    gap = differences
    print(
        f"{args.model}, {args.dtype}, {limits['threads']} threads: matrix product "
        f"{limits['gemm_gflops']:.0f} GFLOP/s, memory {limits['read_gb_per_s']:.1f} GB/s\n"
        f"log-probs of the sampler against the learner's: largest difference {gap['largest']:.1e}, "
        f"mean {gap['mean']:.1e} ({gap['tokens']} tokens)"
    )
    figures: dict[str, Any] = {"machine": limits, "model": args.model, "size": size, "agreement": gap}
    for count in map(int, counts.split(",")):
        figures[str(count)] = summary(measure(workers, count, args), size, limits)
        show(count, figures[str(count)])
        write(args.json, figures)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()

"""Wall time of a whole training step by phase, and how it grows.

    python benchmarks/step.py                               # the quickstart's step, then growth
    python benchmarks/step.py --model models/smollm2-2wiki --questions 8 --no-growth
    python benchmarks/step.py --only-growth --sweeps rollouts,turns

A step is `step.collect` and the learner's update: rollout, probe, score, correct, learn. `model` is the share
of the whole that is spent inside the model, its backward pass and the optimizer.

Growth needs rollouts whose size is given, not chosen by a policy: there a model with random weights samples
turns of a fixed number of tokens, each of which searches, and the last of which answers, right by a coin.
  rollouts   questions grow, five rollouts each
  length     tokens of a turn grow
  turns      turns grow while the length of the response stays: a turn gets shorter
  model      the hidden size grows
Every point runs in a process of its own, whose peak memory is read. Exponents are least squares in logarithms
of time over what grows; 1 is linear, 0 is flat.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import zlib
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rexrag.training.step
from clock import model_clock
from common import (
    configure,
    machine,
    median,
    parser,
    peak_memory,
    questions_and_retriever,
    reset_peak,
    table,
    write,
)
from rexrag.agent.episode import Episode
from rexrag.config.schema import Config
from rexrag.engine.loading import load_engine, resolve
from rexrag.training.components import load_cues
from rexrag.training.step import StepContext, collect
from rexrag.types import Turn

PHASES = ("rollout", "probe", "score", "correct", "learn")
EVIDENCE = 32
RIGHT = 0.3
"""Share of paced answers that are right."""
BASE = {"questions": 8, "turns": 4, "turn_tokens": 32, "hidden": 128}
SWEEPS: dict[str, list[dict[str, int]]] = {
    "rollouts": [{"questions": n} for n in (4, 8, 16, 32, 64)],
    "length": [{"turn_tokens": n} for n in (16, 32, 64, 128, 256)],
    "turns": [{"turns": n, "turn_tokens": 576 // n - EVIDENCE} for n in (2, 3, 6, 9, 12)],
    "model": [{"hidden": n} for n in (128, 256, 384, 512, 768)],
}


class Paced(Episode):
    """Every turn samples exactly its `turn_tokens`, then searches; the last one answers."""

    def _look(self, token: int) -> None:
        end = len(self.tokens)
        if end < self._limit:
            return
        if len(self.turns) + 1 < self.config.search_turns:
            self._end_turn(Turn(self._turn_start, end, "search", self.question.text, end))
            return
        chance = zlib.crc32(str(self.tokens).encode()) / 2**32
        answer = self.question.answers[0] if chance < RIGHT else "wrong"
        self._end_turn(Turn(self._turn_start, end, "answer", answer, end))


def paced_config(config: Config, point: dict[str, int], folder: str) -> Config:
    """The quickstart with a random model of this size and turns of this length."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny-hard"))
    size = point["hidden"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=size, intermediate_size=round(size * 2.75),
            num_hidden_layers=5, num_attention_heads=size // 32, num_key_value_heads=size // 32,
            max_position_embeddings=8192, tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    agent = {"search_turns": point["turns"], "turn_tokens": point["turn_tokens"], "evidence_tokens": EVIDENCE}
    return config.model_copy(
        update={
            "policy": config.policy.model_copy(update={"path": folder}),
            "agent": config.agent.model_copy(update={**agent, "total_tokens": 8192}),
        }
    )


def steps(config: Config, questions: int, rounds: int, seed: int) -> dict[str, Any]:
    """Medians over rounds of one step each: seconds by phase, and what it was made of."""
    policy, learner = load_engine(config)
    asked, retriever = questions_and_retriever(config)
    context = StepContext(policy, retriever, load_cues(config, policy.codec))
    found = []
    for number in range(-1, rounds):  # round -1 warms up
        reset_peak()
        chosen = [asked[((number + 1) * questions + i) % len(asked)] for i in range(questions)]
        with model_clock(learner.model, learner.optimizer) as clock:
            start = time.perf_counter()
            batch = collect(chosen, context, config, seed + 2 * number + 2)
            drawn = time.perf_counter()
            learner.update(batch.samples, config.algorithm, config.agent.temperature)
            end = time.perf_counter()
        if number < 0:
            continue
        rows = [*batch.rollouts, *(probe.rollout for probe in batch.probes)]
        found.append(
            {
                **{phase: batch.statistics.seconds.get(phase, 0.0) for phase in PHASES[:-1]},
                "learn": end - drawn,
                "total": end - start,
                "model": clock.seconds / (end - start),
                "rollouts": len(batch.rollouts),
                "probes": len(batch.probes),
                "generated": batch.statistics.generated_tokens,
                "response": sum(len(row.tokens) for row in rows) / len(rows),
                "peak_mb": peak_memory() / 1e6,
            }
        )
    parameters = sum(p.numel() for p in learner.model.parameters())
    return {key: median(f[key] for f in found) for key in found[0]} | {"parameters": parameters}


def run_point(config: Config, point: dict[str, int], rounds: int, seed: int) -> dict[str, Any]:
    """A paced step in this process."""
    rexrag.training.step.Episode = Paced  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        return steps(paced_config(config, point, folder), point["questions"], rounds, seed)


def exponent(x: list[float], y: list[float]) -> float:
    """Slope of log y over log x by least squares."""
    a, b = [math.log(v) for v in x], [math.log(max(v, 1e-9)) for v in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    above = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    return above / sum((p - mean_a) ** 2 for p in a)


def growth(sweep: str, args: argparse.Namespace) -> dict[str, Any]:
    """Points of a sweep, each in its own process, and the exponents of its phases."""
    grows = {"rollouts": "rollouts", "length": "response", "turns": "turns", "model": "parameters"}[sweep]
    points = []
    for change in SWEEPS[sweep]:
        point = BASE | change
        command = [sys.executable, __file__, "--point", json.dumps(point), "--rounds", str(args.rounds)]
        command += ["--threads", str(args.threads), "--seed", str(args.seed), "--dtype", args.dtype]
        command += [word for change in args.set for word in ("--set", change)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        points.append(point | json.loads(output.splitlines()[-1]))
        print(f"  {sweep} {points[-1][grows]:,.0f}: {points[-1]['total']:.2f} s", file=sys.stderr)
    x = [float(p[grows]) for p in points]
    exponents = {k: exponent(x, [p[k] for p in points]) for k in (*PHASES, "total", "peak_mb")}
    shown = [phase for phase in PHASES if all(p[phase] > 0 for p in points)]
    print(f"\n{sweep}: {grows}")
    header = (grows, *shown, "total s", "peak MB")
    rows = [(float(p[grows]), *(p[phase] for phase in shown), p["total"], p["peak_mb"]) for p in points]
    last = ("exponent", *(exponents[k] for k in (*shown, "total", "peak_mb")))
    print(table(header, [*rows, last]))
    return {"points": points, "exponents": exponents}


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--questions", type=int, default=0, help="questions of the step; 0: the config's")
    options.add_argument("--sweeps", default=",".join(SWEEPS))
    options.add_argument("--no-growth", action="store_true", help="the step of the model alone")
    options.add_argument("--only-growth", action="store_true")
    options.add_argument("--point", help=argparse.SUPPRESS)
    args = options.parse_args()
    config = configure(args)
    if args.point:
        print(json.dumps(run_point(config, json.loads(args.point), args.rounds, args.seed)))
        return
    figures: dict[str, Any] = {"machine": machine(args.dtype), "model": args.model}
    if not args.only_growth:
        step = figures["step"] = steps(
            config, args.questions or config.train.questions, args.rounds, args.seed
        )
        print(
            f"{args.model}: {step['rollouts']:.0f} rollouts, {step['probes']:.0f} probes, "
            f"{step['generated']:,.0f} tokens sampled, {step['response']:.0f} tokens a response"
        )
        print(table((*PHASES, "total s", "model"), [[step[k] for k in (*PHASES, "total", "model")]]))
    if not args.no_growth:
        figures |= {sweep: growth(sweep, args) for sweep in args.sweeps.split(",")}
    write(args.json, figures)


if __name__ == "__main__":
    main()

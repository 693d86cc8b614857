"""Training: tokens a second, share of the measured matrix-product speed, and what packing saves.

    python benchmarks/learn.py                                             # a shipped checkpoint
    python benchmarks/learn.py --model models/smollm2-2wiki --questions 4 --set policy.train_last_layers=8

One step is drawn once; the learner then updates on it in several ways, in interleaved rounds:
  packed         as it is: rows side by side, each beginning once, rows without advantage skipped
  every row      rows without advantage are run too
  by itself      every row, and every row reads all of itself
  padded         every row, [rows, longest] with padding, in micro-batches of as many tokens
All weights are trained unless `policy.train_last_layers` is set. Tokens a second counts the rows that are
run, prompt and response, without padding. The share of peak counts the operations that those rows need when
each shared beginning is read once (three forwards' worth; less where only the last layers are trained), over
the speed of a large matrix product measured in the same process. `model` is the share of an update inside the
model, its backward pass and the optimizer; the rest is overhead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from clock import model_clock
from common import (
    Size,
    configure,
    machine,
    median,
    parser,
    questions_and_retriever,
    seconds,
    spread,
    table,
    write,
)
from rexrag.config.schema import Config
from rexrag.engine.attention import token_logps
from rexrag.engine.learning import learner as learner_module
from rexrag.engine.learning.learner import LocalLearner
from rexrag.engine.learning.packing import TokenRow, pack, pack_rows
from rexrag.engine.loading import load_engine
from rexrag.training.components import load_cues
from rexrag.training.step import StepContext, collect
from rexrag.types import Sample

Packer = Callable[[Sequence[TokenRow], Sequence[int], int], Iterator[Any]]


@dataclass
class Padded:
    """A micro-batch with padding, in the place of `packing.Pack`."""

    rows: list[int]
    ids: list[list[int]]
    """Prompt and response, all but the last token."""
    prompts: list[int]

    def logps(self, model: Any, temperature: float) -> torch.Tensor:
        length = max(map(len, self.ids))
        ids = torch.tensor([row[:-1] + [0] * (length - len(row)) for row in self.ids])
        mask = torch.tensor([[1] * (len(row) - 1) + [0] * (length - len(row)) for row in self.ids])
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        spans = [(i, p, len(row)) for i, (row, p) in enumerate(zip(self.ids, self.prompts, strict=True))]
        states = torch.cat([hidden[i, start - 1 : end - 1] for i, start, end in spans])
        targets = torch.tensor([token for i, start, end in spans for token in self.ids[i][start:end]])
        return token_logps(model.get_output_embeddings(), states, targets, temperature)


def pad_rows(rows: Sequence[TokenRow], indices: Sequence[int], max_tokens: int) -> Iterator[Padded]:
    """Micro-batches of at most `max_tokens` tokens, padding included, in the order of `indices`."""
    batch: list[int] = []
    longest = 0
    for index in indices:
        length = len(rows[index][0]) + len(rows[index][1])
        if batch and max(longest, length) * (len(batch) + 1) > max_tokens:
            yield _padded(rows, batch)
            batch, longest = [], 0
        batch.append(index)
        longest = max(longest, length)
    if batch:
        yield _padded(rows, batch)


def _padded(rows: Sequence[TokenRow], batch: list[int]) -> Padded:
    ids = [[*rows[i][0], *rows[i][1]] for i in batch]
    return Padded(list(batch), ids, [len(rows[i][0]) for i in batch])


def pack_apart(rows: Sequence[TokenRow], indices: Sequence[int], max_tokens: int) -> Iterator[Any]:
    """`pack_rows`, but every row by itself."""
    batch: list[int] = []
    for index in indices:
        if batch and sum(len(rows[i][0]) + len(rows[i][1]) for i in (*batch, index)) > max_tokens:
            yield pack(rows, [[i] for i in batch])
            batch = []
        batch.append(index)
    if batch:
        yield pack(rows, [[i] for i in batch])


@contextmanager
def packing(packer: Packer) -> Iterator[None]:
    """The learner packs its rows with this."""
    own, learner_module.pack_rows = learner_module.pack_rows, packer  # type: ignore[attr-defined, assignment]
    try:
        yield
    finally:
        learner_module.pack_rows = own  # type: ignore[attr-defined]


def operations(size: Size, samples: Sequence[Sample], model: Any, max_tokens: int) -> float:
    """Of forward and backward over these rows, what they begin with read once."""
    rows: list[TokenRow] = [(sample.prompt, sample.tokens) for sample in samples]
    total = 0.0
    trained = sum(p.numel() for p in model.base_model.parameters() if p.requires_grad)
    embedding = model.get_input_embeddings().weight
    trained -= embedding.numel() if embedding.requires_grad else 0
    back = min(1.0, trained / size.body)
    for made in pack_rows(rows, range(len(rows)), max_tokens):
        body = size.forward(len(made.ids), sum(made.positions) + len(made.ids), 0)
        head = size.forward(0, 0, len(made.targets))
        total += body * (1 + 2 * back) + head * (3 if embedding.requires_grad else 2)
    return total


def draw_tokens(config: Config, questions: int, seed: int) -> tuple[LocalLearner, list[Sample]]:
    policy, learner = load_engine(config)
    asked, retriever = questions_and_retriever(config)
    context = StepContext(policy, retriever, load_cues(config, policy.codec))
    return learner, collect(asked[:questions], context, config, seed).samples


def measure(
    learner: LocalLearner, ways: dict[str, tuple[Packer, list[Sample]]], config: Config, rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """(seconds of an update, seconds of them in the model) of each way in each round."""
    algorithm, temperature = config.algorithm, config.agent.temperature
    out: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(-1, rounds):  # round -1 warms up
        for name, (packer, samples) in ways.items():
            with packing(packer), model_clock(learner.model, learner.optimizer) as clock:
                took = seconds(lambda s=samples: learner.update(s, algorithm, temperature))
            if number >= 0:
                out[name].append((took, clock.seconds))
                print(f"  round {number + 1}, {name}: {took:.2f} s", file=sys.stderr)
    return out


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--questions", type=int, default=0, help="questions of the step; 0: the config's")
    args = options.parse_args()
    args.set = ["policy.train_last_layers=0", "learner.minibatches=1", "learner.lr=1e-9", *args.set]
    config = configure(args)
    learner, samples = draw_tokens(config, args.questions or config.train.questions, args.seed)
    every = [replace(s, advantage=s.advantage or 1e-6) for s in samples]
    run = [s for s in samples if s.advantage != 0.0]
    ways: dict[str, tuple[Packer, list[Sample]]] = {
        "packed": (pack_rows, samples),
        "every row": (pack_rows, every),
        "by itself": (pack_apart, every),
        "padded": (pad_rows, every),
    }
    limits = machine(args.dtype)
    found = measure(learner, ways, config, args.rounds)
    size, rows = Size.of(learner.model), []
    figures: dict[str, Any] = {"machine": limits, "model": args.model, "rows": len(samples)}
    figures |= {"rows_with_advantage": len(run), "ways": {}}
    for name, times in found.items():
        done = run if name == "packed" else every
        tokens = sum(len(s.prompt) + len(s.tokens) for s in done)
        needed = operations(size, done, learner.model, config.learner.micro_tokens)
        took = median(t for t, _ in times)
        slower = median(t / first for (t, _), (first, _) in zip(times, found["every row"], strict=True))
        figures["ways"][name] = {
            "seconds": took, "times": [t for t, _ in times], "tokens_per_s": tokens / took,
            "share_of_peak": needed / took / (limits["gemm_gflops"] * 1e9), "over_every_row": slower,
            "model_share": median(m / t for t, m in times),
        }  # fmt: skip
        f = figures["ways"][name]
        rows.append((name, took, spread(f["times"]), *list(f.values())[2:]))
    prompt = sum(len(s.prompt) for s in samples) / sum(len(s.prompt) + len(s.tokens) for s in samples)
    figures["prompt_share"] = prompt
    print(
        f"{args.model}: {len(samples)} rows, {len(run)} with an advantage, "
        f"{sum(len(s.prompt) + len(s.tokens) for s in samples):,} tokens, {prompt:.0%} of them prompt; "
        f"matrix product {limits['gemm_gflops']:.0f} GFLOP/s"
    )
    header = ("", "seconds", "lowest–highest", "tok/s", "of peak", "÷ every row", "model")
    print(table(header, rows))
    write(args.json, figures)


if __name__ == "__main__":
    main()

"""The training loop: steps, evaluations, checkpoints, resume. What a step does is in `step.py`."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from rexrag.agent.episode import Codec
from rexrag.config.schema import Config, MethodConfig
from rexrag.engine.precision import settled
from rexrag.errors import CheckpointError, DataError
from rexrag.io import write_json
from rexrag.method.filters import adaptive_keep_ratio, update_probe_accuracy
from rexrag.method.probing import adaptive_probability, update_probe_success
from rexrag.retrieval import make_retriever
from rexrag.stats import interval
from rexrag.training.components import Data, Setup, build
from rexrag.training.metrics import describe, diagnose
from rexrag.training.rollout_log import trace_rows
from rexrag.training.run_folder import (
    append,
    environment,
    follow_config,
    last_checkpoint,
    open_run,
    save_checkpoint,
    truncate_logs,
)
from rexrag.training.step import Collected, collect
from rexrag.training.validation import evaluate
from rexrag.types import Question

COUNTS = ("step", "generated_tokens", "prefilled_tokens", "spent_tokens", "rollouts")
"""Cumulative counts that every row of `metrics.jsonl` and `eval.jsonl` carries."""


class Observer(Protocol):
    """Told what happens; the command line draws a progress bar, tests and libraries pass nothing."""

    def started(self, config: Config, folder: Path) -> None: ...

    def evaluated(self, figures: dict[str, Any]) -> None: ...

    def stepped(self, row: dict[str, Any], done: float) -> None: ...


@dataclass(slots=True)
class Progress:
    """What a checkpoint holds besides the learner."""

    step: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    spent_tokens: int = 0
    rollouts: int = 0
    asked: int = 0
    """Questions asked so far."""
    seconds: float = 0.0
    probe_accuracy: float = 0.0
    probe_success: float = 1.0
    """Share of right ones among recent probes, kept or not."""
    digests: dict[str, str] = field(default_factory=dict)

    def done(self, config: Config) -> float:
        """Share of the budget that is spent, by whichever limit is nearest."""
        train = config.train
        limits = (
            (self.step, train.steps),
            (self.generated_tokens, train.max_generated),
            (self.spent_tokens, train.max_tokens),
            (self.rollouts, train.max_rollouts),
            (self.seconds, train.max_seconds),
        )
        return max(spent / limit for spent, limit in limits if limit)


def train(
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    restart: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Run a configuration into `folder` and return its summary (also `summary.json`).

    With `resume`, continue from the newest whole checkpoint; on a CPU the result is bit for bit that of a run
    that was never stopped. With `restart`, what a run left that had saved nothing makes way, once all else is
    known to be well. An interrupt finishes the step, saves, and raises KeyboardInterrupt.
    Raises RexragError with one line.
    """
    config = settled(config)
    if config.engine == "verl":
        from rexrag.verl.launch import launch

        return launch(config, folder, resume, restart)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    setup = build(config)
    if len(setup.data.train) < config.train.questions:
        raise DataError(
            f"{len(setup.data.train)} training questions, train.questions = {config.train.questions}: "
            "expected at least as many questions as a step asks"
        )
    with open_run(folder, config, resume=resume, restart=restart):
        warn_of_overlap(setup.data)
        return _run(config, setup, folder, resume, observer)


def _run(
    config: Config, setup: Setup, folder: Path, resume: bool, observer: Observer | None
) -> dict[str, Any]:
    progress = Progress(probe_accuracy=config.method.keep_ratio, digests=setup.digests)
    if resume:
        progress = _restore(folder, setup)
        follow_config(folder, config, progress.step)
    else:
        write_json(folder / "environment.json", environment(**setup.digests))
    if observer:
        observer.started(config, folder)
    if progress.step == 0 and not resume:
        _evaluate(config, setup, folder, progress, observer)
    with _interrupts() as interrupted:
        while not _finished(config, progress):
            before = progress.done(config)
            row = _step(config, setup, folder, progress)
            if observer:
                observer.stepped(row, progress.done(config))
            last = _finished(config, progress)
            if last or _evaluation_due(config, before, progress.done(config)):
                _evaluate(config, setup, folder, progress, observer)
            if last or interrupted() or progress.step % config.train.save_every == 0:
                _save(config, setup, folder, progress)
            if interrupted() and not last:
                raise KeyboardInterrupt
        summary = summarise(config, folder, progress)
        if interrupted():  # in the last step: the run is whole, but what would come after it is not wanted
            raise KeyboardInterrupt
    return summary


def warn_of_overlap(data: Data) -> None:
    """Say on standard error where held-out questions are training questions too."""
    both = {question.text for question in data.dev} & {question.text for question in data.train}
    if both:
        said = f"{len(both)} of {len(data.dev)} held-out questions are training questions too: not held out"
        print(said, file=sys.stderr)


def questions_of(questions: Sequence[Question], asked: int, count: int, seed: int) -> list[Question]:
    """The next questions after `asked` ones, of seeded permutations of the data, one after the other."""
    chosen = []
    for position in range(asked, asked + count):
        epoch, place = divmod(position, len(questions))
        generator = torch.Generator().manual_seed(step_seed(seed, epoch, "order"))
        order = torch.randperm(len(questions), generator=generator)
        chosen.append(questions[int(order[place])])
    return chosen


def step_seed(seed: int, number: int, purpose: str) -> int:
    """An independent 63-bit seed for each (run seed, step or epoch, purpose)."""
    digest = hashlib.sha256(f"{seed}/{number}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def next_keep_ratio(method: MethodConfig, progress: Progress) -> float:
    """ρ of the next step: `keep_ratio`, or what the kept probes' accuracy makes of it."""
    if method.keep == "adaptive":
        return adaptive_keep_ratio(progress.probe_accuracy, method.keep_ratio, method.keep_floor)
    return method.keep_ratio


def account(
    progress: Progress,
    collected: Collected,
    learned: Mapping[str, float],
    method: MethodConfig,
    keep_ratio: float,
    seconds: float,
) -> dict[str, Any]:
    """Count a finished step in `progress` and return its row of `metrics.jsonl`.

    learned: the learner's figures. seconds: of the whole step.
    """
    figures = {**describe(collected), **learned}
    _count(progress, collected, seconds, int(learned.get("reference_tokens", 0)))
    progress.probe_accuracy = update_probe_accuracy(
        progress.probe_accuracy,
        int(figures["probes/kept_right"]),
        int(figures["probes/kept"]),
        method.keep_momentum,
    )
    progress.probe_success = update_probe_success(
        progress.probe_success, int(figures["probes/right"]), int(figures["probes/drawn"])
    )
    row = position(progress) | {"keep_ratio": keep_ratio, **figures}
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _count(progress: Progress, collected: Collected, seconds: float, reference_tokens: int = 0) -> None:
    """reference_tokens: read by the reference model of a KL term, a scoring pass like others."""
    progress.step += 1
    progress.generated_tokens += collected.generated_tokens
    progress.prefilled_tokens += collected.prefilled_tokens + reference_tokens
    progress.spent_tokens = progress.generated_tokens + progress.prefilled_tokens
    progress.rollouts += len(collected.base) + len(collected.probes)
    progress.seconds += seconds


def log_step(config: Config, codec: Codec, folder: Path, row: dict[str, Any], collected: Collected) -> None:
    """Add a step to the run folder's logs."""
    append(folder / "metrics.jsonl", [row])
    if config.train.log_rollouts:
        rows = trace_rows(collected, row["step"], codec, config.train.log_rollouts)
        append(folder / "rollouts.jsonl.zst", rows)


def _step(config: Config, setup: Setup, folder: Path, progress: Progress) -> dict[str, Any]:
    start = time.perf_counter()
    number, ratio = progress.step + 1, next_keep_ratio(config.method, progress)

    def questions() -> list[Question]:
        progress.asked += config.train.questions
        first = progress.asked - config.train.questions
        return questions_of(setup.data.train, first, config.train.questions, config.seed)

    collected = collect(
        questions(),
        setup.policy,
        setup.retriever,
        setup.trie,
        _this_step(config, progress),
        ratio,
        step_seed(config.seed, number, "sample"),
        setup.learner_policy,
        questions,
    )
    before = time.perf_counter()
    ahead = copy.copy(progress)
    _count(ahead, collected, max(before - start, progress.seconds / max(1, progress.step)))
    diagnosed = _diagnose(config, setup, number, collected, last=_finished(config, ahead))
    aside = time.perf_counter() - before
    before = time.perf_counter()
    learned = setup.learner.update(collected.samples, config.method, config.agent.temperature)
    now = time.perf_counter()
    learned = diagnosed | learned | {"time/update": now - before}
    row = account(progress, collected, learned, config.method, ratio, now - start - aside)
    log_step(config, setup.policy.codec, folder, row, collected)
    return row


def _this_step(config: Config, progress: Progress) -> Config:
    """The configuration with this step's p."""
    method = config.method
    p = adaptive_probability(method.probe_probability, progress.probe_success, method.probe_target)
    return config.model_copy(update={"method": method.model_copy(update={"probe_probability": p})})


def _diagnose(
    config: Config, setup: Setup, number: int, collected: Collected, last: bool
) -> dict[str, float]:
    """Diagnostics of the first step, of every `train.diagnose_every`-th after it, and of the last."""
    every = config.train.diagnose_every
    if setup.start is None or not every or ((number - 1) % every and not last):
        return {}
    return diagnose(collected, setup.learner, setup.start(), config)


def position(progress: Progress) -> dict[str, Any]:
    """The counts that every row of the logs carries."""
    return {name: getattr(progress, name) for name in COUNTS} | {"seconds": round(progress.seconds, 3)}


def _finished(config: Config, progress: Progress) -> bool:
    return progress.done(config) >= 1.0


def _evaluation_due(config: Config, before: float, after: float) -> bool:
    """Did this step cross one of the marks that divide the budget into `train.evals` parts?"""
    marks = config.train.evals
    return marks > 0 and math.floor(after * marks + 1e-9) > math.floor(before * marks + 1e-9)


def _evaluate(
    config: Config, setup: Setup, folder: Path, progress: Progress, observer: Observer | None
) -> None:
    if not setup.data.dev:
        return
    sets = [("held-out", setup.data, setup.retriever)]
    if setup.fresh is not None and (progress.step == 0 or _finished(config, progress)):
        sets.append(("fresh", setup.fresh, make_retriever(config.retriever, setup.fresh.corpus)))
    for name, data, retriever in sets:
        figures = evaluate(setup.policy, data.dev, retriever, config).figures
        row = position(progress) | {"set": name, **figures}
        append(folder / "eval.jsonl", [row])
        if observer:
            observer.evaluated(row)


def _save(config: Config, setup: Setup, folder: Path, progress: Progress) -> None:
    state = {**asdict(progress), "seed": config.seed}

    def write(into: Path) -> None:
        setup.learner.save(into)
        setup.save_tokenizer(into)

    save_checkpoint(folder, progress.step, write, state, config.train.keep_checkpoints)


def _restore(folder: Path, setup: Setup) -> Progress:
    checkpoint, state = last_checkpoint(folder)
    for name, expected in state["digests"].items():
        if setup.digests.get(name) != expected:
            raise CheckpointError(
                f"{checkpoint}: the run's '{name}' has changed since this checkpoint "
                f"({expected[:12]} then, {setup.digests.get(name, 'nothing')[:12]} now)"
            )
    setup.learner.load(checkpoint)
    truncate_logs(folder, state["logs"])
    missing = [field.name for field in fields(Progress) if field.name not in state]
    if missing:
        raise CheckpointError(f"{checkpoint}: state.json has no '{missing[0]}': made by another version")
    return Progress(**{field.name: state[field.name] for field in fields(Progress)})


def summarise(config: Config, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write `summary.json` from what the run folder holds."""
    evaluations: list[dict[str, Any]] = []
    fresh: list[dict[str, Any]] = []
    if (folder / "eval.jsonl").exists():
        lines = (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()
        for row in map(json.loads, lines):
            (evaluations if row["set"] == "held-out" else fresh).append(row)
    summary: dict[str, Any] = {
        "name": config.name,
        "arm": config.arm,
        "seed": config.seed,
        "steps": progress.step,
        **position(progress),
    }
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        pairs = zip(first["em_by_question"], last["em_by_question"], strict=True)
        rise = interval([after - before for before, after in pairs])
        summary |= {"em_before": first["em"], "em_after": last["em"], "rise": rise}
    if fresh:
        summary |= {"em_fresh_before": fresh[0]["em"], "em_fresh_after": fresh[-1]["em"]}
    write_json(folder / "summary.json", summary)
    return summary


@contextmanager
def _interrupts() -> Iterator[Any]:
    """The first Ctrl-C or SIGTERM is remembered until the step is over; the second one acts at once."""
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        with suppress(Exception):  # a closed or busy stream must not cost the step
            print("\nthis step is finished and saved first; once more stops at once", file=sys.stderr)

    try:
        previous = {which: signal.signal(which, remember) for which in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody can press Ctrl-C at us
        yield lambda: False
        return
    try:
        yield lambda: bool(caught)
    finally:
        for which, handler in previous.items():
            signal.signal(which, handler)

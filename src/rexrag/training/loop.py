"""The training loop: steps, evaluations, checkpoints, resume. What a step does is in `step.py`."""

from __future__ import annotations

import copy
import hashlib
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rexrag.agent.episode import Codec
from rexrag.config.algorithms import Probing
from rexrag.config.schema import Config
from rexrag.engine.precision import settled
from rexrag.errors import CheckpointError, DataError, TrainingError
from rexrag.io import write_json
from rexrag.method.probing import adaptive_probability, update_probe_success
from rexrag.retrieval import make_retriever
from rexrag.training.callbacks import Events, Observer, load_callbacks
from rexrag.training.components import Components, Data, build
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
from rexrag.training.step import collect
from rexrag.training.summary import write_summary
from rexrag.training.validation import evaluate
from rexrag.training.verdict import NonFiniteWatch
from rexrag.types import Question, StepBatch

COUNTS = ("step", "generated_tokens", "prefilled_tokens", "spent_tokens", "rollouts")
"""Cumulative counts that every row of `metrics.jsonl` and `eval.jsonl` carries."""


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
    Several updates in a row that are not finite end the run with a TrainingError that names the likely cause.
    Raises RexragError with one line.
    """
    config = settled(config)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    events = Events(observer, load_callbacks(config))
    components = build(config)
    if len(components.data.train) < config.train.questions:
        raise DataError(
            f"{len(components.data.train)} training questions, train.questions = {config.train.questions}: "
            "expected at least as many questions as a step asks"
        )
    with open_run(folder, config, resume=resume, restart=restart):
        warn_of_overlap(components.data)
        return _run(config, components, folder, resume, events)


def _run(
    config: Config, components: Components, folder: Path, resume: bool, events: Events
) -> dict[str, Any]:
    progress = Progress(digests=components.digests)
    if resume:
        progress = _restore(folder, components)
        follow_config(folder, config, progress.step)
    else:
        write_json(folder / "environment.json", environment(**components.digests))
    events.started(config, folder)
    if progress.step == 0 and not resume:
        _evaluate(config, components, folder, progress, events)
    watch = NonFiniteWatch()
    with _interrupts() as interrupted:
        while not _finished(config, progress):
            before = progress.done(config)
            row = _step(config, components, folder, progress)
            events.stepped(row, progress.done(config))
            if stop := watch.too_many(row):
                raise TrainingError(f"{folder}: {stop}")
            last = _finished(config, progress)
            if last or _evaluation_due(config, before, progress.done(config)):
                _evaluate(config, components, folder, progress, events)
            if last or interrupted() or progress.step % config.train.save_every == 0:
                _save(config, components, folder, progress)
            if interrupted() and not last:
                raise KeyboardInterrupt
        summary = summarise(config, folder, progress)
        if interrupted():  # in the last step: the run is whole, but what would come after it is not wanted
            raise KeyboardInterrupt
    events.ended(summary)
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


def account(
    progress: Progress, batch: StepBatch, learned: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """Count a finished step in `progress` and return its row of `metrics.jsonl`.

    learned: the learner's figures. seconds: of the whole step.
    """
    figures = {**describe(batch), **learned}
    _count(progress, batch, seconds, int(learned.get("reference_tokens", 0)))
    progress.probe_success = update_probe_success(
        progress.probe_success, int(figures["probes/right"]), int(figures["probes/drawn"])
    )
    row = position(progress) | figures
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _count(progress: Progress, batch: StepBatch, seconds: float, reference_tokens: int = 0) -> None:
    """reference_tokens: read by the reference model of a KL term, a scoring pass like others."""
    progress.step += 1
    progress.generated_tokens += batch.statistics.generated_tokens
    progress.prefilled_tokens += batch.statistics.prefilled_tokens + reference_tokens
    progress.spent_tokens = progress.generated_tokens + progress.prefilled_tokens
    progress.rollouts += len(batch.rollouts) + len(batch.probes)
    progress.seconds += seconds


def log_step(config: Config, codec: Codec, folder: Path, row: dict[str, Any], batch: StepBatch) -> None:
    """Add a step to the run folder's logs."""
    append(folder / "metrics.jsonl", [row])
    if config.train.log_rollouts:
        rows = trace_rows(batch, row["step"], codec, config.train.log_rollouts)
        append(folder / "rollouts.jsonl.zst", rows)


def _step(config: Config, components: Components, folder: Path, progress: Progress) -> dict[str, Any]:
    start = time.perf_counter()
    number = progress.step + 1

    def questions() -> list[Question]:
        progress.asked += config.train.questions
        first = progress.asked - config.train.questions
        return questions_of(components.data.train, first, config.train.questions, config.seed)

    batch = collect(
        questions(),
        components.step,
        this_step(config, progress),
        step_seed(config.seed, number, "sample"),
        questions,
    )
    before = time.perf_counter()
    ahead = copy.copy(progress)
    _count(ahead, batch, max(before - start, progress.seconds / max(1, progress.step)))
    diagnosed = _diagnose(config, components, number, batch, last=_finished(config, ahead))
    aside = time.perf_counter() - before
    before = time.perf_counter()
    learned = components.learner.update(batch.samples, config.algorithm, config.agent.temperature)
    now = time.perf_counter()
    learned = diagnosed | learned | {"time/update": now - before}
    row = account(progress, batch, learned, now - start - aside)
    log_step(config, components.policy.codec, folder, row, batch)
    return row


def this_step(config: Config, progress: Progress) -> Config:
    """The configuration with this step's p."""
    algorithm = config.algorithm
    if not isinstance(algorithm, Probing):
        return config
    p = adaptive_probability(algorithm.probe_probability, progress.probe_success, algorithm.probe_target)
    return config.model_copy(update={"algorithm": algorithm.model_copy(update={"probe_probability": p})})


def _diagnose(
    config: Config, components: Components, number: int, batch: StepBatch, last: bool
) -> dict[str, float]:
    """Diagnostics of the first step, of every `train.diagnose_every`-th after it, and of the last."""
    every = config.train.diagnose_every
    if components.initial_policy is None or not every or ((number - 1) % every and not last):
        return {}
    return diagnose(batch, components.learner, components.initial_policy(), config)


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
    config: Config, components: Components, folder: Path, progress: Progress, events: Events
) -> None:
    if not components.data.dev:
        return
    sets = [("held-out", components.data, components.retriever)]
    if components.fresh is not None and (progress.step == 0 or _finished(config, progress)):
        sets.append(("fresh", components.fresh, make_retriever(config.retriever, components.fresh.corpus)))
    for name, data, retriever in sets:
        figures = evaluate(components.policy, data.dev, retriever, config, components.step.scoring).figures
        row = position(progress) | {"set": name, **figures}
        append(folder / "eval.jsonl", [row])
        events.evaluated(row)


def _save(config: Config, components: Components, folder: Path, progress: Progress) -> None:
    state = {**asdict(progress), "seed": config.seed}

    def write(into: Path) -> None:
        components.learner.save(into)
        components.save_tokenizer(into)

    save_checkpoint(folder, progress.step, write, state, config.train.keep_checkpoints)


def _restore(folder: Path, components: Components) -> Progress:
    checkpoint, state = last_checkpoint(folder)
    for name, expected in state["digests"].items():
        if components.digests.get(name) != expected:
            raise CheckpointError(
                f"{checkpoint}: the run's '{name}' has changed since this checkpoint "
                f"({expected[:12]} then, {components.digests.get(name, 'nothing')[:12]} now)"
            )
    components.learner.load(checkpoint)
    truncate_logs(folder, state["logs"])
    missing = [field.name for field in fields(Progress) if field.name not in state]
    if missing:
        raise CheckpointError(f"{checkpoint}: state.json has no '{missing[0]}': made by another version")
    return Progress(**{field.name: state[field.name] for field in fields(Progress)})


def summarise(config: Config, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write `summary.json` from what the run folder holds."""
    return write_summary(config, folder, position(progress))


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

"""Arms × seeds at a matched budget: does an arm beat its control, and is the difference more than chance?

Every run is a run folder of its own, `OUT/<arm>/seed-<n>`, made by one process with one thread, so a killed
comparison goes on where it stood. The same seed means the same world, questions and sampling seed in every
arm, so arms are compared in pairs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

from rexrag.config import presets
from rexrag.config.algorithms import Probing
from rexrag.config.files import dump_toml
from rexrag.config.schema import ENDLESS, Budget, Config
from rexrag.errors import ConfigError, RunFolderError
from rexrag.experiments.analysis import compare, run_folder
from rexrag.experiments.diagnosis import Figure, examine
from rexrag.io import write_json, write_text
from rexrag.training.run_folder import clear_unsaved, has_checkpoint

LIMITS: dict[Budget, str] = {
    "rollouts": "max_rollouts",
    "generated": "max_generated",
    "tokens": "max_tokens",
    "time": "max_seconds",
}
DIAGNOSE_EVERY = 5
"""Steps between diagnostics of gradients and KL; the last step has them too."""
LARGEST = 1e12
"""No arm spends more, in any budget's unit."""
FIXED = ("data", "retriever")
"""Sections of the configuration that decide what a question and its evidence are."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compare: one configuration for each (arm, seed), all with the same budget."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    budget: Budget
    amount: float
    configs: dict[tuple[str, int], Config]


def plan(
    config: str | None,
    arms: Sequence[str],
    seeds: Sequence[int],
    budget: Budget,
    amount: float,
    overrides: Sequence[str] = (),
    evals: int = 5,
) -> Plan:
    """Resolve every run before any starts. Raises ConfigError with one line.

    In the embedded world the seed also picks the world. Arms may change the method and the learner, not the
    data or the retriever: the same evaluation questions and passages for all.
    """
    if not seeds:
        raise ConfigError("--seeds: expected at least one seed")
    if not 0 < amount <= LARGEST:
        raise ConfigError(f"--amount {amount:g}: expected a budget above 0 and at most {LARGEST:g}")
    names = [Path(arm).stem if arm.endswith(".toml") else arm for arm in arms]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"--arms {','.join(arms)}: expected different names, at least one")
    configs = {}
    # A limit that the config brings along would stop arms at different shares of the budget.
    limits = dict.fromkeys(LIMITS.values(), 0) | {LIMITS[budget]: amount if budget == "time" else int(amount)}
    spent = [f"train.{name}={value}" for name, value in limits.items()]
    for (name, arm), seed in product(zip(names, arms, strict=True), seeds):
        fixed = [*spent, f"train.steps={ENDLESS}", f"train.evals={evals}", "train.control=''", f"seed={seed}"]
        fixed += ["train.threads=1", f"train.diagnose_every={DIAGNOSE_EVERY}"]
        resolved = presets.resolve(config, arm, [*overrides, *fixed])
        if not resolved.data.train:
            world = resolved.data.world_seed + seed
            update = {"world_seed": world, "fresh_questions": resolved.data.dev_limit}
            resolved = resolved.model_copy(update={"data": resolved.data.model_copy(update=update)})
        _refuse(resolved, name, budget, amount)
        configs[name, seed] = resolved
    for name, seed, section in product(names, seeds, FIXED):
        if getattr(configs[name, seed], section) != getattr(configs[names[0], seed], section):
            raise ConfigError(f"arm '{name}' changes [{section}]: arms must share their evaluation data")
    return Plan(tuple(names), tuple(seeds), budget, amount, configs)


def _refuse(config: Config, arm: str, budget: Budget, amount: float) -> None:
    """What could not be compared. A budget below a step is only overshot: a rollout has a token at least."""
    if config.engine != "local":
        raise ConfigError(f"engine = '{config.engine}': a comparison runs on the local engine only")
    if config.data.train and not config.data.dev:
        raise ConfigError("data.dev is empty: a comparison needs held-out questions")
    least = config.train.questions * config.algorithm.rollouts
    if budget != "time" and amount < least:
        raise ConfigError(
            f"--amount {amount:g}: one step of arm '{arm}' draws {least} rollouts; "
            f"expected a budget of at least {least} {budget}"
        )


def look_ahead(work: Plan, out: Path, questions: int = 150) -> dict[str, Figure]:
    """Diagnosis (`diagnosis.examine`) of the first arm's initial checkpoint, on the first seed's data.

    Kept in `diagnosis.json`, so that a comparison that goes on does not ask again.
    """
    _write_plan(work, out)
    file = out / "diagnosis.json"
    if file.is_file():
        known: dict[str, Figure] = json.loads(file.read_text(encoding="utf-8"))
        return known
    config = work.configs[work.arms[0], work.seeds[0]]
    probing = next((c for c in work.configs.values() if _probes_with_cues(c)), config)
    changed = {"algorithm": probing.algorithm, "agent": probing.agent}
    figures = examine(config.model_copy(update=changed), questions)
    write_json(file, figures)
    return figures


def _probes_with_cues(config: Config) -> bool:
    return isinstance(config.algorithm, Probing) and config.agent.cues != "none"


def run(
    work: Plan, out: Path, jobs: int = 0, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Run what is missing, `jobs` at once (0: one a core), then compare. Returns what `compare.json` holds.

    Raises RunFolderError where a run failed, naming its log, or where `out` holds another comparison.
    """
    _write_plan(work, out)
    missing = [key for key in product(work.arms, work.seeds) if not _summary(out, *key)]
    # Seeds first: an interrupted comparison then has whole pairs.
    missing.sort(key=lambda key: (key[1], work.arms.index(key[0])))
    total, start = len(missing), time.monotonic()
    runs = _Runs()
    with runs.ended_together(), ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        try:
            waiting: dict[Future[None], tuple[str, int]] = {
                pool.submit(_run_one, work.configs[key], run_folder(out, *key), runs): key for key in missing
            }
            finished = 0
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    arm, seed = waiting.pop(future)
                    future.result()
                    finished += 1
                    left = (time.monotonic() - start) / finished * (total - finished)
                    em = _summary(out, arm, seed)["em_after"]["value"]
                    say(
                        f"{finished}/{total}  {arm} seed {seed}: EM {100 * em:.1f} %  eta {left / 60:.0f} min"
                    )
        except BaseException:  # no other run begins; those that are going come to their end, or were told to
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    result = compare(out, work.arms, work.seeds, work.budget, work.amount)
    write_json(out / "compare.json", result)
    return result


class _Runs:
    """The processes that train. A SIGTERM to the comparison is theirs too: they finish a step and save."""

    def __init__(self) -> None:
        self.going: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    @contextmanager
    def ended_together(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _end(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        for process in list(self.going):
            process.terminate()
        raise KeyboardInterrupt

    def wait(self, command: Sequence[str], **options: Any) -> int:
        """Start a process and wait for its exit code."""
        process = subprocess.Popen(command, **options)
        self.going.add(process)
        if self.stopping:  # it began while the others were told
            process.terminate()
        try:
            return process.wait()
        finally:
            self.going.discard(process)


def _run_one(config: Config, folder: Path, runs: _Runs) -> None:
    """One run in a process of its own; a checkpoint that is there is resumed.

    Raises RunFolderError where the run fails, or is still going: its comparison was killed, and it was not.
    """
    resume = has_checkpoint(folder)
    settings = folder.with_suffix(".toml")
    write_text(settings, dump_toml(config))
    clear_unsaved(folder)
    command = [sys.executable, "-m", "rexrag", "train", "--out", str(folder), "--json"]
    command += ["--resume"] if resume else [str(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with folder.with_suffix(".log").open("ab") as log:
        code = runs.wait(command, stdout=log, stderr=log, env=environment)
    if code:
        raise RunFolderError(
            f"{folder}: the run failed with exit code {code}; see {folder.with_suffix('.log')}"
        )


def _write_plan(work: Plan, out: Path) -> None:
    """Write down what is compared; refuse a folder that holds another comparison."""
    wanted: dict[str, Any] = {
        "arms": list(work.arms),
        "seeds": list(work.seeds),
        "budget": work.budget,
        "amount": work.amount,
        "configs": {f"{arm}/{seed}": c.model_dump(mode="json") for (arm, seed), c in work.configs.items()},
    }
    file = out / "plan.json"
    if file.exists():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            shared = known["configs"].keys() & wanted["configs"].keys()
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunFolderError(f"{file}: not the plan of a comparison; choose another --out") from None
        if any(known["configs"][key] != wanted["configs"][key] for key in shared):
            raise RunFolderError(f"{out} holds a comparison with other settings; choose another --out")
        wanted["configs"] = {**known["configs"], **wanted["configs"]}
    try:
        for arm in work.arms:
            (out / arm).mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
    except OSError as error:
        raise RunFolderError(f"{out}: cannot be written: {error.strerror or error}") from None


def _summary(out: Path, arm: str, seed: int) -> dict[str, Any]:
    file = run_folder(out, arm, seed) / "summary.json"
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def run_folders(work: Plan, out: Path) -> Iterable[Path]:
    return (run_folder(out, arm, seed) for arm, seed in product(work.arms, work.seeds))

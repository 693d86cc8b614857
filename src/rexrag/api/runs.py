"""Training from Python: `train`, `Trainer`, and the `Run` that comes out."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from rexrag.agent.dead_end_judge import DeadEndJudge
from rexrag.agent.protocols import register_protocol
from rexrag.agent.scoring import AnswerJudge, Reward
from rexrag.api.arguments import listed, one_or_several
from rexrag.config import presets
from rexrag.config.algorithms import Probing
from rexrag.config.files import parse_config
from rexrag.config.plugin_keys import plugin_names, require_plugins_allowed
from rexrag.config.schema import Config
from rexrag.errors import ConfigError, RunFolderError
from rexrag.plugins import dotted_name, give, is_given, require_parameters
from rexrag.retrieval.base import Retriever
from rexrag.retrieval.plugin import checked_retriever
from rexrag.training.callbacks import Callback, Observer
from rexrag.training.run_folder import check_resumable, free_folder

if TYPE_CHECKING:
    from rexrag.api.agents import Agent


class PluginArguments(TypedDict, total=False):
    """Plug-ins as arguments; each replaces what the configuration names."""

    reward: Reward
    """(Rollout) -> float."""
    judge: AnswerJudge
    """The judge of answers: (answer, Question) -> bool."""
    dead_end_judge: DeadEndJudge
    """(rollouts, context) -> P(dead end) of each; sets `dead_ends = "judge"`."""
    retriever: Retriever
    """An object with `search(queries, topk) -> list[list[Document]]`."""
    protocol: Any
    """An object like `rexrag.agent.protocols.base.AgentProtocol`."""
    callbacks: Sequence[Callback]
    """Functions (event, facts)."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder.

    >>> run = rexrag.train("quickstart", out="runs/nb")     # doctest: +SKIP
    >>> run.summary["em_after"]["value"]                    # doctest: +SKIP
    """

    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds. Raises RunFolderError where the run has not finished."""
        return dict(_read_json(self.folder / "summary.json"))

    @property
    def verdict(self) -> str:
        """One sentence: whether the policy learned."""
        verdict = self.summary.get("verdict", {})
        return str(verdict.get("sentence", "") if isinstance(verdict, dict) else verdict)

    def metrics(self) -> list[dict[str, Any]]:
        """One row a step."""
        return _read_rows(self.folder / "metrics.jsonl")

    def evaluations(self) -> list[dict[str, Any]]:
        """One row for each held-out evaluation."""
        return _read_rows(self.folder / "eval.jsonl")

    def report(self, out: str | Path | None = None) -> Path:
        """Write the page of this run (default: `report.html` in its folder) and return its path."""
        from rexrag.report import write_report

        return write_report([self.folder], Path(out) if out else self.folder / "report.html")

    def agent(self, allow_plugins: bool = False) -> Agent:
        """The trained agent. allow_plugins: import those that its `config.toml` names."""
        from rexrag.api.agents import load_agent

        return load_agent(self.folder, allow_plugins=allow_plugins)


def load_config(
    config: str | Path = presets.QUICKSTART, *, algorithm: str = "", overrides: str | Sequence[str] = ()
) -> Config:
    """A shipped configuration by name, or a TOML file, with an algorithm and overrides laid over it.

    overrides: `"train.steps=20"`. Raises ConfigError.

    >>> rexrag.load_config("quickstart", algorithm="grpo").algorithm.rollouts
    5
    """
    return presets.resolve(config, algorithm, one_or_several(overrides))


class Trainer:
    """A configuration with plug-ins, ready to train.

    config: a `Config`, the name of a shipped one, or a TOML file. plugins: see `PluginArguments`.
    Raises ConfigError, PluginError.

    >>> rexrag.Trainer("quickstart", reward=my_reward).train("runs/mine")   # doctest: +SKIP
    """

    def __init__(
        self,
        config: Config | str | Path = presets.QUICKSTART,
        *,
        algorithm: str = "",
        overrides: str | Sequence[str] = (),
        **plugins: Unpack[PluginArguments],
    ) -> None:
        if isinstance(config, Config):
            if algorithm:
                raise ConfigError("algorithm: give a Config or the name of an algorithm, not both")
            settings = parse_config(config.model_dump(mode="json"), one_or_several(overrides))
        else:
            settings = presets.resolve(config, algorithm, one_or_several(overrides))
        # A control beside a run is the command line's; here it is another call of `train`.
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"control": ""})})
        self.config = with_plugins(settings, plugins)

    def train(
        self,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        allow_plugins: bool = False,
        observer: Observer | None = None,
    ) -> Run:
        """Train into `out` (default `runs/<name>`) and return the run. Raises RexragError with one line.

        resume: continue from the newest checkpoint in `out`. allow_plugins: import those that its
        `config.toml` names.
        """
        folder = Path(out) if out is not None else free_folder(self.config.name)
        if resume:
            check_resumable(folder)
            require_plugins_allowed(self.config, allow_plugins, folder / "config.toml")
        run_training(self.config, folder, resume=resume, observer=observer or Lines())
        return Run(folder)


class Lines:
    """Prints how far a run is: each evaluation, and a step at most every ten seconds."""

    def __init__(self) -> None:
        self.begin = self.last = time.monotonic()

    def started(self, config: Config, folder: Path) -> None:
        print(f"{config.label}: {folder}")

    def evaluated(self, figures: dict[str, Any]) -> None:
        print(f"step {figures['step']}: held-out EM {100 * figures['em']['value']:.1f} %")

    def stepped(self, row: dict[str, Any], done: float) -> None:
        now = time.monotonic()
        if now - self.last > 10.0 and done < 1.0:
            self.last = now
            left = (now - self.begin) / done * (1.0 - done)
            print(
                f"step {row['step']}: {100 * done:.0f} %, EM {100 * row['em/train']:.0f} %, eta {left:.0f} s"
            )


def train(
    config: Config | str | Path = presets.QUICKSTART,
    out: str | Path | None = None,
    *,
    algorithm: str = "",
    overrides: str | Sequence[str] = (),
    resume: bool = False,
    allow_plugins: bool = False,
    **plugins: Unpack[PluginArguments],
) -> Run:
    """Train a search agent and return its run; `Trainer(...).train(...)` in one call.

    config: the name of a shipped configuration, a TOML file, or a `Config`. overrides: `"train.steps=20"`.
    resume: go on from the newest checkpoint in `out`. allow_plugins: import those that `config.toml` names.
    plugins: `reward`, `judge`, `dead_end_judge`, `retriever`, `protocol`, `callbacks`.
    Raises RexragError with one line.

    >>> run = rexrag.train("quickstart", out="runs/nb", overrides=["train.steps=4"])   # doctest: +SKIP
    """
    trainer = Trainer(config, algorithm=algorithm, overrides=overrides, **plugins)
    return trainer.train(out, resume=resume, allow_plugins=allow_plugins)


def run_training(
    config: Config,
    folder: Path,
    *,
    resume: bool = False,
    restart: bool = False,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Train with the engine that the configuration names; see `training.loop.train`. Raises RexragError."""
    if config.engine == "verl":
        from rexrag.verl.launch import launch

        given = [name for name in plugin_names(config).values() if is_given(name)]
        if given:
            raise ConfigError(f"{given[0]}: engine = 'verl' imports plug-ins by name; name it in the TOML")
        return launch(config, folder, resume, restart)
    from rexrag.training.loop import train as train_here

    return train_here(config, folder, resume=resume, restart=restart, observer=observer)


def with_plugins(config: Config, given: PluginArguments) -> Config:
    """The configuration that names these plug-ins, which this process then knows. Raises PluginError."""
    unknown = set(given) - set(PluginArguments.__annotations__)
    if unknown:
        raise ConfigError(f"{sorted(unknown)[0]}: expected {', '.join(PluginArguments.__annotations__)}")
    agent: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    if "reward" in given:
        agent["reward"] = _given_function("reward", given["reward"], 1)
    if "judge" in given:
        agent["answer_judge"] = _given_function("judge", given["judge"], 2)
    if "protocol" in given:
        agent["protocol"] = register_protocol(given["protocol"])
    if "dead_end_judge" in given:
        if not isinstance(config.algorithm, Probing):
            raise ConfigError(f"dead_end_judge: algorithm '{config.algorithm.name}' has no probes")
        name = _given_function("dead_end_judge", given["dead_end_judge"], 2)
        update = {"dead_ends": "judge", "dead_end_judge": name}
        changes["algorithm"] = config.algorithm.model_copy(update=update)
    if "retriever" in given:
        checked_retriever(given["retriever"])
        update = {"kind": "plugin", "plugin": give(given["retriever"]), "url": "", "index": ""}
        changes["retriever"] = config.retriever.model_copy(update=update)
    callbacks = listed(given.get("callbacks", ()), "callbacks", "functions")
    names = [_given_function("callback", callback, 2) for callback in callbacks]
    if names:
        named = (*config.train.callbacks, *names)
        changes["train"] = config.train.model_copy(update={"callbacks": named})
    return config.model_copy(update={**changes, "agent": config.agent.model_copy(update=agent)})


def _given_function(what: str, function: Any, parameters: int) -> str:
    require_parameters(function, parameters, f"{what} {dotted_name(function)}")
    return give(function)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file}: not readable: {error}") from None


def _read_rows(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{file}: not readable: {error}") from None

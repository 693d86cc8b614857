"""What an evaluation consists of: cells of (set × strategy), and the key that each is cached under."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rexrag.agent.prompts import BASELINES, TEMPLATES, cue_pool, pool_digest
from rexrag.config.schema import Config
from rexrag.data.qa_sets import QuestionSet, canonical, load_sets, sample, whole_set
from rexrag.data.world.generator import World
from rexrag.errors import ConfigError
from rexrag.evaluation.attempt import NoRetriever
from rexrag.evaluation.policies import PolicySource
from rexrag.evaluation.strategies import CLOSED_BOOK, STRATEGIES
from rexrag.io import sha256_rows
from rexrag.retrieval import make_retriever
from rexrag.retrieval.base import Retriever
from rexrag.training.components import load_data
from rexrag.types import Document

FORMAT = 1
"""Raised when rows of an older version would mean something else; then nothing old is reused."""
Corpus = Sequence[Document] | str | None


@dataclass(frozen=True, slots=True)
class Choices:
    """What the command line asks for, beside policy and configuration."""

    data: Sequence[str] = ()
    sets: Sequence[str] = ()
    strategies: Sequence[str] = ("agent",)
    votes: int = 1
    limit: int = 0
    stratify: bool = False
    seed: int = 0
    temperature: float | None = None
    """None: greedy, or the agent's temperature where there is a vote."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One strategy on one set. `settings` is all that its rows depend on; `key` is their digest."""

    chosen: QuestionSet
    strategy: str
    votes: int
    temperature: float
    settings: dict[str, Any]

    @property
    def way(self) -> str:
        """Strategy and votes, as tables call it."""
        return self.strategy if self.votes == 1 else f"{self.strategy} ×{self.votes}"

    @property
    def key(self) -> str:
        return sha256_rows([self.settings])[:16]

    @property
    def name(self) -> str:
        """Folder of the cell, under `cells/`."""
        readable = "".join(
            c if c.isalnum() or c in "-_." else "-" for c in f"{self.chosen.name}-{self.strategy}"
        )
        return f"{readable[:60]}-{self.key}"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything checked, nothing loaded that a cached evaluation would not need."""

    out: Path
    policy: PolicySource
    config: Config
    retriever: Retriever
    corpus: Corpus
    cells: tuple[Cell, ...]
    seed: int

    @property
    def sets(self) -> dict[str, QuestionSet]:
        return {cell.chosen.name: cell.chosen for cell in self.cells}


def make_plan(policy: PolicySource, config: Config, choices: Choices, out: Path) -> Plan:
    """Load and check the questions and the retriever. Raises ConfigError, DataError, IndexFolderError."""
    unknown = [name for name in choices.strategies if name not in STRATEGIES]
    if unknown or not choices.strategies:
        raise ConfigError(f"--strategy {','.join(unknown)}: expected some of {', '.join(STRATEGIES)}")
    sets, own_world = _question_sets(config, choices)
    retriever, corpus = _search(config, choices.strategies, own_world)
    base = _settings(policy, config, choices)
    cells = []
    for strategy in dict.fromkeys(choices.strategies):
        for chosen in sets:
            temperature = choices.temperature
            if temperature is None:
                temperature = config.agent.temperature if choices.votes > 1 else 0.0
            if choices.votes > 1 and temperature == 0.0:
                raise ConfigError(
                    f"--votes {choices.votes} at temperature 0 votes on equal answers; raise --temperature"
                )
            settings = base | {
                "set": [chosen.name, chosen.split, chosen.digest],
                "strategy": strategy,
                "votes": choices.votes,
                "temperature": temperature,
                "seed": choices.seed if temperature or strategy == "reflect" else 0,
                "retriever": "none" if strategy in CLOSED_BOOK else retriever.digest,
                "cues": pool_digest(cue_pool(config.agent.cues)) if strategy == "reflect" else "",
            }
            cells.append(Cell(chosen, strategy, choices.votes, temperature, settings))
    return Plan(out, policy, config, retriever, corpus, tuple(cells), choices.seed)


def corpus_documents(plan: Plan) -> Iterable[Document] | None:
    """The passages that can be found, for an audit; None where they cannot be seen from here."""
    if plan.config.data.corpus:
        from rexrag.retrieval.corpus import read_corpus

        return read_corpus(plan.config.data.corpus)
    if plan.corpus is not None and not isinstance(plan.corpus, str):
        return plan.corpus
    documents: Iterable[Document] | None = getattr(plan.retriever, "documents", None)
    return documents


def _settings(policy: PolicySource, config: Config, choices: Choices) -> dict[str, Any]:
    """What every cell's rows depend on. Rewards are no part of it: they change no row."""
    agent = config.agent.model_dump(mode="json", exclude={"temperature", "reward", "format_reward"})
    texts = [*TEMPLATES.items(), *BASELINES.items()]
    return {
        "format": FORMAT,
        "policy": policy.digest,
        "agent": agent,
        "topk": config.retriever.topk,
        "prompts": sha256_rows(texts),
    }


def _question_sets(config: Config, choices: Choices) -> tuple[list[QuestionSet], bool]:
    """The sets, sampled; and whether they are the embedded world's."""
    if "reflect" in choices.strategies and config.agent.cues == "none":
        raise ConfigError("--strategy reflect needs cues: --set agent.cues=default")
    if choices.data:
        several = len(choices.data) > 1  # then each source need not hold every set that is asked for
        whole = [one for source in choices.data for one in load_sets(source, choices.sets, partly=several)]
        missing = [name for name in map(canonical, choices.sets) if name not in {one.name for one in whole}]
        if missing:
            raise ConfigError(f"--sets {missing[0]}: in none of the sources that --data names")
        names = [one.name for one in whole]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"--data: the set '{twice}' was given twice; rename one of the files")
    else:
        if choices.sets:
            raise ConfigError("--sets chooses from --data: give a folder, a file or a hub id too")
        dev = load_data(config.data).dev
        if not dev:
            raise ConfigError("no questions: give --data, or data.dev in the config")
        name = config.data.dev or "world"
        whole = [whole_set(Path(name).stem, dev, name)]
    sampled = [sample(one, choices.limit, choices.seed, choices.stratify) for one in whole]
    return sampled, not choices.data and not config.data.train


def _search(config: Config, strategies: Sequence[str], own_world: bool) -> tuple[Retriever, Corpus]:
    if all(strategy in CLOSED_BOOK for strategy in strategies):
        return NoRetriever(), None
    corpus: Corpus = config.data.corpus or None
    if corpus is None and not config.retriever.index and config.retriever.kind != "remote":
        if not own_world:
            raise ConfigError(
                "no corpus to search: give --corpus FILE, --index FOLDER or --retriever URL (only "
                f"{' and '.join(sorted(CLOSED_BOOK))} need none)"
            )
        corpus = World(config.data.world_seed, config.data.world_people).documents
    return make_retriever(config.retriever, corpus), corpus

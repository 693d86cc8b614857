"""What an evaluation consists of: cells (question set × strategy), and the key that each is cached under."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rexrag.agent.prompts import BASELINES, TEMPLATES, cue_pool, pool_digest, template_text
from rexrag.config.schema import Config
from rexrag.data.qa_sets import QuestionSet, canonical, load_sets, sample, whole_set
from rexrag.errors import ConfigError
from rexrag.evaluation.context import NoRetriever
from rexrag.evaluation.policies import PolicySource, needs_no_corpus, open_retriever
from rexrag.evaluation.strategies import CLOSED_BOOK, STRATEGIES
from rexrag.io import sha256_rows
from rexrag.retrieval.base import Retriever
from rexrag.training.components import load_data
from rexrag.types import Document

UNUSED = {"temperature", "reward", "cues"}
"""Settings of the agent that no row depends on, or that stand in a cell's settings under their own name."""
ADDED = {"protocol": "tags", "answer_judge": "em"}
FORMAT = 1
"""Raised when rows of an older version would mean something else; then nothing old is reused."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What the caller asks for, beside policy and configuration; see `rexrag eval --help`."""

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
    """One strategy on one question set. `settings` is all that its rows depend on; `key` is their digest."""

    questions: QuestionSet
    strategy: str
    votes: int
    temperature: float
    settings: dict[str, Any]

    @property
    def system(self) -> str:
        """Strategy and votes, as tables name them."""
        return self.strategy if self.votes == 1 else f"{self.strategy} ×{self.votes}"

    @property
    def key(self) -> str:
        return sha256_rows([self.settings])[:16]

    @property
    def name(self) -> str:
        """Folder of the cell, under `cells/`."""
        readable = "".join(
            c if c.isalnum() or c in "-_." else "-" for c in f"{self.questions.name}-{self.strategy}"
        )
        return f"{readable[:60]}-{self.key}"


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Everything checked, nothing loaded that a cached evaluation would not need."""

    out: Path
    policy: PolicySource
    config: Config
    retriever: Retriever
    cells: tuple[Cell, ...]
    seed: int

    @property
    def sets(self) -> dict[str, QuestionSet]:
        return {cell.questions.name: cell.questions for cell in self.cells}

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(cell.system for cell in self.cells))


def plan_evaluation(
    policy: PolicySource, config: Config, choices: Choices, out: Path, retriever: Retriever | None = None
) -> EvaluationPlan:
    """Load and check the questions and the retriever (the configured one, or the one given).

    Raises ConfigError, DataError, IndexFolderError.
    """
    unknown = [name for name in choices.strategies if name not in STRATEGIES]
    if unknown or not choices.strategies:
        raise ConfigError(f"--strategy {','.join(unknown)}: expected some of {', '.join(STRATEGIES)}")
    if "reflect" in choices.strategies and config.agent.cues == "none":
        raise ConfigError("--strategy reflect needs cues: --set agent.cues=default")
    sets, own_world = _question_sets(config, choices)
    retriever = retriever or _retriever(config, choices.strategies, own_world)
    temperature = _temperature(config, choices)
    base = _settings(policy, config)
    cells = []
    for strategy in dict.fromkeys(choices.strategies):
        for questions in sets:
            settings = base | {
                "set": [questions.name, questions.split, questions.digest],
                "strategy": strategy,
                "votes": choices.votes,
                "temperature": temperature,
                "seed": choices.seed if temperature or strategy == "reflect" else 0,
                "retriever": "none" if strategy in CLOSED_BOOK else retriever.digest,
                "cues": pool_digest(cue_pool(config.agent.cues)) if strategy == "reflect" else "",
            }
            cells.append(Cell(questions, strategy, choices.votes, temperature, settings))
    return EvaluationPlan(out, policy, config, retriever, tuple(cells), choices.seed)


def corpus_documents(plan: EvaluationPlan) -> Iterable[Document] | None:
    """The passages that can be found, for an audit; None where they cannot be seen from here."""
    if plan.config.data.corpus:
        from rexrag.retrieval.corpus import read_corpus

        return read_corpus(plan.config.data.corpus)
    documents: Iterable[Document] | None = getattr(plan.retriever, "documents", None)
    return documents


def _temperature(config: Config, choices: Choices) -> float:
    default = config.agent.temperature if choices.votes > 1 else 0.0
    temperature = default if choices.temperature is None else choices.temperature
    if choices.votes > 1 and temperature == 0.0:
        raise ConfigError(
            f"--votes {choices.votes} at temperature 0 votes on equal answers; raise --temperature"
        )
    return temperature


def _settings(policy: PolicySource, config: Config) -> dict[str, Any]:
    """What every cell's rows depend on."""
    agent = config.agent.model_dump(mode="json", exclude=UNUSED)
    # What 0.1.0 did not know is left out where it is as it was, so that its rows are found again.
    agent = {name: value for name, value in agent.items() if (name, value) not in ADDED.items()}
    texts = [*TEMPLATES.items(), *BASELINES.items()]
    if config.agent.template not in TEMPLATES:  # a text file can change under the same name
        texts.append((config.agent.template, template_text(config.agent.template)))
    return {
        "format": FORMAT,
        "policy": policy.digest,
        "agent": agent,
        "topk": config.retriever.topk,
        "prompts": sha256_rows(texts),
    }


def _question_sets(config: Config, choices: Choices) -> tuple[list[QuestionSet], bool]:
    """The sets, sampled; and whether they are the embedded world's."""
    whole = _named_sets(choices) if choices.data else [_own_set(config, choices)]
    sampled = [sample(one, choices.limit, choices.seed, choices.stratify) for one in whole]
    return sampled, not choices.data and not config.data.train


def _named_sets(choices: Choices) -> list[QuestionSet]:
    several = len(choices.data) > 1  # then each source need not hold every set that is asked for
    whole = [one for source in choices.data for one in load_sets(source, choices.sets, partly=several)]
    names = [one.name for one in whole]
    missing = [name for name in map(canonical, choices.sets) if name not in names]
    if missing:
        raise ConfigError(f"--sets {missing[0]}: in none of the sources that --data names")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"--data: the set '{twice}' was given twice; rename one of the files")
    return whole


def _own_set(config: Config, choices: Choices) -> QuestionSet:
    """The configuration's held-out questions."""
    if choices.sets:
        raise ConfigError("--sets chooses from --data: give a folder, a file or a hub id too")
    dev = load_data(config.data).dev
    if not dev:
        raise ConfigError("no questions: give --data, or data.dev in the config")
    name = config.data.dev or "world"
    return whole_set(Path(name).stem, dev, name)


def _retriever(config: Config, strategies: Sequence[str], own_world: bool) -> Retriever:
    if all(strategy in CLOSED_BOOK for strategy in strategies):
        return NoRetriever()
    if not own_world and not needs_no_corpus(config.retriever) and not config.data.corpus:
        raise ConfigError(
            "no corpus to search: give --corpus FILE, --index FOLDER or --retriever URL (only "
            f"{' and '.join(sorted(CLOSED_BOOK))} need none)"
        )
    return open_retriever(config, own_world)

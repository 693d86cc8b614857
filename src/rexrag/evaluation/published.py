"""The published numbers, and whether an evaluation may stand beside them (docs/guides/evaluation.md).

Exact match in percent, of REX-RAG (arXiv 2508.08149) and of Search-R1 trained with GRPO (arXiv 2503.09516, as
quoted by the former), on Qwen2.5. Only the set-up is checked here, not which model was evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rexrag.config.schema import AgentConfig, Config, RetrieverConfig
from rexrag.data.qa_sets import BENCHMARKS, QuestionSet
from rexrag.errors import ConfigError
from rexrag.retrieval.base import Retriever

_ROWS: tuple[tuple[str, tuple[float, ...], float], ...] = (
    ("REX-RAG 3B", (43.9, 60.4, 44.2, 37.4, 39.7, 14.5, 31.2), 38.7),
    ("S-R1 3B base", (42.1, 58.3, 41.3, 29.7, 27.4, 6.6, 12.8), 31.2),
    ("S-R1 3B inst.", (39.7, 56.6, 39.1, 33.1, 31.0, 12.4, 23.2), 33.6),
    ("REX-RAG 7B", (45.5, 62.6, 44.3, 42.2, 43.7, 19.7, 44.8), 43.2),
    ("S-R1 7B base", (39.5, 56.0, 38.8, 32.6, 29.7, 12.5, 36.0), 35.0),
    ("S-R1 7B inst.", (42.9, 62.3, 42.7, 38.6, 34.6, 16.2, 40.0), 39.6),
)
PUBLISHED: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        name: MappingProxyType({**dict(zip(BENCHMARKS, values, strict=True)), "macro": average})
        for name, values, average in _ROWS
    }
)
"""EM in percent by set; `macro` is the published average."""

CORPUS_SIZE = 21_015_324
"""Passages of the Wikipedia 2018 dump that the field searches (DPR, arXiv 2004.04906)."""
ASSUMED = "wiki18-e5"
"""What --assume-retriever may say of an address: Wikipedia 2018 with E5-base-v2, exact search."""
BUDGET: Mapping[str, int] = MappingProxyType(
    {"search_turns": 5, "turn_tokens": 500, "evidence_tokens": 500, "total_tokens": 4096}
)
TOPK = 3


def check_assumed(name: str, retriever: RetrieverConfig) -> None:
    """Raises ConfigError for an unknown set-up, or one assumed of a retriever that can be looked at."""
    if name not in ("", ASSUMED):
        raise ConfigError(f"--assume-retriever {name}: the only known set-up is {ASSUMED}")
    if name and retriever.kind != "remote":
        raise ConfigError(
            f"--assume-retriever {name}: for a remote retriever only; a '{retriever.kind}' one is looked at"
        )


def setup_differences(config: Config, retriever: Retriever, assumed: str = "") -> list[str]:
    """Why no number of this set-up is comparable with the paper's, each in a few words."""
    return [
        *_search_differences(config, retriever, assumed),
        *_budget_differences(config.agent, config.retriever.topk),
    ]


def cell_differences(questions: QuestionSet, strategy: str, votes: int, temperature: float) -> list[str]:
    """Why one set's number is not comparable, beyond the set-up."""
    known = BENCHMARKS.get(questions.name)
    found = []
    if known is None:
        found.append("the paper does not evaluate on this set")
    elif questions.split not in (known.split, "test"):
        found.append(f"split {questions.split}, published on {known.split}")
    elif len(questions.questions) != known.size:
        found.append(f"{len(questions.questions):,} of {known.size:,} questions")
    if strategy != "agent" or votes > 1:
        found.append("published for the agent alone, one answer a question")
    if temperature != 0.0:
        found.append(f"temperature {temperature:g}, published greedy")
    return found


def _search_differences(config: Config, retriever: Retriever, assumed: str) -> list[str]:
    if config.retriever.kind == "remote":
        unseen = f"what is behind {config.retriever.url} cannot be seen from here"
        return [] if assumed == ASSUMED else [f"{unseen} (see --assume-retriever {ASSUMED})"]
    documents = len(getattr(retriever, "documents", ()))
    found = []
    if documents != CORPUS_SIZE:
        shown = f"{documents:,}" if documents else "an unknown number of"
        found.append(f"corpus of {shown} passages, not Wikipedia 2018 ({CORPUS_SIZE:,})")
    if not _is_exact_e5(retriever):
        found.append(f"retriever {config.retriever.kind}, not exact search with E5-base-v2")
    return found


def _is_exact_e5(retriever: Retriever) -> bool:
    """Does it rank by all vectors of an encoder that calls itself E5-base-v2?"""
    ranker = getattr(retriever, "ranker", None)
    model = getattr(getattr(getattr(ranker, "encoder", None), "card", None), "model", "")
    exact = getattr(getattr(ranker, "options", None), "ann", "") == "flat"
    return exact and "e5-base-v2" in str(model).lower()


def _budget_differences(agent: AgentConfig, topk: int) -> list[str]:
    wrong = [
        f"{name} {getattr(agent, name)} instead of {value}"
        for name, value in BUDGET.items()
        if getattr(agent, name) != value
    ]
    wrong += [f"top-k {topk} instead of {TOPK}"] if topk != TOPK else []
    return [f"budget: {', '.join(wrong)}"] if wrong else []

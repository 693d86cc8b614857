"""Demonstrations for a supervised warm-up: responses to imitate, and how they are written.

A demonstration is drafted as pieces (text with a weight, or a search) and only then turned into tokens, so
that one call to the retriever answers the searches of a whole batch. `Setting.render` writes the evidence as
an episode does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rexrag.types import Document, Origin


class Codec(Protocol):
    """What is needed of `agent.episode.Codec`."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def prompt(self, user_message: str) -> list[int]: ...


class Search(Protocol):
    """What is needed of `retrieval.base.Retriever`."""

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]: ...


@dataclass(frozen=True, slots=True)
class Setting:
    """How an episode would write a demonstration: its codec, its instruction, its evidence, its limits."""

    codec: Codec
    instruct: Callable[[str], str]
    """A question -> the user message."""
    render: Callable[[Sequence[Document]], list[int]]
    """Documents -> evidence tokens."""
    topk: int
    search_turns: int
    turn_tokens: int


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A response to imitate: `weights[i]` is the weight of token i's log-probability in the loss.

    EVIDENCE tokens have weight 0 here; a warm-up may add a small language-model loss on them.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    origins: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text with a weight; `query`: the environment's answer to this search follows it."""

    text: str
    weight: float = 1.0
    query: str | None = None


Draft = tuple[str, list[Piece]]
"""A question's text and the pieces of the response."""


def think(text: str, weight: float = 1.0) -> Piece:
    """Text inside an open thought."""
    return Piece(text, weight)


def search(query: str, weight: float = 1.0) -> Piece:
    """Close the thought and look `query` up."""
    return Piece(f" </think> <search> {query} </search>", weight, query)


def answer(text: str, weight: float = 1.0) -> Piece:
    """Close the thought and answer."""
    return Piece(f" </think> <answer> {text} </answer>", weight)


def write(drafts: Sequence[Draft], setting: Setting, retriever: Search) -> list[Demonstration]:
    """Turn drafts into tokens, with one batched search for all of them."""
    queries = [piece.query for _, pieces in drafts for piece in pieces if piece.query is not None]
    results = iter(retriever.search(queries, setting.topk) if queries else [])
    demonstrations = []
    for question, pieces in drafts:
        tokens: list[int] = []
        origins: list[int] = []
        weights: list[float] = []
        for piece in pieces:
            ids = setting.codec.encode(piece.text)
            tokens += ids
            origins += [int(Origin.POLICY)] * len(ids)
            weights += [piece.weight] * len(ids)
            if piece.query is not None:
                evidence = setting.render(next(results))
                tokens += evidence
                origins += [int(Origin.EVIDENCE)] * len(evidence)
                weights += [0.0] * len(evidence)
        prompt = setting.codec.prompt(setting.instruct(question))
        demonstrations.append(Demonstration(tuple(prompt), tuple(tokens), tuple(origins), tuple(weights)))
    return demonstrations

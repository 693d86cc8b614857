"""Recorded responses, cut into steps: what the policy wrote in a turn, and the passages it was shown."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rexrag.agent.protocols.tags import EVIDENCE_OPEN, actions, policy_spans
from rexrag.io import FieldError
from rexrag.retrieval.corpus import parse_document
from rexrag.types import Document

PASSAGE_LISTS = ("result", "results", "documents", "passages")
"""Fields of a tool's JSON answer that hold its passages."""
BLANK_LINE = EVIDENCE_OPEN.removesuffix("<information>")
"""What an episode writes between a search and `<information>`."""
_NUMBERED = re.compile(r"^Doc \d+\s?\(Title: ?", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Step:
    """What the policy writes in one turn, up to its action; `documents` None: the action is the answer.

    White space after a search is kept where a trace has it: one token can close a tag and end a line.
    """

    text: str
    documents: tuple[Document, ...] | None = None


def trace_steps(trace: str) -> list[Step]:
    """The steps of a recorded response. Turns that earned a notice are left out, and so is the notice.

    Raises FieldError where a search has no `<information>` block, there is text between them, or the response
    does not end with an answer.
    """
    steps: list[Step] = []
    *before, (last, _) = _turns(trace)
    for said, environment in before:
        if "<information>" not in environment:
            continue  # a notice, which says that this turn had no valid action
        found, turn = actions(said), len(steps) + 1
        if not found:
            raise FieldError("trace", f"turn {turn}: expected <search> … </search> before <information>")
        if len(found) > 1 or said[found[0].end :].strip():
            raise FieldError("trace", f"turn {turn}: expected <information> right after its action")
        if found[0].kind != "search":
            raise FieldError("trace", f"turn {turn}: expected nothing after <answer> … </answer>")
        if not found[0].argument:
            raise FieldError("trace", f"turn {turn}: expected a query inside <search> … </search>")
        evidence = environment.removeprefix("<information>").removesuffix("</information>")
        said = said.removesuffix(BLANK_LINE) if said.endswith(BLANK_LINE) else said.rstrip()
        steps.append(Step(said, documents_of(evidence)))
    return [*steps, Step(_final(last, len(steps) + 1))]


def _turns(trace: str) -> Iterator[tuple[str, str]]:
    """(what the policy said, the evidence or notice that followed); the last is followed by nothing."""
    spans = policy_spans(trace)
    ends = [*(start for start, _ in spans[1:]), len(trace)]
    for (start, end), until in zip(spans, ends, strict=True):
        if end < until or end == len(trace):
            yield trace[start:end].lstrip(), trace[end:until]


def _final(said: str, turn: int) -> str:
    """The last turn up to its answer. What follows the answer is no part of an episode."""
    found = actions(said)
    if not found or found[-1].kind != "answer":
        problem = "a search without <information> … </information> after it" if found else "no answer"
        raise FieldError("trace", f"turn {turn}: {problem}; expected <answer> … </answer> at the end")
    if len(found) > 1:
        raise FieldError("trace", f"turn {turn}: expected one action, got {len(found)}")
    return said[: found[0].end]


def documents_of(text: str) -> tuple[Document, ...]:
    """The passages in a text that a search brought.

    Read as `Doc 1(Title: …) …` lines, as an episode writes them; or as JSON, a list of passages with
    `contents` or `title` and `text`, such as a `/retrieve` service answers; else as one passage, whose first
    line is its title where there is more than one.
    """
    text = text.strip()
    if not text:
        return ()
    starts = [match.start() for match in _NUMBERED.finditer(text)]
    if starts and starts[0] == 0:
        passages = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
        return tuple(Document(str(i), _numbered(passage)) for i, passage in enumerate(passages, 1))
    if text[0] in "[{":
        try:
            return _listed(json.loads(text))
        except (
            ValueError,
            RecursionError,
        ):  # no passages as a retriever lists them: it is a text like any other
            pass
    return (Document("1", text if "\n" in text else f"\n{text}"),)


def _numbered(passage: str) -> str:
    """`Doc 1(Title: …) rest` as title, newline, rest. A title may hold brackets that are closed again."""
    opened = _NUMBERED.match(passage)
    assert opened is not None
    depth = 1
    for position, character in enumerate(passage[opened.end() :], opened.end()):
        depth += (character == "(") - (character == ")")
        if depth == 0 or character == "\n":
            return f"{passage[opened.end() : position].strip()}\n{passage[position + 1 :].strip()}"
    return passage[opened.end() :].strip()


def _listed(value: Any) -> tuple[Document, ...]:
    """Passages of a tool's JSON answer. Raises ValueError where it holds none."""
    while isinstance(value, Mapping) and (key := next((k for k in PASSAGE_LISTS if k in value), "")):
        value = value[key]
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]  # one query's passages, out of a list for several queries
    passages = value if isinstance(value, list) else [value]
    return tuple(_passage(number, passage) for number, passage in enumerate(passages, 1))


def _passage(number: int, value: object) -> Document:
    if isinstance(value, Mapping) and isinstance(value.get("document"), Mapping):
        value = value["document"]
    if not isinstance(value, Mapping):
        raise ValueError("not a passage")
    return parse_document(number, {**value, "id": number})

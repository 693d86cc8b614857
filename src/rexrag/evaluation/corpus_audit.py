"""Corpus audit: which questions have no passage that holds an answer, so that scores have a ceiling beside.

A passage holds an answer where `agent.reward.has_answer` says so. Questions whose answers are yes or no
cannot be judged this way and are counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rexrag.agent.reward import evidence_answers, normalize_answer
from rexrag.types import Document, Question


@dataclass(frozen=True, slots=True)
class Audit:
    """Groups of one set: with an answer in some passage, with none, and those that cannot be judged."""

    answerable: tuple[str, ...]
    unanswerable: tuple[str, ...]
    unjudged: tuple[str, ...]

    @property
    def ceiling(self) -> float:
        """Share of questions that the corpus does not rule out: the unjudged count as possible."""
        n = len(self.answerable) + len(self.unanswerable) + len(self.unjudged)
        return 1.0 - len(self.unanswerable) / n if n else 0.0

    def figures(self) -> dict[str, Any]:
        return {
            "ceiling": self.ceiling,
            "answerable": len(self.answerable),
            "unanswerable": len(self.unanswerable),
            "unjudged": len(self.unjudged),
        }


def audit(
    sets: Mapping[str, Sequence[Question]], documents: Iterable[Document]
) -> tuple[dict[str, Audit], int]:
    """Every set's audit in one pass over the corpus, and how many documents there were.

    Memory grows with the questions, not with the corpus. An answer that was found is not looked for again.
    """
    patterns = _Patterns(question for questions in sets.values() for question in questions)
    count = 0
    for document in documents:
        count += 1
        patterns.look(document.contents)
    return {name: _split(questions, patterns.found) for name, questions in sets.items()}, count


class _Patterns:
    """Answers as sequences of words, by their first word."""

    def __init__(self, questions: Iterable[Question]) -> None:
        self.found: set[str] = set()
        self._groups: dict[tuple[str, ...], set[str]] = {}
        for question in questions:
            for answer in evidence_answers(question.answers):
                self._groups.setdefault(tuple(answer.split()), set()).add(question.group)
        self._by_first: dict[str, list[tuple[str, ...]]] = {}
        for pattern in self._groups:
            self._by_first.setdefault(pattern[0], []).append(pattern)

    def look(self, text: str) -> None:
        if not self._by_first:
            return
        words = normalize_answer(text).split()
        for place, word in enumerate(words):
            for pattern in self._by_first.get(word, ()):
                if tuple(words[place : place + len(pattern)]) == pattern:
                    self.found |= self._groups[pattern]
                    # A new list, because the old one is being walked through.
                    self._by_first[word] = [other for other in self._by_first[word] if other != pattern]


def _split(questions: Sequence[Question], found: set[str]) -> Audit:
    judged = [question for question in questions if evidence_answers(question.answers)]
    names = {question.group for question in judged}
    return Audit(
        tuple(q.group for q in judged if q.group in found),
        tuple(q.group for q in judged if q.group not in found),
        tuple(q.group for q in questions if q.group not in names),
    )

"""Stand-ins for a model and a retriever, small enough to reason about. They obey the real protocols."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rexrag.agent.episode import Codec, Episode, State
from rexrag.errors import RetrievalError
from rexrag.retrieval.base import Retriever
from rexrag.types import Document, Question

Script = Callable[[Question, int, int], str]
"""(question, turn, attempt) -> what the policy says in that turn.

`turn` counts from 0. `attempt` counts the episodes of one question in the order they are run, so that base
rollouts are 0, 1, … and probes follow.
"""

POLICY_LOGP, CUE_LOGP = -1.0, -2.0


class CharCodec:
    """One token for each character (its code point); 0 ends the sequence, so no text holds it."""

    eos_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return [ord(character) or 0xFFFD for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in ids if token)

    def prompt(self, user_message: str) -> list[int]:
        return self.encode(user_message)


class FakeRetriever:
    """Answers known queries, nothing else; records every call; fails the first `failures` calls."""

    digest = "fake"

    def __init__(self, answers: Mapping[str, Sequence[Document]] | None = None, failures: int = 0) -> None:
        self.answers = dict(answers or {})
        self.failures = failures
        self.calls: list[tuple[tuple[str, ...], int]] = []

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        self.calls.append((tuple(queries), topk))
        if self.failures:
            self.failures -= 1
            raise RetrievalError("the fake retriever was told to fail")
        return [list(self.answers.get(query, ()))[:topk] for query in queries]


class ScriptedPolicy:
    """A policy that says what a script says, then ends the turn. Every token has the same log-probability."""

    def __init__(self, script: Script, codec: Codec | None = None) -> None:
        self.script = script
        self._codec = codec if codec is not None else CharCodec()
        self.attempts: Counter[str] = Counter()
        self.sessions: list[ScriptedSession] = []

    @property
    def codec(self) -> Codec:
        return self._codec

    def session(self) -> ScriptedSession:
        self.sessions.append(ScriptedSession(self))
        return self.sessions[-1]

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float) -> list[Tensor]:
        return [torch.full((len(response),), POLICY_LOGP) for _, response in rows]


class ScriptedSession:
    """Drives each episode to its end, one after the other; counts what a real session counts."""

    def __init__(self, policy: ScriptedPolicy) -> None:
        self.policy = policy
        self.generated_tokens = self.prefilled_tokens = 0
        self.closed = False
        self.seeds: list[int] = []

    def run(self, episodes: Sequence[Episode], retriever: Retriever, temperature: float, seed: int) -> None:
        assert not self.closed, "the session was closed"
        self.seeds.append(seed)
        for episode in episodes:
            attempt = self.policy.attempts[episode.question.group]
            self.policy.attempts[episode.question.group] += 1
            self.prefilled_tokens += len(episode.prompt) if episode.parent is None else 0
            self._drive(episode, retriever, attempt)

    def close(self) -> None:
        self.closed = True

    def _drive(self, episode: Episode, retriever: Retriever, attempt: int) -> None:
        while episode.state is not State.DONE:
            if episode.state is State.SEARCH:
                episode.found(retriever.search([episode.query], episode.topk)[0])
            elif episode.state is State.FORCED:
                self.prefilled_tokens += len(episode.forced)
                episode.take_forced([CUE_LOGP] * len(episode.forced))
            else:
                self.generated_tokens += self._say(episode, attempt)

    def _say(self, episode: Episode, attempt: int) -> int:
        codec = self.policy.codec
        said = codec.encode(self.policy.script(episode.question, len(episode.turns), attempt))
        count = 0
        for token in [*said, min(codec.eos_ids)]:
            episode.sampled(token, POLICY_LOGP)
            count += 1
            if episode.state is not State.SAMPLE:
                break
        return count


def document(title: str, text: str = "", score: float = 0.0) -> Document:
    """A passage in the corpus form: `"Title"`, newline, text. Its id is its title."""
    return Document(title, f'"{title}"\n{text}', score)

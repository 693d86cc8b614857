"""One question, its trace printed while it is written."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rexrag.agent.episode import Codec, Episode
from rexrag.config.schema import AgentConfig, Config
from rexrag.engine.loading import load_policy
from rexrag.io import printable
from rexrag.retrieval import make_retriever
from rexrag.training.components import check_window, load_data
from rexrag.types import Question, Rollout


class EchoingEpisode(Episode):
    """An episode that hands on its text as it grows."""

    def __init__(
        self, question: Question, codec: Codec, config: AgentConfig, topk: int, say: Callable[[str], None]
    ) -> None:
        super().__init__(question, codec, config, topk)
        self._say, self._said = say, ""

    def sampled(self, token: int, logp: float) -> None:
        super().sampled(token, logp)
        self._tell()

    def take_forced(self, logps: Sequence[float]) -> None:
        super().take_forced(logps)
        self._tell()

    def _tell(self) -> None:
        text = self.codec.decode(self.tokens)
        # A character of several tokens shows as a replacement mark until it is whole.
        if text.startswith(self._said) and not text.endswith("�"):
            self._say(printable(text[len(self._said) :]))
            self._said = text


def ask(
    question: str,
    config: Config,
    temperature: float = 0.0,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
) -> Rollout:
    """Roll out one question with the configured policy and corpus. Raises RexragError."""
    policy = load_policy(config.policy)
    check_window(policy, config)
    corpus = load_data(config.data).corpus
    retriever = make_retriever(config.retriever, corpus)
    asked = Question("asked", question, ("",))
    episode = EchoingEpisode(asked, policy.codec, config.agent, config.retriever.topk, say or _write)
    session = policy.session()
    try:
        session.run([episode], retriever, temperature, seed)
    finally:
        session.close()
    return episode.rollout()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

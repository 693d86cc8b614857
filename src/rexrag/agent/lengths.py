"""Questions that are too long: their prompt leaves no token of `agent.total_tokens` for a response."""

from __future__ import annotations

from collections.abc import Sequence

from rexrag.agent.episode import Codec, Episode
from rexrag.agent.prompts import template_text
from rexrag.config.schema import AgentConfig
from rexrag.errors import DataError
from rexrag.types import Question

NAMED = 5
"""Of the questions that are too long, as many are named in a message."""
TOKENS_A_BYTE = 2
"""A token is a byte or more, but a tokenizer may replace a character by a longer text first."""


def too_long(questions: Sequence[Question], codec: Codec, config: AgentConfig) -> list[Question]:
    """Those of the questions that do not fit. Only texts that could be too long are encoded.

    Raises ConfigError where `config` cannot hold an episode at all, DataError where its template is a text
    file that is none.
    """
    template_text(config.template)
    shortest = min(questions, key=lambda question: len(question.text), default=None)
    if shortest is None:
        return []
    frame = _prompt_tokens(shortest, codec, config)
    room = config.total_tokens - (frame or 0)
    maybe = [q for q in questions if frame is None or TOKENS_A_BYTE * len(q.text.encode()) >= room]
    return [question for question in maybe if _prompt_tokens(question, codec, config) is None]


def describe(long: Sequence[Question], count: int, config: AgentConfig) -> str:
    """How many of `count` questions are too long, and which."""
    named = ", ".join(question.group for question in long[:NAMED])
    more = f" and {len(long) - NAMED:,} more" if len(long) > NAMED else ""
    return (
        f"{len(long):,} of {count:,} questions leave no room for a response in "
        f"agent.total_tokens = {config.total_tokens}: {named}{more}"
    )


def _prompt_tokens(question: Question, codec: Codec, config: AgentConfig) -> int | None:
    """Tokens of a question's prompt; None where no response fits after it."""
    try:
        return len(Episode(question, codec, config).prompt)
    except DataError:
        return None

"""What an episode needs of a protocol: how searches and answers are written, and evidence is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rexrag.types import Document

ActionKind = Literal["search", "answer"]


class TokenCodec(Protocol):
    """The part of `episode.Codec` that rendering needs."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class Action:
    """A complete action; `start:end` are its characters, from opening to closing tag, both included."""

    kind: ActionKind
    argument: str
    start: int
    end: int


class AgentProtocol(Protocol):
    """A plug-in: an object with these attributes. The built-in one is `tags`."""

    notice: str
    """The text that the environment inserts after a turn without an action."""
    stop_strings: tuple[str, ...]
    """Every complete action ends with one of these; an engine that samples whole turns stops there."""

    def parse_action(self, text: str) -> Action | None:
        """The first complete action in a turn of the policy, or None. Spans are positions in `text`."""
        ...

    def render_evidence(self, documents: Sequence[Document], codec: TokenCodec, max_tokens: int) -> list[int]:
        """Token ids of what the policy is shown of these documents, at most `max_tokens`.

        No action may be readable in it, whatever the documents say. Raises ConfigError where `max_tokens`
        cannot hold an empty frame.
        """
        ...

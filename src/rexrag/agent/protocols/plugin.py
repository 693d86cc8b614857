"""A protocol of the user's own, held to what a protocol returns."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rexrag.agent.protocols.base import Action, TokenCodec
from rexrag.errors import PluginError
from rexrag.plugins import calling, require_parameters, shown
from rexrag.types import Document


@dataclass(slots=True, eq=False)
class PluginProtocol:
    """Passes calls on and checks what comes back. Every registration is an object of its own."""

    inner: Any
    name: str
    notice: str
    stop_strings: tuple[str, ...]

    def parse_action(self, text: str) -> Action | None:
        """Raises PluginError where it fails or returns neither an action nor None."""
        what = f"agent.protocol = '{self.name}', parse_action"
        action = calling(what, self.inner.parse_action, text)
        if action is None or isinstance(action, Action):
            return action
        raise PluginError(f"{what}: returned {shown(action)}, expected Action or None")

    def render_evidence(self, documents: Sequence[Document], codec: TokenCodec, max_tokens: int) -> list[int]:
        """Raises PluginError where it fails or returns no token ids."""
        what = f"agent.protocol = '{self.name}', render_evidence"
        tokens = calling(what, self.inner.render_evidence, documents, codec, max_tokens)
        try:
            return [operator.index(token) for token in tokens]
        except Exception:  # no iterable, or one that fails on the way
            raise PluginError(f"{what}: returned {shown(tokens)}, expected token ids") from None


def checked_protocol(inner: Any, name: str) -> PluginProtocol:
    """A user's object as a protocol. Raises PluginError where it has not what `AgentProtocol` asks for."""
    what = f"agent.protocol = '{name}'"
    wanted = ("notice", "stop_strings", "parse_action", "render_evidence")
    missing = [part for part in wanted if not calling(what, hasattr, inner, part)]
    if missing:
        raise PluginError(f"{what}: it has no '{missing[0]}'")
    require_parameters(inner.parse_action, 1, f"{what}, parse_action")
    require_parameters(inner.render_evidence, 3, f"{what}, render_evidence")
    notice, stops = inner.notice, inner.stop_strings
    if not isinstance(notice, str):
        raise PluginError(f"{what}: notice is {shown(notice)}, expected text")
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
        raise PluginError(f"{what}: stop_strings is {shown(stops)}, expected a tuple of texts, none empty")
    return PluginProtocol(inner, name, notice, tuple(stops))

"""Protocols of an agent by name: `tags` (Search-R1's), or a plug-in `"my_package.module:name"`.

| module | what |
|---|---|
| `base` | what a protocol must have |
| `tags` | `<search>`, `<answer>`, `<information>` |
| `plugin` | a protocol of the user's own, held to what a protocol returns |
"""

from __future__ import annotations

from typing import Any

from rexrag.agent.protocols.base import Action, AgentProtocol
from rexrag.agent.protocols.plugin import checked_protocol
from rexrag.agent.protocols.tags import Tags
from rexrag.plugins import calling, give, load_plugin

__all__ = ["Action", "AgentProtocol", "protocol_of", "register_protocol"]

_PROTOCOLS: dict[str, AgentProtocol] = {"tags": Tags()}


def protocol_of(name: str) -> AgentProtocol:
    """The protocol that a configuration names; one instance of each. Raises PluginError."""
    if name not in _PROTOCOLS:
        found = load_plugin(name, "agent.protocol", known=_PROTOCOLS)
        made = calling(f"agent.protocol = '{name}'", found) if isinstance(found, type) else found
        _PROTOCOLS[name] = checked_protocol(made, name)
    return _PROTOCOLS[name]


def register_protocol(protocol: Any) -> str:
    """Make an object known as a protocol; returns the name for `agent.protocol`. Raises PluginError."""
    name = give(protocol)
    _PROTOCOLS[name] = checked_protocol(protocol, name)
    return name

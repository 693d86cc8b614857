"""Protocols of an agent by name: `tags` (Search-R1's), or a plug-in `"my_package.module:name"`.

| module | what |
|---|---|
| `base` | what a protocol must have |
| `tags` | `<search>`, `<answer>`, `<information>` |
"""

from __future__ import annotations

from typing import Any

from rexrag.agent.protocols.base import Action, AgentProtocol
from rexrag.agent.protocols.tags import Tags
from rexrag.errors import PluginError
from rexrag.plugins import give, load_plugin, require_parameters

__all__ = ["Action", "AgentProtocol", "protocol_of", "register_protocol"]

_PROTOCOLS: dict[str, AgentProtocol] = {"tags": Tags()}


def protocol_of(name: str) -> AgentProtocol:
    """The protocol that a configuration names; one instance of each. Raises PluginError."""
    if name not in _PROTOCOLS:
        found = load_plugin(name, "agent.protocol", known=_PROTOCOLS)
        _PROTOCOLS[name] = _checked(found() if isinstance(found, type) else found, name)
    return _PROTOCOLS[name]


def register_protocol(protocol: Any) -> str:
    """Make an object known as a protocol; returns the name for `agent.protocol`. Raises PluginError."""
    name = give(protocol)
    _PROTOCOLS[name] = _checked(protocol, name)
    return name


def _checked(found: Any, name: str) -> AgentProtocol:
    wanted = ("notice", "stop_strings", "parse_action", "render_evidence")
    missing = [part for part in wanted if not hasattr(found, part)]
    if missing:
        raise PluginError(f"agent.protocol = '{name}': it has no '{missing[0]}'")
    require_parameters(found.parse_action, 1, f"agent.protocol = '{name}', parse_action")
    require_parameters(found.render_evidence, 3, f"agent.protocol = '{name}', render_evidence")
    protocol: AgentProtocol = found
    return protocol

"""Which settings of a configuration name plug-ins: importing one runs its code."""

from __future__ import annotations

from rexrag.config.algorithms import Probing
from rexrag.config.schema import Config
from rexrag.errors import ConfigError
from rexrag.plugins import is_dotted, is_given


def plugin_names(config: Config) -> dict[str, str]:
    """Dotted key -> dotted name, of every plug-in that a configuration names."""
    agent, algorithm = config.agent, config.algorithm
    named = {
        "agent.reward": agent.reward,
        "agent.answer_judge": agent.answer_judge,
        "agent.protocol": agent.protocol,
        "retriever.plugin": config.retriever.plugin,
        "algorithm.dead_end_judge": algorithm.dead_end_judge if isinstance(algorithm, Probing) else "",
        **{f"train.callbacks[{i}]": name for i, name in enumerate(config.train.callbacks)},
    }
    return {key: name for key, name in named.items() if is_dotted(name)}


def require_plugins_allowed(config: Config, allowed: bool, where: object) -> None:
    """Refuse plug-ins that a run folder names, unless the user allows them. Raises ConfigError."""
    named = {key: name for key, name in plugin_names(config).items() if not is_given(name)}
    if named and not allowed:
        key, name = next(iter(named.items()))
        raise ConfigError(
            f"{where} names a plug-in ({key} = '{name}'), which is code that would run: "
            "--allow-plugins (in Python: allow_plugins=True), if you trust it"
        )

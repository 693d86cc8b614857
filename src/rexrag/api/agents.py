"""An agent from Python: `load_agent(...).ask(question)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from rexrag.api.arguments import naming_arguments, one_or_several
from rexrag.config.schema import Config
from rexrag.errors import ConfigError
from rexrag.evaluation.ask import Answer, ask
from rexrag.evaluation.policies import AgentParts, EndpointOptions, load_agent_parts
from rexrag.retrieval.plugin import checked_retriever


@dataclass(frozen=True, slots=True, repr=False)
class Agent:
    """A loaded policy with its retriever and settings.

    Usable as a context manager, which closes the connection to an endpoint.
    """

    parts: AgentParts
    source: str

    def __repr__(self) -> str:
        return f"Agent({self.source!r})"

    @property
    def config(self) -> Config:
        return self.parts.config

    def ask(
        self,
        question: str,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer one question; temperature 0 is greedy. on_text: gets the response while it is written.

        Raises RexragError with one line.

        >>> agent.ask("Who is married to Clara Nyberg?").answer      # doctest: +SKIP
        """
        parts = self.parts
        return ask(parts.policy, question, parts.retriever, parts.config, temperature, seed, on_text)

    def close(self) -> None:
        """Close the connection to an endpoint."""
        self.parts.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_agent(
    source: str | Path,
    *,
    config: str | Path | None = None,
    overrides: str | Sequence[str] = (),
    retriever: Any = None,
    allow_plugins: bool = False,
    **endpoint: Any,
) -> Agent:
    """Load a run folder, a checkpoint, a model folder, a hub id, `tiny-hard`, or an endpoint's URL.

    config: a TOML file or the name of a shipped one; None takes the run's own. overrides: `"agent.topk=3"`.
    retriever: an object with `search(queries, topk)`, instead of the configured one. allow_plugins: import
    plug-ins that a run folder names. endpoint: `model`, `tokenizer`, `concurrency`, `timeout`, `retries`.
    Raises RexragError with one line.

    >>> agent = rexrag.load_agent("runs/quickstart")      # doctest: +SKIP
    """
    known = [field.name for field in fields(EndpointOptions)]
    unknown = [name for name in endpoint if name not in known]
    if unknown:
        raise ConfigError(f"{unknown[0]}: expected {', '.join(known)}, which belong to an endpoint")
    with naming_arguments(policy="source", model="model", tokenizer="tokenizer"):
        parts = load_agent_parts(
            str(source),
            None if config is None else str(config),
            one_or_several(overrides),
            retriever=None if retriever is None else checked_retriever(retriever),
            endpoint=EndpointOptions(**endpoint) if endpoint else None,
            allow_plugins=allow_plugins,
        )
    return Agent(parts, str(source))

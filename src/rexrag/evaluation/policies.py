"""Which agent is meant, who it is, and how it is loaded: a run, a checkpoint, a model, an endpoint.

`load_agent_parts` takes all of these and is what `rexrag ask` and `rexrag.load_agent` stand on. An
evaluation needs the parts one by one: `resolve_config`, `open_policy`, `open_retriever`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rexrag.config import presets
from rexrag.config.files import parse_config
from rexrag.config.plugin_keys import require_plugins_allowed
from rexrag.config.schema import Config, PolicyConfig, RetrieverConfig
from rexrag.data.world.generator import World
from rexrag.engine.base import Policy
from rexrag.errors import ConfigError
from rexrag.retrieval import make_retriever
from rexrag.retrieval.base import Retriever
from rexrag.training.run_folder import digest, last_checkpoint
from rexrag.types import Document


@dataclass(frozen=True, slots=True)
class PolicySource:
    """A policy that need not be loaded yet. `digest` is its identity in the cache."""

    name: str
    digest: str
    load: Callable[[], Policy]
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """What only an endpoint needs. Seconds; retries after the first try."""

    model: str = ""
    tokenizer: str = ""
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 5


@dataclass(frozen=True, slots=True)
class AgentParts:
    """What answers questions: a loaded policy, what it searches, and the settings it was trained under."""

    source: PolicySource
    policy: Policy
    retriever: Retriever
    config: Config
    given_retriever: Retriever | None = None
    """The retriever, where the caller brought it."""

    def close(self) -> None:
        """Give back what an endpoint holds open."""
        self.source.close()


def load_agent_parts(
    source: str,
    config: str | None = None,
    overrides: Sequence[str] = (),
    retriever: Retriever | None = None,
    endpoint: EndpointOptions | None = None,
    allow_plugins: bool = False,
) -> AgentParts:
    """Load a run folder, checkpoint, model folder, hub id, embedded checkpoint or an endpoint's URL.

    config: a TOML file or a preset; None takes the run's own. overrides: `a.b=value`. retriever: stands in
    for the configured one. allow_plugins: import those that a run folder names. Raises RexragError.
    """
    from rexrag.training.components import check_window

    settings = resolve_config(source, config, overrides, allow_plugins)
    # First what is quick: a corpus that is missing is known before weights are loaded.
    searched = retriever or open_retriever(settings, own_world=not settings.data.train)
    opened = open_policy(source, settings.policy, endpoint or EndpointOptions())
    try:
        policy = opened.load()
        check_window(policy, settings)
    except BaseException:
        opened.close()
        raise
    return AgentParts(opened, policy, searched, settings, retriever)


def is_endpoint(policy: str) -> bool:
    return policy.startswith(("http://", "https://"))


def resolve_config(
    policy: str, config: str | None, overrides: Sequence[str], allow_plugins: bool = False
) -> Config:
    """The configuration to answer under: the one named, else that of the run a checkpoint belongs to.

    Else the quickstart's for an embedded policy, and the defaults (Search-R1's protocol) for any other.
    `policy.path` becomes the folder, id or name of the policy. A plug-in that a run folder names is refused
    without `allow_plugins`: importing it runs code. Raises ConfigError, CheckpointError.
    """
    path = _weights(policy) if policy and not is_endpoint(policy) else ""
    named = [f"policy.path={_quoted(path)}"] if path else []
    run = _run_config(policy)
    if config or not policy or _is_embedded(policy):
        return presets.resolve(config, "", [*named, *overrides])
    if run is not None:
        settings = presets.resolve(run, "", [*named, *overrides])
        require_plugins_allowed(settings, allow_plugins, run)
        return settings
    return parse_config({}, [*named, *overrides], where="defaults")


def open_policy(policy: str, config: PolicyConfig, options: EndpointOptions) -> PolicySource:
    """The policy of a configuration, or the endpoint that `policy` names. Raises RexragError."""
    if is_endpoint(policy):
        from rexrag.engine.endpoint import connect

        served = connect(policy, options.model, options.tokenizer, concurrency=options.concurrency,
                         timeout=options.timeout, retries=options.retries)  # fmt: skip
        name = f"{served.client.model} at {served.client.url}"
        return PolicySource(name, served.digest, lambda: served, served.client.close)
    if options.model or options.tokenizer:
        raise ConfigError("--model and --tokenizer belong to an endpoint: --policy http://127.0.0.1:8000/v1")
    from rexrag.engine.loading import identity, load_policy, precision_of, resolve

    name = digest(precision_of(config).name, *identity(resolve(config.path)))
    return PolicySource(config.path, name, lambda: load_policy(config))


def needs_no_corpus(config: RetrieverConfig) -> bool:
    """Does the retriever bring its own documents?"""
    return bool(config.index) or config.kind in ("remote", "plugin")


def open_retriever(config: Config, own_world: bool) -> Retriever:
    """The configured retriever; `own_world` searches the embedded world where no corpus is named.

    Raises ConfigError, DataError, IndexFolderError.
    """
    corpus: Sequence[Document] | str | None = config.data.corpus or None
    if corpus is None and own_world and not needs_no_corpus(config.retriever):
        corpus = World(config.data.world_seed, config.data.world_people).documents
    return make_retriever(config.retriever, corpus)


def _is_embedded(policy: str) -> bool:
    from rexrag.engine.loading import EMBEDDED

    return policy in EMBEDDED


def _weights(policy: str) -> str:
    """A run folder stands for its newest whole checkpoint."""
    folder = Path(policy)
    if not (folder / "checkpoints").is_dir():
        return policy
    checkpoints = folder / "checkpoints"
    newest = None if any(checkpoints.glob("global_step_*")) else last_checkpoint(folder)[0]
    if newest is None:
        raise ConfigError(
            f"--policy {folder}: its checkpoints are verl's; first "
            f"rexrag model export {folder} --out DIR, then --policy DIR"
        )
    return str(newest)


def _run_config(policy: str) -> Path | None:
    folder = Path(policy)
    places = [folder, folder.parent.parent] if folder.parent.name == "checkpoints" else [folder]
    return next((place / "config.toml" for place in places if (place / "config.toml").is_file()), None)


def _quoted(text: str) -> str:
    return "'" + text + "'" if "'" not in text else text

"""Which policy is meant, who it is, and how it is loaded: a checkpoint, a model folder or id, an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rexrag.config import presets
from rexrag.config.files import parse_config
from rexrag.config.schema import Config, PolicyConfig
from rexrag.engine.base import Policy
from rexrag.errors import ConfigError
from rexrag.training.run_folder import digest, last_checkpoint


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


def is_endpoint(policy: str) -> bool:
    return policy.startswith(("http://", "https://"))


def resolve_config(policy: str, config: str | None, overrides: Sequence[str]) -> Config:
    """The configuration to evaluate under: the one named, else that of the run a checkpoint belongs to.

    Else the quickstart's for an embedded policy, and the defaults (Search-R1's protocol) for any other.
    `policy.path` becomes the folder, id or name of the policy. Raises ConfigError, CheckpointError.
    """
    path = _weights(policy) if policy and not is_endpoint(policy) else ""
    named = [f"policy.path={_quoted(path)}"] if path else []
    run = _run_config(policy)
    if config or not policy or _is_embedded(policy):
        return presets.resolve(config, "", [*named, *overrides])
    if run is not None:
        return presets.resolve(run, "", [*named, *overrides])
    return parse_config({}, [*named, *overrides], where="defaults")


def open_policy(policy: str, config: PolicyConfig, options: EndpointOptions) -> PolicySource:
    """The policy of a configuration, or the endpoint that `policy` names. Raises RexragError."""
    if is_endpoint(policy):
        from rexrag.engine.endpoint import connect

        served = connect(
            policy,
            options.model,
            options.tokenizer,
            concurrency=options.concurrency,
            timeout=options.timeout,
            retries=options.retries,
        )
        return PolicySource(
            f"{served.client.model} at {served.client.url}",
            served.digest,
            lambda: served,
            served.client.close,
        )
    if options.model or options.tokenizer:
        raise ConfigError("--model and --tokenizer belong to an endpoint: --policy http://127.0.0.1:8000/v1")
    from rexrag.engine.loading import identity, load_policy, precision_of, resolve

    source = resolve(config.path)
    name = digest(precision_of(config).name, *identity(source))
    return PolicySource(config.path, name, lambda: load_policy(config))


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

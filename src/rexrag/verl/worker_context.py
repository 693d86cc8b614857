"""What every episode of a process shares. No verl here, so that verl's plugins can import it in any order."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache

from rexrag.agent.codec import HFCodec, load_codec
from rexrag.config.files import parse_config
from rexrag.config.schema import Config
from rexrag.engine.loading import resolve
from rexrag.method.cues import CueTrie
from rexrag.retrieval import make_retriever
from rexrag.training.components import load_cues
from rexrag.verl.search import BatchedSearch


@dataclass(frozen=True, slots=True)
class Parts:
    """What every episode of a process shares."""

    config: Config
    codec: HFCodec
    trie: CueTrie | None
    search: BatchedSearch


@cache
def parts_of(toml: str) -> Parts:
    """The parts that a configuration (the text of `config.toml`) asks for; made once in a process."""
    config = parse_config(tomllib.loads(toml))
    codec = load_codec(resolve(config.policy.path))
    verl = config.verl
    search = BatchedSearch(make_retriever(config.retriever), verl.search_batch, verl.search_connections)
    return Parts(config, codec, load_cues(config, codec), search)

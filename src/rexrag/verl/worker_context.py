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
from rexrag.method.dead_ends import Judge
from rexrag.retrieval import make_retriever
from rexrag.retrieval.batching import BatchedSearch, Bounds
from rexrag.training.components import dead_end_judge, load_cues


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What every episode of a process shares."""

    config: Config
    codec: HFCodec
    trie: CueTrie | None
    search: BatchedSearch
    judge: Judge | None
    """Of `dead_ends = "judge"`; here it cannot ask the engine for scores."""


@cache
def worker_context(toml: str) -> WorkerContext:
    """What a configuration (the text of `config.toml`) asks for; made once in a process."""
    config = parse_config(tomllib.loads(toml))
    codec = load_codec(resolve(config.policy.path))
    verl = config.verl
    search = BatchedSearch(
        make_retriever(config.retriever), Bounds(batch=verl.search_batch, searches=verl.search_connections)
    )
    judge = dead_end_judge(config, None)
    return WorkerContext(config, codec, load_cues(config, codec), search, judge)

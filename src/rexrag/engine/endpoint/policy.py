"""Episodes driven through a completions endpoint: a whole turn is asked for, then fed in token by token.

`concurrency` rollouts are in flight at once; the server batches them. A request that fails after every retry
ends its own rollout (`Episode.give_up`) and no other.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from math import nan
from typing import Any

from torch import Tensor

from rexrag.agent.codec import load_codec
from rexrag.agent.episode import Codec, Episode
from rexrag.agent.protocols.tags import neutralise
from rexrag.engine.endpoint.client import STOPS, Completion, CompletionClient
from rexrag.engine.turn_driver import Search, drive
from rexrag.errors import ConfigError, EndpointError, ModelError, RetrievalError
from rexrag.io import brief
from rexrag.retrieval.base import Retriever
from rexrag.retrieval.batching import BatchedSearch, Bounds
from rexrag.types import Origin

CONCURRENCY = 16
"""Rollouts in flight; a server with a batch scheduler takes more, see `--concurrency`."""
COMPARED = 64
"""Of as many first answers, token ids are compared with the text beside them."""


class EndpointPolicy:
    """See `engine.base.Policy`. Log-probabilities are not known (NaN), and rows cannot be scored."""

    def __init__(self, client: CompletionClient, codec: Codec, concurrency: int = CONCURRENCY) -> None:
        self.client, self.concurrency = client, concurrency
        self._codec = codec
        self._compared = 0

    @property
    def codec(self) -> Codec:
        return self._codec

    @property
    def digest(self) -> str:
        """Identity of address, model name and tokenizer; what weights stand behind is not known from here."""
        parts = ["endpoint", self.client.url, self.client.model, getattr(self._codec, "digest", "")]
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()

    def session(self) -> EndpointSession:
        return EndpointSession(self)

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float) -> list[Tensor]:
        raise ModelError(f"{self.client.url}: a completions endpoint samples, but cannot score rows")

    def tokens(self, done: Completion, limit: int, stops: Sequence[str] = STOPS) -> tuple[list[int], bool]:
        """The tokens of a turn, `limit` at most, and whether they are the very ones that were sampled.

        An end token is last where the server ended the turn. Raises ConfigError where its ids cannot be of
        this tokenizer.
        """
        codec = self.codec
        if done.ids is None:
            ids, exact = codec.encode(_without_end(done.text, codec))[:limit], False
        else:
            self._check_ids(done.ids, done.text)
            ids, exact = list(done.ids), True
        if done.finished:
            text = codec.decode(ids)
            closing = _trimmed_stop(text, done.stopped_by, done.names_stop, stops)
            if closing:
                ids, exact = [*ids, *codec.encode(closing)], False
            elif not (ids and ids[-1] in codec.eos_ids) and not any(stop in text for stop in stops):
                named = done.stopped_by
                ids.append(named if type(named) is int and named in codec.eos_ids else _end_token(codec))
        return ids, exact

    def _check_ids(self, ids: Sequence[int], text: str) -> None:
        """A wrong tokenizer shows at once: as ids that it lacks, or as another text than the server's."""
        known = getattr(self.codec, "vocabulary", None)
        remedy = f"this tokenizer is not that of {self.client.model}; name it with --tokenizer FOLDER-OR-ID"
        if known is not None and max(ids, default=0) >= known:
            raise ConfigError(f"{self.client.url}: token id {max(ids)}, but {known:,} are known: {remedy}")
        if self._compared < COMPARED:
            self._compared += 1
            ours, theirs = (_comparable(one, self.codec) for one in (self.codec.decode(ids), text))
            if not ours.startswith(theirs) and not theirs.startswith(ours):
                raise ConfigError(
                    f"{self.client.url}: its token ids say {brief(ours)}, its text {brief(theirs)}: {remedy}"
                )


def connect(
    url: str,
    model: str = "",
    tokenizer: str = "",
    *,
    concurrency: int = CONCURRENCY,
    timeout: float = 120.0,
    retries: int = 5,
    sleep: Callable[[float], None] = time.sleep,
) -> EndpointPolicy:
    """A policy at an address. `model` defaults to the only one the server offers, `tokenizer` to the model.

    Raises ConfigError where there is a choice or no tokenizer, EndpointError where nobody answers.
    """
    client = CompletionClient(url, model, timeout=timeout, retries=retries, sleep=sleep)
    try:
        client.model = model or _only_model(client)
        codec = load_codec(tokenizer or client.model)
    except ModelError as error:
        client.close()
        raise ConfigError(f"{error}; name the model's tokenizer with --tokenizer FOLDER-OR-ID") from None
    except BaseException:
        client.close()
        raise
    return EndpointPolicy(client, codec, concurrency)


def _only_model(client: CompletionClient) -> str:
    names = client.models()
    if len(names) > 1:
        raise ConfigError(f"{client.url} offers {', '.join(names)}: choose one with --model")
    return names[0]


class EndpointSession:
    """See `engine.base.Session`. Nothing is kept between turns here: servers cache prefixes themselves."""

    def __init__(self, policy: EndpointPolicy) -> None:
        self.policy = policy
        self.generated_tokens = 0
        self.prefilled_tokens = 0

    def close(self) -> None:
        pass

    def run(
        self,
        episodes: Sequence[Episode],
        retriever: Retriever,
        temperature: float,
        seed: int | Sequence[int],
    ) -> None:
        """See `engine.base.Session.run`. Rollouts of failed requests are given up; ConfigError stops all."""
        names = [
            f"{seed}/{place}/{episode.cut}" if isinstance(seed, int) else f"{seed[place]}/{episode.cut}"
            for place, episode in enumerate(episodes)
        ]
        _run_to_end(self._run(list(zip(episodes, names, strict=True)), retriever, temperature))

    async def _run(
        self, episodes: Sequence[tuple[Episode, str]], retriever: Retriever, temperature: float
    ) -> None:
        # One request to the retriever at a time: not every retriever may be called from several threads.
        search = BatchedSearch(retriever, Bounds(searches=1)).one
        places = asyncio.Semaphore(self.policy.concurrency)
        pool = ThreadPoolExecutor(self.policy.concurrency)
        try:
            await asyncio.gather(
                *(self._drive(one, search, places, partial(self._turn, pool, one, temperature, name))
                  for one, name in episodes)
            )  # fmt: skip
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # what is on its way ends with its request

    async def _drive(
        self, episode: Episode, search: Search, places: asyncio.Semaphore, turn: Callable[..., Any]
    ) -> None:
        async with places:
            start = len(episode.tokens)
            try:
                await drive(episode, turn, search, cue_logp=nan)
            except (EndpointError, RetrievalError) as error:
                episode.give_up(str(error))
            written = episode.origins[start:].count(int(Origin.POLICY))
            self.generated_tokens += written
            self.prefilled_tokens += len(episode.prompt) + len(episode.tokens) - start - written

    async def _turn(
        self, pool: Executor, episode: Episode, temperature: float, name: str, prefix: list[int], limit: int
    ) -> tuple[list[int], list[float]]:
        """Ask for the rest of a turn. Log-probs are not known."""
        stream = hashlib.sha256(f"{name}/{len(episode.tokens)}".encode()).digest()
        seed = int.from_bytes(stream[:4], "big") >> 1
        stops = episode.protocol.stop_strings
        ask = partial(self.policy.client.complete, prefix, limit, temperature, seed, stops)
        done = await asyncio.get_running_loop().run_in_executor(pool, ask)
        ids, exact = self.policy.tokens(done, limit, stops)
        episode.encoded_anew += not exact
        return ids, [nan] * len(ids)


def _run_to_end(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine from code that is none, also where an event loop is running already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, work).result()


def _comparable(text: str, codec: Codec) -> str:
    """What ids and text of an answer agree on: no spaces, no tags and special tokens, no cut characters."""
    special = getattr(getattr(codec, "tokenizer", None), "all_special_tokens", ())
    for token in special:
        text = text.replace(token, "")
    words = re.sub(r"\[[^\]]*\]", "", neutralise(text).partition("\ufffd")[0])
    return "".join(words.split())


def _trimmed_stop(
    text: str, stopped_by: str | int | None, names_stop: bool, stops: Sequence[str] = STOPS
) -> str:
    """The closing tag that a server stopped at and cut off; empty where there is none to add.

    A server that does not say what stopped it is taken to have stopped at the tag that is open.
    """
    if names_stop and stopped_by not in stops:
        return ""
    opened = {stop: text.rfind(stop.replace("/", "")) for stop in stops}
    is_open = [
        stop for stop in stops if (stopped_by == stop or not names_stop) and opened[stop] > text.rfind(stop)
    ]
    return max(is_open, key=lambda stop: opened[stop], default="")


def _without_end(text: str, codec: Codec) -> str:
    """The text without an end token that the server wrote out: as text it would be other tokens."""
    for end in (codec.decode([token]) for token in codec.eos_ids):
        text = text.removesuffix(end) if end.strip() else text
    return text


def _end_token(codec: Codec) -> int:
    own = getattr(getattr(codec, "tokenizer", None), "eos_token_id", None)
    return own if isinstance(own, int) and own in codec.eos_ids else min(codec.eos_ids)

"""Episodes driven through a completions endpoint: a whole turn is asked for, then fed in token by token.

Every rollout has a thread of its own, `concurrency` of them at once; the server batches them. A request that
fails after every retry ends its own rollout (`Episode.give_up`) and no other.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import nan

from torch import Tensor

from rexrag.agent.codec import load_codec
from rexrag.agent.episode import Codec, Episode, State
from rexrag.engine.endpoint.client import STOPS, CompletionClient
from rexrag.errors import ConfigError, EndpointError, ModelError, RetrievalError
from rexrag.retrieval.base import Retriever
from rexrag.types import Document

CONCURRENCY = 16
"""Rollouts in flight; a server with a batch scheduler takes more, see `--concurrency`."""


class EndpointPolicy:
    """See `engine.base.Policy`. Log-probabilities are not known (NaN), and rows cannot be scored."""

    def __init__(self, client: CompletionClient, codec: Codec, concurrency: int = CONCURRENCY) -> None:
        self.client, self.concurrency = client, concurrency
        self._codec = codec

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
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def close(self) -> None:
        pass

    def run(self, episodes: Sequence[Episode], retriever: Retriever, temperature: float, seed: int) -> None:
        """See `engine.base.Session.run`. Rollouts of failed requests are given up; ConfigError stops all."""
        search = _SharedSearch(retriever)
        with ThreadPoolExecutor(self.policy.concurrency) as pool:
            driven: list[Future[None]] = []
            try:
                for place, episode in enumerate(episodes):
                    stream = f"{seed}/{place}/{episode.cut}"
                    driven.append(pool.submit(self._drive, episode, search, temperature, stream))
                for future in driven:
                    future.result()
            except BaseException:
                self._stopped.set()  # rollouts that are going end with the request they wait for
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _drive(self, episode: Episode, search: _SharedSearch, temperature: float, stream: str) -> None:
        try:
            with self._lock:
                self.prefilled_tokens += len(episode.prompt)
            while episode.state is not State.DONE and not self._stopped.is_set():
                if episode.state is State.SEARCH:
                    episode.found(search(episode.query, episode.topk))
                elif episode.state is State.FORCED:
                    with self._lock:
                        self.prefilled_tokens += len(episode.forced)
                    episode.take_forced([nan] * len(episode.forced))
                else:
                    self._turn(episode, temperature, stream)
        except (EndpointError, RetrievalError) as error:
            episode.give_up(str(error))

    def _turn(self, episode: Episode, temperature: float, stream: str) -> None:
        """Ask for the rest of a turn and feed it in."""
        prefix, limit = [*episode.prompt, *episode.tokens], episode.tokens_left
        tokens, exact = self._tokens(prefix, limit, temperature, f"{stream}/{len(episode.tokens)}")
        episode.encoded_anew += not exact
        for token in tokens:
            episode.sampled(token, nan)
            with self._lock:
                self.generated_tokens += 1
            if episode.state is not State.SAMPLE:
                return  # the server wrote past the action

    def _tokens(
        self, prefix: list[int], limit: int, temperature: float, stream: str
    ) -> tuple[list[int], bool]:
        """The tokens of a turn, `limit` at most, and whether they are the very ones that were sampled.

        An end token is last where the server ended the turn.
        """
        codec = self.policy.codec
        seed = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:4], "big") >> 1
        done = self.policy.client.complete(prefix, limit, temperature, seed)
        ids = list(done.ids) if done.ids is not None else codec.encode(_without_end(done.text, codec))[:limit]
        exact = done.ids is not None
        if done.finished:
            text = codec.decode(ids)
            closing = _trimmed_stop(text, done.stopped_by, done.names_stop)
            if closing:
                ids, exact = [*ids, *codec.encode(closing)], False
            elif not (ids and ids[-1] in codec.eos_ids) and not any(stop in text for stop in STOPS):
                named = done.stopped_by
                ids.append(named if type(named) is int and named in codec.eos_ids else _end_token(codec))
        return ids, exact


def _trimmed_stop(text: str, stopped_by: str | int | None, names_stop: bool) -> str:
    """The closing tag that a server stopped at and cut off; empty where there is none to add.

    A server that does not say what stopped it is taken to have stopped at the tag that is open.
    """
    if names_stop and stopped_by not in STOPS:
        return ""
    opened = {stop: text.rfind(stop.replace("/", "")) for stop in STOPS}
    is_open = [
        stop for stop in STOPS if (stopped_by == stop or not names_stop) and opened[stop] > text.rfind(stop)
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


class _SharedSearch:
    """Searches of many threads, asked in batches: whoever gets the lock asks for all who wait."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._asking, self._queue = threading.Lock(), threading.Lock()
        self._waiting: list[tuple[str, int, Future[list[Document]]]] = []

    def __call__(self, query: str, topk: int) -> list[Document]:
        mine: Future[list[Document]] = Future()
        with self._queue:
            self._waiting.append((query, topk, mine))
        with self._asking:
            with self._queue:
                batch, self._waiting = self._waiting, []
            if batch:
                self._ask(batch)
        return mine.result()

    def _ask(self, batch: list[tuple[str, int, Future[list[Document]]]]) -> None:
        try:
            most = max(topk for _, topk, _ in batch)
            found = self._retriever.search([query for query, _, _ in batch], most)
            for (_, topk, future), documents in zip(batch, found, strict=True):
                future.set_result(documents[:topk])
        except Exception as error:
            for _, _, future in batch:
                if not future.done():
                    future.set_exception(error)

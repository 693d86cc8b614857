"""Searches of many episodes: batched, concurrent, and not lost when the service is away. No verl needed."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import ExitStack

import pytest

from rexrag.agent.episode import Episode
from rexrag.config.schema import AgentConfig, RetrieverConfig
from rexrag.engine.turn_driver import drive
from rexrag.errors import ModelError, RetrievalError
from rexrag.retrieval.batching import BatchedSearch, Bounds
from rexrag.retrieval.http.client import RemoteRetriever
from rexrag.types import Question
from rexrag.verl.launch import serving
from tests.support.fakes import CharCodec, FakeRetriever, document

PASSAGES = {name: [document(name, f"{name} is a city")] for name in ("oslo", "rome", "lima", "bern")}


class Slow(FakeRetriever):
    """Answers after a moment; counts how many requests run at once."""

    def __init__(self, seconds=0.02):
        super().__init__(PASSAGES)
        self.seconds, self.running, self.most, self.lock = seconds, 0, 0, threading.Lock()

    def search(self, queries, topk):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
            return super().search(queries, topk)


def ask(search, queries, topk=2):
    async def all_of_them():
        return await asyncio.gather(*(search.one(query, topk) for query in queries))

    return asyncio.run(all_of_them())


def test_every_query_gets_its_own_answer_in_few_requests():
    retriever = Slow()
    for i in range(100):
        retriever.answers[f"city {i}"] = [document(f"city {i}", "a city")]
    queries = [f"city {i // 2}" for i in range(200)]  # each is asked twice, and searched once
    answers = ask(BatchedSearch(retriever, Bounds(batch=40, searches=2)), queries)
    assert [[d.id for d in answer] for answer in answers] == [[query] for query in queries]
    assert sum(len(queries) for queries, _ in retriever.calls) == 100
    assert len(retriever.calls) <= 6 and max(len(queries) for queries, _ in retriever.calls) <= 40
    assert retriever.most <= 2


def test_connections_work_side_by_side():
    retriever = Slow(0.05)
    ask(BatchedSearch(retriever, Bounds(batch=1, searches=4)), [f"oslo {i}" for i in range(8)])
    assert retriever.most == 4 and len(retriever.calls) == 8


def test_different_depths_are_different_requests():
    retriever = Slow()
    search = BatchedSearch(retriever)

    async def both():
        return await asyncio.gather(search.one("oslo", 1), search.one("oslo", 2))

    asyncio.run(both())
    assert sorted(topk for _, topk in retriever.calls) == [1, 2]


def test_a_failure_reaches_those_who_asked_and_nobody_else():
    retriever = FakeRetriever(PASSAGES, failures=1)
    search = BatchedSearch(retriever, Bounds(searches=1))

    async def twice():
        first = await asyncio.gather(search.one("oslo", 1), search.one("rome", 1), return_exceptions=True)
        return first, await search.one("rome", 1)

    first, second = asyncio.run(twice())
    assert all(isinstance(error, RetrievalError) for error in first)
    assert [d.id for d in second] == ["rome"]


AGENT = AgentConfig(template="terse", search_turns=3, turn_tokens=200, evidence_tokens=200, total_tokens=2000)


def scripted(city, said):
    """An engine that searches twice, then answers; says more than one action, as one without stop strings."""

    async def generate(ids, limit):
        text = CharCodec().decode(ids)
        said.append(len(ids))
        turn = text.count("<information>")
        words = f"<search> {city} </search> and so on" if turn < 2 else f"<answer> {city} </answer> and"
        tokens = CharCodec().encode(words)[:limit]
        return tokens, [-1.0] * len(tokens)

    return generate


def run_episodes(search, cities):
    async def all_of_them():
        episodes = [Episode(Question(c, f"where is {c}", (c,)), CharCodec(), AGENT, 1) for c in cities]
        await asyncio.gather(
            *(drive(e, scripted(c, []), search) for e, c in zip(episodes, cities, strict=True))
        )
        return [episode.rollout() for episode in episodes]

    return asyncio.run(all_of_them())


def test_what_follows_an_action_is_dropped():
    said: list[int] = []
    episode = Episode(Question("q", "where is oslo", ("oslo",)), CharCodec(), AGENT, 1)
    asyncio.run(drive(episode, scripted("oslo", said), BatchedSearch(FakeRetriever(PASSAGES)).one))
    rollout = episode.rollout()
    assert rollout.em == 1.0 and "and so on" not in rollout.text and len(said) == 3
    assert [turn.action for turn in rollout.turns] == ["search", "search", "answer"]


def test_an_engine_that_says_nothing_is_an_error():
    async def nothing(ids, limit):
        return [], []

    episode = Episode(Question("q", "where is oslo", ("oslo",)), CharCodec(), AGENT, 1)
    with pytest.raises(ModelError, match="sampled nothing"):
        asyncio.run(drive(episode, nothing, BatchedSearch(FakeRetriever()).one))


@pytest.mark.parametrize("away", [2.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_a_retriever_that_dies_in_the_middle_delays_and_loses_nothing(away):
    """The real service, the real client with its default patience; down after the first answers."""
    cities = [list(PASSAGES)[i % 4] for i in range(12)]
    expected = run_episodes(BatchedSearch(FakeRetriever(PASSAGES)).one, cities)
    first, stack = FakeRetriever(PASSAGES), ExitStack()
    url = stack.enter_context(serving(first))
    port = int(url.rsplit(":", 1)[1].split("/")[0])
    died = threading.Event()

    def die_and_return():
        while not first.calls:
            time.sleep(0.01)
        stack.close()
        died.set()
        time.sleep(away)
        stack.enter_context(serving(FakeRetriever(PASSAGES), port))

    class AfterTheDeath(RemoteRetriever):
        def search(self, queries, topk):
            answers = super().search(queries, topk)
            died.wait(10)  # so that the next searches meet a dead service
            return answers

    thread = threading.Thread(target=die_and_return)
    thread.start()
    start = time.monotonic()
    with AfterTheDeath(url, retries=RetrieverConfig().retries) as retriever:
        rollouts = run_episodes(BatchedSearch(retriever, Bounds(batch=64, searches=4)).one, cities)
    thread.join()
    stack.close()
    assert time.monotonic() - start >= away
    assert [r.tokens for r in rollouts] == [r.tokens for r in expected]
    assert all(r.em == 1.0 for r in rollouts)

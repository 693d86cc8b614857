"""Concurrent requests share searches and a cache, and are told to come back where too many wait."""

import asyncio
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from rexrag.errors import RetrievalError
from rexrag.retrieval.http.client import RemoteRetriever
from rexrag.retrieval.http.service import Limits, create_app
from rexrag.retrieval.index.folder import save_index
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.types import Document
from tests.support.live_service import running


class Gate:
    """A retriever that answers each query with itself, once it is let; records its calls."""

    digest = "gate"

    def __init__(self, open_: bool = True, fail: bool = False) -> None:
        self.calls: list[tuple[list[str], int]] = []
        self.begun, self.open = threading.Event(), threading.Event()
        self.fail = fail
        if open_:
            self.open.set()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        self.calls.append((list(queries), topk))
        self.begun.set()
        assert self.open.wait(20)
        if self.fail:
            raise RetrievalError("the index is on fire")
        return [[Document(query, f"{query}/{topk}")] for query in queries]


def ask(http: httpx.Client, *queries: str, topk: int = 1) -> httpx.Response:
    return http.post("/retrieve", json={"queries": list(queries), "topk": topk})


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split()[0] == name)


def test_requests_that_arrive_during_a_search_are_searched_together() -> None:
    gate = Gate(open_=False)
    with (
        running(create_app(gate)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=20) as http,
        ThreadPoolExecutor(9) as pool,
    ):
        first = pool.submit(ask, http, "first")
        assert gate.begun.wait(20)
        others = [pool.submit(ask, http, f"q{i}", topk=2 if i == 7 else 1) for i in range(8)]
        wait_for(lambda: metric(http, "rexrag_waiting_queries") == 8)
        gate.open.set()
        assert first.result().json() == {"result": [[{"id": "first", "contents": "first/1"}]]}
        for i, answer in enumerate(others):
            assert answer.result().json()["result"][0][0]["contents"] == f"q{i}/{2 if i == 7 else 1}"
        assert metric(http, "rexrag_batch_queries_sum") == 9
        assert metric(http, "rexrag_requests_total") == metric(http, "rexrag_queries_total") == 9
    # One alone; then those of one topk together (the other topk may fall between them).
    assert gate.calls[0] == (["first"], 1)
    assert len(gate.calls) <= 4
    assert {topk for queries, topk in gate.calls if "q7" in queries} == {2}


def test_a_batch_is_no_larger_than_it_may_be() -> None:
    gate = Gate()
    with running(create_app(gate, limits=Limits(batch=3))) as url, httpx.Client(base_url=url) as http:
        assert len(ask(http, *"abcdefg").json()["result"]) == 7
    assert [len(queries) for queries, _ in gate.calls] == [3, 3, 1]


def test_the_same_query_is_searched_once() -> None:
    gate = Gate()
    with running(create_app(gate)) as url, httpx.Client(base_url=url, trust_env=False) as http:
        assert [d[0]["id"] for d in ask(http, "a", "b", "a").json()["result"]] == ["a", "b", "a"]
        assert ask(http, "b").json() == {"result": [[{"id": "b", "contents": "b/1"}]]}
        assert metric(http, "rexrag_cache_hits_total") == 1
        # Another topk is another question.
        assert ask(http, "b", topk=2).json()["result"][0][0]["contents"] == "b/2"
    assert gate.calls == [(["a", "b"], 1), (["b"], 2)]


def test_the_cache_forgets_the_least_used_and_can_be_off() -> None:
    for cache, calls in ((0, 4), (1600, 3)):  # 1600 bytes: two answers of one short passage each
        gate = Gate()
        with (
            running(create_app(gate, limits=Limits(cache_bytes=cache))) as url,
            httpx.Client(base_url=url, trust_env=False) as http,
        ):
            for query in ("a", "b", "b", "c"):
                ask(http, query)
            assert len(gate.calls) == calls
            if cache:
                ask(http, "a")
                assert len(gate.calls) == 4


def test_too_much_at_once_is_told_when_to_come_back_and_the_client_does() -> None:
    gate = Gate(open_=False)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        gate.open.set()
        time.sleep(0.05)

    with (
        running(create_app(gate, limits=Limits(waiting=2))) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=20) as http,
        ThreadPoolExecutor(3) as pool,
    ):
        running_now = pool.submit(ask, http, "first")
        assert gate.begun.wait(20)
        waiting = pool.submit(ask, http, "a", "b")
        wait_for(lambda: metric(http, "rexrag_waiting_queries") == 2)
        refused = ask(http, "c")
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert "too many queries are waiting" in refused.json()["detail"]
        # What is being searched for anyway costs nothing more.
        same = pool.submit(ask, http, "a")
        assert http.get("/health").status_code == 200
        with RemoteRetriever(url, sleep=sleep, retries=20) as client:
            assert client.search(["c"], 1)[0][0].id == "c"
        assert pauses[0] == int(refused.headers["Retry-After"])
        assert [a.result().status_code for a in (running_now, waiting, same)] == [200, 200, 200]


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    with (
        running(create_app(Gate(), limits=Limits(waiting=2))) as url,
        httpx.Client(base_url=url, trust_env=False) as http,
    ):
        assert len(ask(http, *"abcdef").json()["result"]) == 6


def test_a_failed_search_is_not_cached() -> None:
    gate = Gate(fail=True)
    with running(create_app(gate)) as url, httpx.Client(base_url=url, trust_env=False) as http:
        assert ask(http, "a").status_code == 502
        gate.fail = False
        assert ask(http, "a").status_code == 200
        assert 'rexrag_requests_total{status="502"} 1.0' in http.get("/metrics").text


def test_a_client_that_hangs_up_takes_no_answer_from_another() -> None:
    gate = Gate(open_=False)
    with (
        running(create_app(gate)) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=20) as http,
        ThreadPoolExecutor(2) as pool,
    ):
        with httpx.Client(base_url=url, trust_env=False, timeout=0.3) as hasty:
            with pytest.raises(httpx.ReadTimeout):
                ask(hasty, "a")
            other = pool.submit(ask, http, "a")
        gate.open.set()
        assert other.result().json()["result"][0][0]["id"] == "a"
    assert len(gate.calls) == 1


def test_the_load_test_counts_what_failed(retriever: BM25Retriever) -> None:
    path = Path(__file__).parents[3] / "benchmarks" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve_benchmark", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    def outcomes(app: FastAPI, query: str) -> dict[str, int]:
        bodies = itertools.repeat({"queries": [query], "topk": 1})
        with running(app) as url:
            figures = asyncio.run(benchmark.load(url, bodies, clients=3, seconds=0))
        assert figures["errors"] == 3 - figures["outcomes"].get("200", 0), figures
        assert figures["p50_ms"] > 0, figures
        return figures["outcomes"]

    assert outcomes(create_app(retriever), "Thames") == {"200": 3}
    assert outcomes(create_app(retriever), "zyxwv") == {"empty": 3}
    assert outcomes(create_app(Gate(fail=True)), "Thames") == {"502": 3}


SLOW_SERVER = """
import sys, time
from rexrag.retrieval.http import service
from rexrag.retrieval.base import CorpusRetriever
search = CorpusRetriever.search
def slow(self, queries, topk):
    print("searching", flush=True)
    time.sleep(1.0)
    return search(self, queries, topk)
CorpusRetriever.search = slow
service.serve(sys.argv[1], port=0, ready=lambda address, n: print(address, flush=True))
"""


def test_a_service_that_is_terminated_finishes_what_it_has_begun(
    retriever: BM25Retriever, tmp_path: Path
) -> None:
    folder = save_index(retriever, tmp_path / "index")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SERVER, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        answers: list[httpx.Response] = []
        with httpx.Client(base_url=address, trust_env=False, timeout=20) as http:
            request = threading.Thread(target=lambda: answers.append(ask(http, "Thames")))
            request.start()
            assert process.stdout.readline() == "searching\n"
            process.send_signal(signal.SIGTERM)
            request.join(20)
        assert json.loads(answers[0].content)["result"][0][0]["id"] == "d2"
        process.wait(60)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health", trust_env=False)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

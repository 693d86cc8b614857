"""Load on the retrieval service: 64 clients that ask without a pause, for a minute.

    python benchmarks/serve.py --index DIR --questions dev.jsonl [--json OUT.json]
    python benchmarks/serve.py --url http://127.0.0.1:8000 --questions dev.jsonl

Starts `rexrag serve DIR` (or takes a running service), sends real questions one a request (`--queries` for
more), each prefixed by a number so that the cache does not answer (`--cached` leaves them as they are), and
prints requests and queries a second, p50, p95, p99 and errors (an answer without a passage is one). The
clients run on the same machine and take a part of its cores: the table says how much.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import numpy as np

PATIENCE = 60.0
"""Seconds for one answer."""


@contextmanager
def service(index: Path | None, url: str, encoder: str) -> Iterator[str]:
    """The address of a service: the one given, or one that is started and stopped here."""
    if url:
        yield url.rstrip("/")
        return
    command = [sys.executable, "-m", "rexrag", "serve", str(index), "--port", "0"]
    command += ["--encoder", encoder] if encoder else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if "POST " not in line:
            raise SystemExit(f"the service did not start: {line}")
        yield line.split()[1].removesuffix("/retrieve")
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


async def load(url: str, bodies: Iterator[dict[str, Any]], clients: int, seconds: float) -> dict[str, Any]:
    """All clients until the time is over, each at least once; each waits for its answer first."""
    latencies: list[float] = []
    outcomes: Counter[str] = Counter()
    until = time.perf_counter() + seconds

    async def client() -> None:
        asked = False  # each asks at least once, however late it comes to its turn
        while not asked or time.perf_counter() < until:
            asked = True
            try:
                async with Connection(url) as connection:
                    while True:
                        begun = time.perf_counter()
                        outcome = await asyncio.wait_for(connection.ask(next(bodies)), PATIENCE)
                        latencies.append(time.perf_counter() - begun)
                        outcomes[outcome] += 1
                        if time.perf_counter() >= until:
                            return
            except (OSError, EOFError, TimeoutError) as error:
                outcomes[type(error).__name__] += 1

    begun, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    wall = time.perf_counter() - begun
    done = outcomes["200"]
    p50, p95, p99 = (1000 * float(np.quantile(latencies, q)) if latencies else 0.0 for q in (0.5, 0.95, 0.99))
    return {
        "requests_per_second": done / wall,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "errors": sum(outcomes.values()) - done,
        "outcomes": dict(outcomes),
        "seconds": wall,
        "client_cores": (time.process_time() - cpu) / wall,
    }


class Connection:
    """One kept connection to /retrieve. By hand: an HTTP library costs more than the service does."""

    def __init__(self, url: str) -> None:
        self.url = httpx.URL(url)

    async def __aenter__(self) -> Self:
        port = self.url.port or (443 if self.url.scheme == "https" else 80)
        self.reader, self.writer = await asyncio.open_connection(
            self.url.host, port, ssl=self.url.scheme == "https"
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        self.writer.close()

    async def ask(self, body: dict[str, Any]) -> str:
        """The status; "empty" for an answer without a passage. Raises OSError, EOFError."""
        content = json.dumps(body).encode()
        self.writer.write(
            b"POST /retrieve HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % (self.url.netloc, len(content)) + content
        )
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        answer = await self.reader.readexactly(length)
        status = head.split(b" ", 2)[1].decode()
        return "empty" if status == "200" and b'"contents"' not in answer else status


def requests(questions: Path, queries: int, topk: int, cached: bool) -> Iterator[dict[str, Any]]:
    texts = [json.loads(row)["question"] for row in questions.read_text(encoding="utf-8").splitlines()]
    number = itertools.count()
    endless = itertools.cycle(texts)
    while True:
        asked = [next(endless) if cached else f"{next(number)} {next(endless)}" for _ in range(queries)]
        yield {"queries": asked, "topk": topk, "return_scores": True}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", type=Path)
    parser.add_argument("--url", default="")
    parser.add_argument("--encoder", default="")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--queries", type=int, default=1, help="queries in one request")
    parser.add_argument("--topk", type=int, default=3)
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if (args.index is None) == (not args.url):
        parser.error("give --index or --url")
    with service(args.index, args.url, args.encoder) as url:
        bodies = requests(args.questions, args.queries, args.topk, args.cached)
        asyncio.run(load(url, bodies, args.clients, min(5.0, args.seconds)))  # warm up
        figures = asyncio.run(load(url, bodies, args.clients, args.seconds))
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
    figures["queries_per_second"] = figures["requests_per_second"] * args.queries
    sums = {
        row.split()[0]: float(row.split()[1])
        for row in metrics.splitlines()
        if row and not row.startswith("#")
    }
    batches = sums.get("rexrag_batch_queries_count", 0.0)
    figures["queries_per_batch"] = sums.get("rexrag_batch_queries_sum", 0.0) / max(1.0, batches)
    figures |= {"clients": args.clients, "machine": f"{os.cpu_count()} cores, {platform.processor()}"}
    for name, value in figures.items():
        print(f"{name:22} {value:,.2f}" if isinstance(value, float) else f"{name:22} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    sys.exit(1 if figures["errors"] else 0)


if __name__ == "__main__":
    main()

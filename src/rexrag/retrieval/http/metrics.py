"""What a service counts, in Prometheus's text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rexrag.retrieval.batching import Observer

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics(Observer):
    """The metrics of one service, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "rexrag_requests", "Requests to /retrieve by status.", ["status"], registry=registry
        )
        self.request_seconds = Histogram(
            "rexrag_request_seconds", "From request to answer.", buckets=SECONDS, registry=registry
        )
        self.queries = Counter("rexrag_queries", "Queries answered.", registry=registry)
        self.cache_hits = Counter("rexrag_cache_hits", "Queries answered from the cache.", registry=registry)
        self.batch_queries = Histogram(
            "rexrag_batch_queries", "Queries searched together.", buckets=SIZES, registry=registry
        )
        self.search_seconds = Histogram(
            "rexrag_search_seconds", "Search of one batch.", buckets=SECONDS, registry=registry
        )
        self.waiting = Gauge("rexrag_waiting_queries", "Queries that wait for a search.", registry=registry)

    def cached(self, queries: int) -> None:
        self.cache_hits.inc(queries)

    def waits(self, queries: int) -> None:
        self.waiting.set(queries)

    def searched(self, queries: int, seconds: float) -> None:
        self.batch_queries.observe(queries)
        self.search_seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)

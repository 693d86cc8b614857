"""A service whose searches hang: run by test_service.py in a process of its own."""

import sys
import time

from rexrag.retrieval.base import CorpusRetriever
from rexrag.retrieval.http import service


def hang(self, queries, topk):
    print("searching", flush=True)
    time.sleep(60)


CorpusRetriever.search = hang  # type: ignore[method-assign]
service.serve(sys.argv[1], port=0, ready=lambda address, passages: print(address, flush=True))

"""Ways to answer a question with one policy and one retriever: the agent, and what it is compared with.

| name | what | source |
|---|---|---|
| `agent` | the training's episode: think, search, answer | Search-R1, arXiv 2503.09516 |
| `direct` | answer from memory | |
| `cot` | reason, then answer, from memory | Wei et al., arXiv 2201.11903 |
| `rag` | one search with the question, passages in the prompt | Lewis et al., arXiv 2005.11401 |
| `ircot` | a sentence of reasoning, a search with it, in turns | Trivedi et al., arXiv 2212.10509 |
| `search-o1` | the agent; what it finds is first condensed by the same policy | Li et al., arXiv 2501.05366 |
| `reflect` | the agent; at its answer a cue is inserted and it goes on: REX-RAG's probe without training | |

Each takes a batch of questions and returns an attempt for each, in order. An attempt whose engine gave up has
`failure`; it never becomes a wrong answer. Prompts are this project's own wording, without demonstrations.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from rexrag.agent.prompts import render_baseline, render_prompt
from rexrag.agent.protocols.tags import extract_answer, neutralise
from rexrag.agent.reward import normalize_answer
from rexrag.evaluation.attempt import Attempt, Bench, WatchedEpisode
from rexrag.types import Document, Question

Strategy = Callable[[Bench, Sequence[Question]], list[Attempt]]

IRCOT_PASSAGES = 15
"""Passages kept in IRCoT's prompt, the newest; the cap of its paper."""
REASONING_CHARACTERS = 2000
"""Of the reasoning so far that a condensing prompt repeats, the last ones."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")
_THINK = re.compile(r"</?think>")


def agent(bench: Bench, questions: Sequence[Question]) -> list[Attempt]:
    return _one_each(bench, [bench.episode(question) for question in questions])


def direct(bench: Bench, questions: Sequence[Question]) -> list[Attempt]:
    return _one_each(bench, [bench.single(q, render_prompt("direct", q.text)) for q in questions])


def cot(bench: Bench, questions: Sequence[Question]) -> list[Attempt]:
    return _one_each(bench, [bench.single(q, render_baseline("cot", q.text)) for q in questions])


def rag(bench: Bench, questions: Sequence[Question]) -> list[Attempt]:
    start = time.perf_counter()
    found = bench.search([question.text for question in questions])
    episodes = [
        bench.reading("rag", question, documents)
        for question, documents in zip(questions, found, strict=True)
    ]
    attempts = _one_each(bench, episodes, start)
    for attempt, documents in zip(attempts, found, strict=True):
        attempt.searches, attempt.documents = 1, tuple(documents)
    return attempts


def ircot(bench: Bench, questions: Sequence[Question]) -> list[Attempt]:
    """As many searches as the agent has; then, where nothing was answered, one reading of all passages."""
    start = time.perf_counter()
    attempts = [Attempt(question) for question in questions]
    thoughts: list[list[str]] = [[] for _ in questions]
    live = list(range(len(questions)))
    for turn in range(bench.config.agent.search_turns):
        queries = [thoughts[i][-1] if thoughts[i] else questions[i].text for i in live]
        for i, documents in zip(live, bench.search(queries), strict=True):
            attempts[i].searches += 1
            attempts[i].documents = _merged(attempts[i].documents, documents)
        episodes = {i: _thinking(bench, attempts[i], thoughts[i]) for i in live}
        bench.run(episodes.values(), turn)
        for i, episode in episodes.items():
            sentence = _first_sentence(bench.said(episode))
            _count(attempts[i], episode, bench, start)
            attempts[i].answer = extract_answer(sentence)
            thoughts[i].append(neutralise(_THINK.sub(" ", sentence)).strip() or questions[i].text)
        live = [i for i in live if attempts[i].answer is None and not attempts[i].failure]
    last = {i: bench.reading("rag", questions[i], _newest(attempts[i].documents)) for i in live}
    bench.run(last.values(), bench.config.agent.search_turns)
    for i, episode in last.items():
        _count(attempts[i], episode, bench, start)
        attempts[i].answer = episode.answer
    for attempt in attempts:  # a sentence without an action is what was asked for
        attempt.invalid = int(attempt.answer is None)
    return attempts


def search_o1(bench: Bench, questions: Sequence[Question]) -> list[Attempt]:
    """Only the condensed text enters the agent's response; recall is judged on what was found."""
    start = time.perf_counter()
    attempts = [Attempt(question) for question in questions]
    episodes = [bench.episode(question, pauses=True) for question in questions]
    found: list[tuple[Document, ...]] = [()] * len(questions)
    live = list(range(len(questions)))
    turn = 0
    while live:
        bench.run([episodes[i] for i in live], turn)
        live = [i for i in live if episodes[i].paused]
        passages = dict(zip(live, bench.search([episodes[i].query for i in live]), strict=True))
        readers = {i: _condensing(bench, episodes[i], passages[i]) for i in live}
        bench.run(readers.values(), turn + 1)
        for i, reader in readers.items():
            _count(attempts[i], reader, bench, start)
            found[i] = _merged(found[i], passages[i])
            if reader.failure:
                continue
            text = _THINK.sub(" ", bench.said(reader)).strip()
            episodes[i].resume([Document("condensed", f'"{episodes[i].query}"\n{text}')])
        live = [i for i in live if not readers[i].failure]
        turn += 2
    for i, (attempt, episode) in enumerate(zip(attempts, episodes, strict=True)):
        attempt.invalid = 0  # a condensed text is no action
        _count(attempt, episode, bench, start)
        attempt.answer, attempt.documents = episode.answer, found[i]
        attempt.stop = str(episode.stop or "")
    return attempts


def reflect(bench: Bench, questions: Sequence[Question]) -> list[Attempt]:
    """Every answer is doubted once, right or wrong; a reflection that ends without one keeps the first.

    As in training, answers of the forced last turn are not probed. A cue is drawn by the question alone.
    """
    start = time.perf_counter()
    session = bench.policy.session()
    try:
        first = [bench.episode(question) for question in questions]
        bench.run(first, 0, session)
        again: dict[int, WatchedEpisode] = {}
        for i, episode in enumerate(first):
            if episode.answer is not None and len(episode.turns) <= bench.config.agent.search_turns:
                cue = _drawn(bench, questions[i])
                probe = episode.fork(bench.policy.codec.encode(bench.cues[cue]), cue)
                assert isinstance(probe, WatchedEpisode)
                again[i] = probe
        bench.run(again.values(), 1, session)
    finally:
        session.close()
    attempts = []
    for i, episode in enumerate(first):
        attempt = Attempt(questions[i], episode.answer)
        _count(attempt, episode, bench, start)
        if i in again:
            _count(attempt, again[i], bench, start, since=again[i].cut)
            attempt.answer = again[i].answer if again[i].answer is not None else episode.answer
        attempts.append(attempt)
    return attempts


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "agent": agent,
        "direct": direct,
        "cot": cot,
        "rag": rag,
        "ircot": ircot,
        "search-o1": search_o1,
        "reflect": reflect,
    }
)
CLOSED_BOOK = frozenset({"direct", "cot"})
"""These never ask the retriever."""


def voted(strategy: Strategy, votes: int) -> Strategy:
    """Majority vote over `votes` attempts at each question (self-consistency, arXiv 2203.11171).

    Answers are counted as EM normalises them; the first of equals wins; attempts without an answer do not
    vote. Costs add up; the seconds are those of the slowest, since all run side by side.
    """

    def run(bench: Bench, questions: Sequence[Question]) -> list[Attempt]:
        tries = strategy(bench, [question for question in questions for _ in range(votes)])
        return [_majority(tries[i : i + votes]) for i in range(0, len(tries), votes)]

    return run


def _majority(tries: Sequence[Attempt]) -> Attempt:
    said = [(normalize_answer(one.answer), one.answer) for one in tries if one.answer is not None]
    counts = Counter(key for key, _ in said)
    winner = max(counts, key=lambda key: counts[key], default=None)  # the first of equals: counts keep order
    documents: tuple[Document, ...] = ()
    for one in tries:
        documents = _merged(documents, one.documents)
    return Attempt(
        tries[0].question,
        next((answer for key, answer in said if key == winner), None),
        tries[0].stop,
        sum(one.searches for one in tries),
        sum(one.tokens for one in tries),
        sum(one.read for one in tries),
        sum(one.invalid for one in tries),
        documents,
        max(one.seconds for one in tries),
        next((one.failure for one in tries if one.failure), ""),
        [text for one in tries for text in one.trace],
        dict(counts),
        sum(one.encoded_anew for one in tries),
    )


def _one_each(bench: Bench, episodes: Sequence[WatchedEpisode], start: float | None = None) -> list[Attempt]:
    start = time.perf_counter() if start is None else start
    bench.run(episodes)
    attempts = []
    for episode in episodes:
        attempt = Attempt(episode.question, episode.answer)
        _count(attempt, episode, bench, start)
        attempts.append(attempt)
    return attempts


def _count(
    attempt: Attempt, episode: WatchedEpisode, bench: Bench, start: float, since: int | None = None
) -> None:
    attempt.add(episode, bench, since)
    attempt.seconds = max(attempt.seconds, episode.ended - start)


def _thinking(bench: Bench, attempt: Attempt, thoughts: Sequence[str]) -> WatchedEpisode:
    so_far = " ".join(thoughts) or "(nothing yet)"
    return bench.reading("ircot", attempt.question, _newest(attempt.documents), thoughts=so_far)


def _condensing(bench: Bench, episode: WatchedEpisode, documents: Sequence[Document]) -> WatchedEpisode:
    said = bench.said(episode)[-REASONING_CHARACTERS:]
    thoughts = " ".join(neutralise(said).split())
    return bench.reading("refine", episode.question, documents, thoughts=thoughts, query=episode.query)


def _first_sentence(text: str) -> str:
    """The first sentence that says something; an answer that follows at once belongs to it."""
    parts = _SENTENCE_END.split(text.strip())
    first = next((part for part in parts if _THINK.sub("", part).strip()), "")
    # "J. Smith" ends no sentence inside an answer.
    return text.strip() if "<answer>" in first and extract_answer(first) is None else first


def _merged(known: tuple[Document, ...], more: Sequence[Document]) -> tuple[Document, ...]:
    ids = {document.id for document in known}
    return (*known, *(document for document in more if document.id not in ids))


def _newest(documents: Sequence[Document]) -> list[Document]:
    return list(documents)[-IRCOT_PASSAGES:]


def _drawn(bench: Bench, question: Question) -> int:
    digest = hashlib.sha256(f"{bench.cue_seed}/{question.group}/cue".encode()).digest()
    return int.from_bytes(digest[:8], "big") % len(bench.cues)

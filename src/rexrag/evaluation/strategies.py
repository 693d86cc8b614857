"""Strategies to answer a question with one policy and one retriever: the agent and its baselines.

| name | what | source |
|---|---|---|
| `agent` | the training's episode: think, search, answer | Search-R1, arXiv 2503.09516 |
| `direct` | answer from memory | |
| `cot` | reason, then answer, from memory | Wei et al., arXiv 2201.11903 |
| `rag` | one search with the question, passages in the prompt | Lewis et al., arXiv 2005.11401 |
| `ircot` | a sentence of reasoning, a search with it, in turns | Trivedi et al., arXiv 2212.10509 |
| `search-o1` | the agent; what it finds is first condensed by the same policy | Li et al., arXiv 2501.05366 |
| `reflect` | the agent; at its answer a cue is inserted and it goes on: REX-RAG's probe without training | |

A strategy is a generator for one question: it yields an episode to have it run, or a query to be sent its
documents, and returns the attempt. `side_by_side` runs many of them together. Where the engine gave up, the
attempt has a `failure`; it never becomes a wrong answer. Prompts are this project's own wording, without
demonstrations.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType

from rexrag.agent.prompts import render_baseline, render_prompt
from rexrag.agent.protocols.tags import extract_answer, neutralise
from rexrag.agent.reward import normalize_answer
from rexrag.evaluation.attempt import Attempt, RecordedEpisode, with_new
from rexrag.evaluation.context import StrategyContext
from rexrag.types import Document, Question

Documents = Sequence[Document]
Steps = Generator[RecordedEpisode | str, Documents, Attempt]
Strategy = Callable[[StrategyContext, Question], Steps]

IRCOT_PASSAGES = 15
"""Passages kept in IRCoT's prompt, the newest; the cap of its paper."""
REASONING_CHARACTERS = 2000
"""Of the reasoning so far that a condensing prompt repeats, the last ones."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s|\n")
_THINK = re.compile(r"</?think>")


def agent(context: StrategyContext, question: Question) -> Steps:
    return (yield from _one_episode(context.episode(question)))


def direct(context: StrategyContext, question: Question) -> Steps:
    message = render_prompt("direct", question.text)
    return (yield from _one_episode(context.one_turn(question, message)))


def cot(context: StrategyContext, question: Question) -> Steps:
    message = render_baseline("cot", question.text)
    return (yield from _one_episode(context.one_turn(question, message)))


def rag(context: StrategyContext, question: Question) -> Steps:
    documents = yield question.text
    attempt = yield from _one_episode(context.with_passages("rag", question, documents))
    attempt.searches, attempt.documents = 1, tuple(documents)
    return attempt


def ircot(context: StrategyContext, question: Question) -> Steps:
    """As many searches as the agent has; then, where nothing was answered, one reading of all passages."""
    attempt, thoughts = Attempt(question), list[str]()
    for _ in range(context.config.agent.search_turns):
        documents = yield thoughts[-1] if thoughts else question.text
        attempt.searches += 1
        attempt.documents = with_new(attempt.documents, documents)
        so_far = " ".join(thoughts) or "(nothing yet)"
        passages = attempt.documents[-IRCOT_PASSAGES:]
        episode = context.with_passages("ircot", question, passages, thoughts=so_far)
        yield episode
        attempt.add(episode)
        sentence = _first_sentence(context.response(episode))
        attempt.answer = extract_answer(sentence)
        thoughts.append(neutralise(_THINK.sub(" ", sentence)).strip() or question.text)
        if attempt.failure or attempt.answer is not None:
            break
    else:
        last = context.with_passages("rag", question, attempt.documents[-IRCOT_PASSAGES:])
        yield last
        attempt.add(last)
        attempt.answer = last.answer
    attempt.invalid = int(attempt.answer is None)  # a sentence without an action is what was asked for
    return attempt


def search_o1(context: StrategyContext, question: Question) -> Steps:
    """Only the condensed text enters the agent's response; recall is judged on what was found."""
    attempt, found = Attempt(question), tuple[Document, ...]()
    episode = context.episode(question, pauses=True)
    yield episode
    while episode.paused:
        documents = yield episode.query
        found = with_new(found, documents)
        thoughts = " ".join(neutralise(context.response(episode)[-REASONING_CHARACTERS:]).split())
        condenser = context.with_passages(
            "refine", question, documents, thoughts=thoughts, query=episode.query
        )
        yield condenser
        attempt.add(condenser)
        if condenser.failure:
            break
        text = _THINK.sub(" ", context.response(condenser)).strip()
        episode.resume([Document("condensed", f'"{episode.query}"\n{text}')])
        yield episode
    attempt.invalid = 0  # a condensed text is no action
    attempt.add(episode)
    attempt.answer, attempt.documents = episode.answer, found
    return attempt


def reflect(context: StrategyContext, question: Question) -> Steps:
    """Every answer is doubted once, right or wrong; a reflection that ends without one keeps the first.

    As in training, answers of the forced last turn are not probed. A cue is drawn by the question alone.
    """
    first = context.episode(question)
    yield first
    attempt = Attempt(question, first.answer)
    attempt.add(first)
    if first.answer is None or len(first.turns) > context.config.agent.search_turns:
        return attempt
    cue = _drawn(context, question)
    probe = first.fork(context.policy.codec.encode(context.cues[cue]), cue)
    assert isinstance(probe, RecordedEpisode)
    yield probe
    attempt.add(probe, since=probe.cut)
    attempt.answer = probe.answer if probe.answer is not None else first.answer
    return attempt


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
FORKS = frozenset({"reflect"})
"""These continue an episode from its own cache, so all their episodes share a session."""


def majority(tries: Sequence[Attempt]) -> Attempt:
    """Majority vote over attempts at one question (self-consistency, arXiv 2203.11171).

    Answers are counted as EM normalises them; the first of equals wins; attempts without an answer do not
    vote. Costs add up; the seconds are those of the slowest, since all run side by side.
    """
    said = [(normalize_answer(one.answer), one.answer) for one in tries if one.answer is not None]
    counts = Counter(key for key, _ in said)
    winner = max(counts, key=lambda key: counts[key], default=None)  # the first of equals: counts keep order
    documents: tuple[Document, ...] = ()
    for one in tries:
        documents = with_new(documents, one.documents)
    return Attempt(
        question=tries[0].question,
        answer=next((answer for key, answer in said if key == winner), None),
        stop=tries[0].stop,
        searches=sum(one.searches for one in tries),
        tokens=sum(one.tokens for one in tries),
        read=sum(one.read for one in tries),
        invalid=sum(one.invalid for one in tries),
        documents=documents,
        seconds=max(one.seconds for one in tries),
        failure=next((one.failure for one in tries if one.failure), ""),
        trace=[text for one in tries for text in one.trace],
        votes=dict(counts),
        encoded_anew=sum(one.encoded_anew for one in tries),
    )


def _one_episode(episode: RecordedEpisode) -> Steps:
    yield episode
    attempt = Attempt(episode.question, episode.answer)
    attempt.add(episode)
    return attempt


def _first_sentence(text: str) -> str:
    """The first sentence that says something; an answer that follows at once belongs to it."""
    parts = _SENTENCE_END.split(text.strip())
    first = next((part for part in parts if _THINK.sub("", part).strip()), "")
    # "J. Smith" ends no sentence inside an answer.
    return text.strip() if "<answer>" in first and extract_answer(first) is None else first


def _drawn(context: StrategyContext, question: Question) -> int:
    digest = hashlib.sha256(f"{context.seed}/{question.group}/cue".encode()).digest()
    return int.from_bytes(digest[:8], "big") % len(context.cues)

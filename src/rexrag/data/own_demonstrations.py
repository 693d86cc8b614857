"""A user's own demonstrations: rows of a JSON-lines file become what an episode would have produced.

Two kinds of row are known, told apart by their fields:

    trace      {"question", "trace"}: text with <think>, <search>, <information> and <answer> tags
    messages   {"messages": […], "question"?}: a conversation in OpenAI's shape, with tool calls and results;
               a system message is left out, since the instruction template takes its place

A row is first cut into steps (what the policy writes, and the documents that its search brought). The steps
are then played through a real `Episode`, which writes prompt, tags and evidence; so a demonstration cannot
differ from a rollout. Only what the policy writes is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rexrag.agent.episode import Codec, Episode, State
from rexrag.config.schema import AgentConfig
from rexrag.data.conversations import from_messages
from rexrag.data.demonstrations import Demonstration
from rexrag.data.traces import Step, trace_steps
from rexrag.errors import DataError
from rexrag.io import FieldError, brief, read_lines, text_field
from rexrag.types import Origin, Question, StopReason


@dataclass(frozen=True, slots=True)
class OwnDemonstrations:
    """A file's rows, converted."""

    rows: list[Demonstration]
    refused: list[str]
    """One line for each row that could not be converted: file, row, field, what was expected."""


def read_demonstrations(path: str | Path, codec: Codec, agent: AgentConfig, topk: int) -> OwnDemonstrations:
    """Convert every row of a file under the settings of an episode.

    Raises DataError where the file cannot be read or holds no row that can be converted; ConfigError where
    `agent` allows no episode.
    """
    rows: list[Demonstration] = []
    refused: list[str] = []
    for number, line in read_lines(path):
        try:
            rows.append(_converted(number, line, codec, agent, topk))
        except FieldError as error:
            refused.append(str(DataError(str(error), file=path, row=number, field=error.field or None)))
    if not rows:
        more = f" (and {len(refused) - 1:,} more rows)" if len(refused) > 1 else ""
        nothing = str(DataError("no rows; expected rows with question and trace, or messages", file=path))
        raise DataError(refused[0] + more if refused else nothing)
    return OwnDemonstrations(rows, refused)


def _converted(number: int, line: str, codec: Codec, agent: AgentConfig, topk: int) -> Demonstration:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FieldError("", f"expected a JSON object: {error}") from None
    if not isinstance(row, dict):
        raise FieldError("", f"expected a JSON object, got {brief(row)}")
    if row.get("messages") is not None:
        text, steps = from_messages(row)
        field = "messages"
    elif row.get("trace") is not None:
        text, steps = text_field(row, "question"), trace_steps(text_field(row, "trace"))
        field = "trace"
    else:
        raise FieldError("trace", "missing; expected `question` and `trace`, or `messages`")
    return play(Question(str(number), text, ()), steps, codec, agent, topk, field)


def play(
    question: Question,
    steps: Sequence[Step],
    codec: Codec,
    agent: AgentConfig,
    topk: int,
    field: str = "trace",
) -> Demonstration:
    """The response of an episode in which the policy writes these steps.

    Weight 1 on what the policy writes, 0 on evidence. Raises FieldError (of `field`) where an episode under
    `agent` would not have gone this way: too many searches, a turn or a response that is too long.
    """
    searches = len(steps) - 1
    if searches > agent.search_turns:
        raise FieldError(
            field, f"{searches} searches; expected agent.search_turns = {agent.search_turns} at most"
        )
    try:
        episode = Episode(question, codec, agent, topk)
    except DataError:
        raise FieldError("question", _too_long(agent)) from None
    for number, step in enumerate(steps, 1):
        tokens = codec.encode(step.text)
        if len(tokens) > agent.turn_tokens:
            limit = f"expected agent.turn_tokens = {agent.turn_tokens} at most"
            raise FieldError(field, f"turn {number} has {len(tokens)} tokens; {limit}")
        left = tokens[_feed(episode, tokens) :]
        if episode.stop is StopReason.LENGTH:
            raise FieldError(field, _too_long(agent))
        wanted = "answer" if step.documents is None else "search"
        taken = [turn.action for turn in episode.turns[number - 1 :]]
        if taken != [wanted] or codec.decode(left).strip():
            raise FieldError(field, f"turn {number}: the policy's tokenizer does not keep its {wanted} tags")
        if step.documents is not None:
            episode.found(step.documents)
    weights = [float(origin == Origin.POLICY) for origin in episode.origins]
    return Demonstration(episode.prompt, tuple(episode.tokens), tuple(episode.origins), tuple(weights))


def _feed(episode: Episode, tokens: Sequence[int]) -> int:
    """Hand over pending evidence, then tokens as if they were sampled; returns how many the turn took."""
    if episode.state is State.FORCED:
        episode.take_forced([0.0] * len(episode.forced))
    for count, token in enumerate(tokens):
        if episode.state is not State.SAMPLE:
            return count
        episode.sampled(token, 0.0)
    return len(tokens)


def _too_long(agent: AgentConfig) -> str:
    return (
        f"prompt and response are too long; expected agent.total_tokens = {agent.total_tokens} tokens at most"
    )

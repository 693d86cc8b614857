"""Conversations in OpenAI's shape, with tool calls and results, cut into steps of the tag protocol."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rexrag.agent.protocols.tags import actions, neutralise
from rexrag.data.question_rows import bare_question
from rexrag.data.traces import Step, documents_of
from rexrag.io import FieldError, brief, check_text

ROLES = ("system", "developer", "user", "assistant", "tool")
QUERY_ARGUMENTS = ("query", "q", "queries")
"""Names of a tool call's argument that holds the query; `queries` is a list of one."""
_THINK = re.compile(r"\s*<think>(.*)</think>\s*", re.DOTALL)


def from_messages(row: Mapping[str, Any]) -> tuple[str, list[Step]]:
    """(question, steps) of a conversation. Raises FieldError naming the message.

    The question is the row's own, or the user's message (what follows its last "Question:"). An assistant
    message with tool calls is a thought and a search for each call; each is answered by a tool message. The
    last assistant message is the answer.
    """
    messages = _checked(row["messages"])
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if len(asked) != 1:
        raise FieldError("messages", f"expected one user message, got {len(asked)}")
    question = row.get("question")
    if question is None:
        question = bare_question(_content(messages[asked[0]], asked[0]))
    text = check_text(question, "question")
    steps: list[Step] = []
    place = 0
    while place < len(messages):
        message = messages[place]
        calls = message.get("tool_calls") if message["role"] == "assistant" else None
        if steps and steps[-1].documents is None:
            raise FieldError(f"messages.{place}", "expected nothing after the answer")
        if message["role"] == "tool":
            raise FieldError(f"messages.{place}", "expected a tool call before this tool message")
        if calls:
            made = _searches(messages, place)
            steps += made
            place += len(made)
        elif message["role"] == "assistant":
            steps.append(Step(_answer(message, place)))
        place += 1
    if not steps or steps[-1].documents is not None:
        raise FieldError("messages", "expected an assistant message with the answer at the end")
    return text, steps


def _checked(messages: object) -> list[Mapping[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise FieldError("messages", f"expected a list of messages, got {brief(messages)}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise FieldError(f"messages.{i}", f"expected a role of {', '.join(ROLES)}, got {brief(message)}")
    return messages


def _searches(messages: Sequence[Mapping[str, Any]], place: int) -> list[Step]:
    """One step for each tool call of a message; its thought stands in the first."""
    name = f"messages.{place}.tool_calls"
    calls = messages[place]["tool_calls"]
    if not isinstance(calls, list):
        raise FieldError(name, f"expected a list, got {brief(calls)}")
    queries = [_query(call, f"{name}.{i}") for i, call in enumerate(calls)]
    results = list(enumerate(messages))[place + 1 : place + 1 + len(calls)]
    if len(results) < len(calls) or any(result["role"] != "tool" for _, result in results):
        raise FieldError(name, f"expected {len(calls)} tool messages after it, one result a call")
    by_id = {str(result.get("tool_call_id")): (where, result) for where, result in results}
    if len(by_id) == len(calls) and all(str(call.get("id")) in by_id for call in calls):
        results = [by_id[str(call.get("id"))] for call in calls]  # else they are in the order of the calls
    thoughts = [_thought(messages[place], place), *[""] * len(calls)]
    return [
        Step(f"{thought}<search> {query} </search>", documents_of(_content(result, where)))
        for thought, query, (where, result) in zip(thoughts, queries, results, strict=False)
    ]


def _query(call: object, name: str) -> str:
    """The query of a tool call. Raises FieldError where it is no search."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    given = arguments if isinstance(arguments, Mapping) else {}
    query = next((given[key] for key in QUERY_ARGUMENTS if key in given), None)
    if isinstance(query, list) and len(query) == 1:
        query = query[0]
    if query is None:
        raise FieldError(name, f"expected a search with an argument `query`, got {brief(arguments)}")
    return _tagless(check_text(query, f"{name}.query").strip(), f"{name}.query")


def _thought(message: Mapping[str, Any], place: int) -> str:
    """`<think> … </think>` and a line end, of a message's reasoning and content; empty where both are."""
    parts = [message.get("reasoning_content") or "", _content(message, place)]
    said = " ".join(_unwrapped(str(part)).strip() for part in parts).strip()
    return f"<think> {_tagless(said, f'messages.{place}.content')} </think>\n" if said else ""


def _answer(message: Mapping[str, Any], place: int) -> str:
    """The last turn: as it is where it is written in tags, else a thought and the content as the answer."""
    content, name = _content(message, place).strip(), f"messages.{place}.content"
    found = actions(content)
    if found:
        if [action.kind for action in found] != ["answer"]:
            raise FieldError(name, "expected one answer and no other action")
        return content[: found[0].end]
    said, closed, answer = content.rpartition("</think>")
    thought = _thought({**message, "content": said + closed}, place)
    return f"{thought}<answer> {_tagless(check_text(answer.strip(), name), name)} </answer>"


def _content(message: Mapping[str, Any], place: int) -> str:
    """The text of a message; OpenAI's list of parts is joined. Raises FieldError."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else content
    if content is not None and not isinstance(content, str):
        raise FieldError(f"messages.{place}.content", f"expected a text, got {brief(content)}")
    return check_text(content, f"messages.{place}.content") if content and content.strip() else ""


def _unwrapped(text: str) -> str:
    found = _THINK.fullmatch(text)
    return found[1] if found else text


def _tagless(text: str, name: str) -> str:
    if neutralise(text) != text:
        raise FieldError(name, "expected a text without protocol tags, since they are added here")
    return text

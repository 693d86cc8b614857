"""The tag grammar of an agent and its environment (METHOD §1; compatible with Search-R1, arXiv 2503.09516).

    <think> … </think>                 free thought, never parsed
    <search> query </search>           an action: look this up
    <answer> short answer </answer>    an action: the end of the rollout
    <information> … </information>     evidence, written by the environment only

Reading rules, the same for one turn and for a whole recorded response:

* An action is complete when its closing tag arrives; the first closing tag that has an opening tag wins.
* It opens at the *nearest* opening tag of its kind, so an argument never holds a second opening of itself.
* An action ends its turn: an opening tag before it cannot be closed after it.
* Nothing between `<information>` and `</information>` is an action, and neither is a notice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rexrag.agent.protocols.base import Action, TokenCodec
from rexrag.errors import ConfigError
from rexrag.types import Document

NOTICE = (
    "\n\nThat was not a valid action. To look something up, write the query inside search tags. "
    "To finish, write the answer inside answer tags. Try again.\n\n"
)
"""What the environment says after a turn without an action. It names the tags without spelling them."""

EVIDENCE_OPEN = "\n\n<information>"
EVIDENCE_CLOSE = "</information>\n\n"

_TAG = re.compile(r"<(/?)(search|answer)>")
_LETTER = {
    "<think>": "T", "</think>": "t", "<search>": "S", "</search>": "s", "<answer>": "A", "</answer>": "a",
}  # fmt: skip
_WELL_FORMED = re.compile(r"(?:(?:Tt)+SsE)*(?:Tt)+Aa")
_THOUGHT_OPENED = re.compile(r"<think>\s*\Z")
_INFORMATION = re.compile(r"<(/?)information>")
# Written so that a long run of spaces is read once: documents may be hostile.
_ANY_TAG = re.compile(r"<(\s*(?:/\s*)?(?:think|search|information|answer)\s*(?:/\s*)?)>", re.IGNORECASE)
# Any case and spacing: a word-level tokenizer changes both.
_OWN_NOTICE = re.compile(r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", NOTICE))), re.IGNORECASE)
# Search-R1's own notice spells the tags out. It is matched so that its traces can be read.
_FOREIGN_NOTICE = re.compile(
    r"My previous action is invalid\. If I want to search, .{0,80}?<search> and </search>\. "
    r".{0,120}?<answer> and </answer>\.",
    re.DOTALL,
)
LONGEST_TOKEN = 64
"""Characters that a token holds on average, at most: a longer text is cut or refused before it is encoded."""


def parse_action(text: str) -> Action | None:
    """The first complete action of a turn of the policy, or None. Spans are positions in `text`."""
    return next(iter(actions(text)), None)


def actions(response: str) -> list[Action]:
    """The policy's actions in a whole recorded response, in order; spans are positions in `response`.

    Evidence and notices are skipped: they are the environment's words, and each begins a new turn.
    """
    return [action for start, end in policy_spans(response) for action in _scan(response, start, end)]


def extract_answer(response: str) -> str | None:
    """The last complete answer the policy gave in a whole response, stripped; None where it gave none.

    Text between `<information>` and `</information>` never counts.
    """
    answers = [action.argument for action in actions(response) if action.kind == "answer"]
    return answers[-1] if answers else None


def stray_action_tags(response: str) -> int:
    """How many search and answer tags of the policy, in any spelling, belong to no complete action."""
    spans = policy_spans(response)
    tags = (tag for start, end in spans for tag in _ANY_TAG.finditer(response, start, end))
    count = sum(tag[1].strip(" /\t\n\r").lower() in ("search", "answer") for tag in tags)
    return count - 2 * sum(1 for start, end in spans for _ in _scan(response, start, end))


def count_notices(response: str) -> int:
    """How many turns the environment called invalid."""
    return sum(1 for _ in _notice_spans(response))


def opens_thought(prompt: str) -> bool:
    """Does the prompt end with `<think>`, as some chat templates do? Then the response closes it only."""
    return _THOUGHT_OPENED.search(prompt) is not None


def well_formed(response: str, opened: bool = False) -> bool:
    """Does a response keep to the instruction's form, tag by tag?

    Every turn closes at least one thought, then takes one action; a search is followed by evidence; the last
    action, and only that, is an answer. Free text between the tags is not looked at. `opened`: the prompt
    opened the first thought.
    """
    pieces, position = ["T"] if opened else [], 0
    for start, end in [*_evidence_spans(response), (len(response), len(response))]:
        pieces += [_LETTER.get(tag[0], "?") for tag in _ANY_TAG.finditer(response, position, start)]
        pieces += ["E"] if end > start else []
        position = end
    return _WELL_FORMED.fullmatch("".join(pieces)) is not None and not count_notices(response)


def policy_spans(response: str) -> list[tuple[int, int]]:
    """Character spans of a response outside evidence and notices."""
    spans, position = [], 0
    for start, end in sorted([*_evidence_spans(response), *_notice_spans(response)]):
        spans.append((position, max(position, start)))
        position = max(position, end)
    return [*spans, (position, len(response))]


def neutralise(text: str) -> str:
    """Protocol tags, in any case and with inner spaces, in square brackets: readable, but no longer tags."""
    return _ANY_TAG.sub(r"[\1]", text)


def format_documents(documents: Sequence[Document]) -> str:
    """`Doc i(Title: first line) rest`, one line each, tags neutralised."""
    lines = []
    for number, document in enumerate(documents, start=1):
        title, _, rest = document.contents.partition("\n")
        lines.append(f"Doc {number}(Title: {title.strip()}) {rest.strip()}")
    return neutralise("\n".join(lines))


def render_evidence(documents: Sequence[Document], codec: TokenCodec, max_tokens: int) -> list[int]:
    """Token ids of `\\n\\n<information>…</information>\\n\\n`, at most `max_tokens`, always closed.

    Only the inside is cut. The result decodes to exactly one opening and one closing tag, whatever the
    documents say. Raises ConfigError where the frame alone does not fit.
    """
    opening, closing = codec.encode(EVIDENCE_OPEN), codec.encode(EVIDENCE_CLOSE)
    room = max_tokens - len(opening) - len(closing)
    if room < 0:
        raise ConfigError(
            f"agent.evidence_tokens = {max_tokens}: the <information> frame alone takes "
            f"{len(opening) + len(closing)} tokens"
        )
    return [*opening, *_tagless_tokens(format_documents(documents), codec, room), *closing]


def _tagless_tokens(text: str, codec: TokenCodec, room: int) -> list[int]:
    """At most `room` tokens of a text that holds no tag, and whose tokens do not decode to one either."""
    text = text[: room * LONGEST_TOKEN]
    ids = codec.encode(text)[:room]
    if _ANY_TAG.search(codec.decode(ids)):
        # The tokenizer normalised look-alikes (full-width brackets, hidden characters) into a real tag.
        ids = codec.encode("".join(c if c.isalnum() else " " for c in text))[:room]
    return ids


def _scan(text: str, start: int, end: int) -> Iterator[Action]:
    """Complete actions of text[start:end], in order of their closing tags."""
    opened: dict[str, re.Match[str]] = {}
    for tag in _TAG.finditer(text, start, end):
        closing, kind = tag.groups()
        if not closing:
            opened[kind] = tag
        elif kind in opened:
            first = opened[kind]
            argument = text[first.end() : tag.start()].strip()
            yield Action("search" if kind == "search" else "answer", argument, first.start(), tag.end())
            opened.clear()


def _evidence_spans(text: str) -> Iterator[tuple[int, int]]:
    """Complete evidence blocks, each from the nearest opening tag before its closing tag."""
    opened: int | None = None
    for tag in _INFORMATION.finditer(text):
        if not tag.group(1):
            opened = tag.start()
        elif opened is not None:
            yield opened, tag.end()
            opened = None


def _notice_spans(text: str) -> Iterator[tuple[int, int]]:
    if "valid" not in text:  # a cheap look first: this runs for every action of every rollout
        return
    for pattern in (_OWN_NOTICE, _FOREIGN_NOTICE):
        for match in pattern.finditer(text):
            yield match.span()


class Tags:
    """The protocol `tags`, as an episode uses it."""

    notice: str = NOTICE
    stop_strings: tuple[str, ...] = ("</search>", "</answer>")

    def parse_action(self, text: str) -> Action | None:
        return parse_action(text)

    def render_evidence(self, documents: Sequence[Document], codec: TokenCodec, max_tokens: int) -> list[int]:
        return render_evidence(documents, codec, max_tokens)

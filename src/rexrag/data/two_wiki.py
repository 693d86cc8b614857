"""Demonstrations by rule for questions of 2WikiMultihopQA, over a corpus of one passage an entity.

The rule knows how these questions are worded and what the gold answer is; for other questions it finds next
to nothing. It looks for a chain of searches of one of two kinds:

    bridge       search the entity that the question names, quote the sentence that names the next entity,
                 search that one, quote the sentence with the answer
    comparison   search both entities (and their director, where the question asks about directors), quote a
                 date or a nationality of each, compare

A chain is kept only where a search really brings each passage and the rule arrives at the gold answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rexrag.data.demonstrations import Demonstration, Draft, Piece, Search, Setting, think, write
from rexrag.types import Document, Question

_ROLES = (
    "director|performer|composer|producer|editor|creator|founder|author|writer|spouse|husband|wife|father|mother|"
    "stepfather|stepmother|sibling-in-law|father-in-law|mother-in-law|brother-in-law|sister-in-law|grandfather|"
    "grandmother|uncle|aunt|sibling|child|son|daughter"
)
# Longest first: "father-in-law" is not "father".
_ROLE = rf"(?:(?:paternal|maternal) )?(?:{'|'.join(sorted(_ROLES.split('|'), key=len, reverse=True))})"
_MEDIUM = r"(?:film|movie|song|magazine|album|book|series|work|tv series)s?"
_AFTER = (
    r"from|born|die|study|work|earned|educated|graduate|buried|detained|died|received|won|is|was|have|has"
)
_NAMED = [  # wordings that name one entity; `before` may hold further roles
    re.compile(rf"^(?P<before>.*)\b(?P<role>{_ROLE}) of (?:the )?(?:{_MEDIUM} )?"
               rf"(?P<name>[^?]+?)(?: (?:{_AFTER})\b[^?]*)?\s*\?"),
    re.compile(rf"^(?P<before>.*?\b(?:is|was|did|of|does|country|for|were|if) )"
               rf"(?P<name>[A-Z0-9(ÀÁÉÍÓÚÖØŚŠŽŞ][^?]*?)['’]s (?P<role>{_ROLE})\b"),
]  # fmt: skip
_THINGS = (
    r"(?:(?:movies?|films?|songs?|businesses|airports|schools|villages|mountains|rivers|lakes|bands),? )"
)
_OF_FILM = rf"(?:(?:the )?(?:both )?directors? of (?:both )?{_THINGS})"
_PAIRS = [  # wordings that name two entities
    re.compile(r", (?P<a>.+?) or (?P<b>[^,]+?)\s*\?+ *$"),
    re.compile(r"(?:^Was|out of) (?P<a>[^?]+?) (?:or|and) (?P<b>[^,?]+?)(?: born| died| released|\s*\?)"),
    re.compile(rf"^(?:Are|Do|Does|Is|Were|Did) (?:(?:the|both) )*{_OF_FILM}?{_THINGS}?(?P<a>[^?]+?)"
               rf" (?:and|have the same nationality as) {_OF_FILM}?(?P<b>[^?]+?)"
               rf"(?:,? (?:both|located|share|from|have the|of the)\b[^?]*)?\s*\?"),
]  # fmt: skip
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_DATE = re.compile(
    rf"\b(?:(?P<day>\d{{1,2}}) (?P<month>{_MONTHS}),? )?(?:(?P<month2>{_MONTHS}) (?P<day2>\d{{1,2}}), )?"
    r"(?P<year>1[0-9]{3}|20[0-2][0-9])\b"
)
_NATIONS = (
    "American|Australian|Argentine|Austrian|Belgian|Brazilian|British|Bulgarian|Canadian|Chilean|Chinese|Croatian|"
    "Cuban|Czech|Danish|Dutch|Egyptian|English|Estonian|Finnish|French|German|Greek|Hungarian|Icelandic|Indian|"
    "Indonesian|Iranian|Irish|Israeli|Italian|Japanese|Korean|Malaysian|Mexican|Nigerian|Norwegian|Pakistani|"
    "Philippine|Polish|Portuguese|Romanian|Russian|Scottish|Serbian|Slovak|Slovenian|Soviet|Spanish|Swedish|"
    "Swiss|Thai|Turkish|Ukrainian|Welsh"
)
_NATION = re.compile(rf"\b(?:is|was|were|are) (?:a|an|the)\b[^.]*?\b(?P<nation>{_NATIONS})\b")
_SENTENCE = re.compile(r"(?<=[a-z0-9)\"'][.!?]) +(?=[\"'A-Z(])")
_WORD = r"[A-ZÀ-ÖØ-ÞŁŚŠŽŞȘ][\w'’.\-]*"
_NAME = re.compile(
    rf"{_WORD}(?:,? (?:(?:of|the|de|d|von|van|der|den|la|le|du|di|da|al|bin|ibn|and) )*{_WORD}"
    rf"|,? \d+th {_WORD})*"
)
_COMPARES = {  # words of the question -> (attribute, is the earlier entity the answer)
    "born first": ("born", True), "born earlier": ("born", True), "older": ("born", True),
    "born later": ("born", False), "younger": ("born", False),
    "died first": ("died", True), "died earlier": ("died", True), "died later": ("died", False),
    "out first": ("released", True), "out earlier": ("released", True), "released first": ("released", True),
    "released earlier": ("released", True), "released more recently": ("released", False),
    "out later": ("released", False), "released later": ("released", False),
    "established first": ("released", True),
}  # fmt: skip


QUOTE_WORDS = 24
"""Longest quote, since a turn has to hold it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One search of a chain: the reason, the query, and the words that are quoted from its result."""

    why: str
    query: str
    quote: str


@dataclass(frozen=True, slots=True)
class Chain:
    """The searches that lead to `answer`, and the conclusion drawn from them."""

    steps: tuple[Step, ...]
    conclusion: str
    answer: str


def question_demonstrations(
    questions: Iterable[Question],
    retriever: Search,
    setting: Setting,
    recovery: float = 0.0,
    doubts: Sequence[str] = (),
    seed: int = 0,
) -> tuple[list[Demonstration], float]:
    """Demonstrations of the questions whose chain the rule finds, and the share of such questions.

    A chain must fit an episode: the number of its searches, the length of its turns, and each quote must
    stand in the evidence as it is shown, which may be cut. A share `recovery` of the chains is demonstrated
    a second time, as a recovery with one of `doubts`.
    """
    rng = random.Random(f"recovery/{seed}")
    asked, found, drafts = 0, 0, []
    for question in questions:
        asked += 1
        chain = find_chain(question, retriever, setting.topk)
        if chain is None or not _fits(chain, retriever, setting):
            continue
        straight = chain_draft(question, chain)
        if not _turns_fit(straight, setting):
            continue
        found += 1
        drafts.append(straight)
        if doubts and rng.random() < recovery:
            recovered = recovery_draft(question, chain, rng.choice(doubts), rng)
            drafts += [recovered] if _turns_fit(recovered, setting) else []
    return write(drafts, setting, retriever), found / asked if asked else 0.0


def _turns_fit(draft: Draft, setting: Setting) -> bool:
    turn = 0
    for piece in draft[1]:
        turn += len(setting.codec.encode(piece.text))
        if turn > setting.turn_tokens:
            return False
        turn = turn if piece.query is None else 0
    return True


def _fits(chain: Chain, retriever: Search, setting: Setting) -> bool:
    if len(chain.steps) > setting.search_turns:
        return False
    found = retriever.search([step.query for step in chain.steps], setting.topk)
    shown = (setting.codec.decode(setting.render(documents)) for documents in found)
    return all(" ".join(step.quote.split()) in " ".join(text.split())
               for step, text in zip(chain.steps, shown, strict=True))  # fmt: skip


def chain_draft(question: Question, chain: Chain) -> Draft:
    """The chain as an agent writes it: a reason, a search, a quote and the next reason, …, an answer."""
    pieces: list[Piece] = [think(f"<think> {chain.steps[0].why} </think>\n")]
    for i, step in enumerate(chain.steps):
        pieces.append(Piece(f"<search> {step.query} </search>", query=step.query))
        onward = chain.steps[i + 1].why if i + 1 < len(chain.steps) else chain.conclusion
        pieces.append(think(f'<think> The passage says: "{step.quote}" {onward} </think>\n'))
    return question.text, [*pieces, Piece(f"<answer> {chain.answer} </answer>")]


EARLY = 0.75
"""Share of recoveries whose first conclusion came too early; the others doubt a right conclusion."""
SECOND_THOUGHT = 0.1
"""Weight of the tag that opens a doubt: how likely a policy becomes to doubt by itself."""


def recovery_draft(question: Question, chain: Chain, doubt: str, rng: random.Random) -> Draft:
    """A conclusion, a doubt, and the rest of the chain. What comes before the doubt is not trained on.

    A conclusion that came too early takes the name of the next entity for the answer, and the search for it
    follows the doubt. A conclusion that was right is repeated after the doubt.
    """
    early = len(chain.steps) > 1 and rng.random() < EARLY
    known = rng.randrange(1, len(chain.steps)) if early else len(chain.steps)
    straight = chain_draft(question, chain)[1]
    read, quote = straight[: 2 * known], chain.steps[known - 1].quote
    concluded = f"So the answer is {chain.steps[known].query}." if early else chain.conclusion
    before = [*read, think(f'<think> The passage says: "{quote}" {concluded} </think>\n')]
    doubting = [Piece("<think>", SECOND_THOUGHT), think(f" {doubt}")]
    onward = chain.steps[known].why if early else f'It does say: "{quote}" {chain.conclusion}'
    after = [think(f" {onward} </think>\n"), *straight[2 * known + 1 :]]
    return question.text, [*(replace(piece, weight=0.0) for piece in before), *doubting, *after]


def find_chain(question: Question, retriever: Search, topk: int) -> Chain | None:
    """A chain of searches that ends in a gold answer; None where the rule finds none."""
    look = Lookup(retriever, topk)
    return _comparison(question, look) or _bridge(question, look)


class Lookup:
    """Finds the passage whose title is a name."""

    def __init__(self, retriever: Search, topk: int) -> None:
        self.retriever, self.topk = retriever, topk

    def titled(self, name: str, *hints: str) -> tuple[str, Document] | None:
        """(a query, the passage titled `name` that it brings): the name, or the name and one of `hints`.

        None where no such query brings a passage of that title.
        """
        for query in (name, *(f"{name} {hint}" for hint in hints)) if _plain(name) else ():
            found = self.retriever.search([query], self.topk)[0]
            same = [d for d in found if _plain(d.title) == _plain(name)]
            document = next(iter(same or [d for d in found if _bare(d.title) == _bare(name)]), None)
            if document is not None:
                return query, document
        return None


def clip(sentence: str, key: str, words: int = QUOTE_WORDS) -> str:
    """At most `words` words of a sentence in a row, around the first mention of `key`; still verbatim."""
    spans = [m.span() for m in re.finditer(r"\S+", sentence)]
    if len(spans) <= words:
        return sentence
    at = max(0, sentence.casefold().find(key.casefold()))
    first = sum(end <= at for _, end in spans)
    start = min(first, max(0, first + len(key.split()) - words), len(spans) - words)
    return sentence[spans[start][0] : spans[start + words - 1][1]]


def _bridge(question: Question, look: Lookup) -> Chain | None:
    named = next((m for pattern in _NAMED if (m := pattern.search(question.text))), None)
    if named is None:
        return None
    name, role = _trim(named["name"]), named["role"]
    first = look.titled(name, role, "film")
    gold = question.answers[0]
    if first is None:
        return None
    steps = (Step(f"I need the {role} of {name}.", first[0], ""),)
    return _follow(steps, first[1], gold, role, look, 2)


def _follow(
    steps: tuple[Step, ...], at: Document, gold: str, role: str, look: Lookup, more: int
) -> Chain | None:
    """The chain from passage `at`, from which nothing is quoted yet, to a passage that states `gold`.

    `more`: how many searches may follow. None where there is no such chain.
    """
    *done, last = steps
    quote = next((s for s in _sentences(at) if _mentions(s, gold)), None)
    if quote is not None:
        return Chain((*done, replace(last, quote=clip(quote, gold))), f"So the answer is {gold}.", gold)
    if more == 0:
        return None
    stem = role.split()[-1][:6]  # "direct" is in "directed by", "compos" in "composed by"
    for sentence in sorted(_sentences(at), key=lambda s: stem not in s):
        for bridge in _names(sentence, exclude=at.title):
            found = look.titled(bridge, role, "born")
            if found is None or found[1].id == at.id:
                continue
            why = f"That names {bridge}, so I look it up."
            onward = (*done, replace(last, quote=clip(sentence, bridge)), Step(why, found[0], ""))
            chain = _follow(onward, found[1], gold, role, look, more - 1)
            if chain is not None:
                return chain
    return None


def _comparison(question: Question, look: Lookup) -> Chain | None:
    pair = next((m for pattern in _PAIRS if (m := pattern.search(question.text))), None)
    if pair is None:
        return None
    names = [_trim(pair["a"]), _trim(pair["b"])]
    of_directors = "director" in question.text
    rule = next((r for words, r in _COMPARES.items() if words in question.text), None)
    steps: list[Step] = []
    values: list[tuple[int, ...] | str] = []
    for name in names:
        found = _attribute(name, rule[0] if rule else "nation", of_directors, look)
        if found is None:
            return None
        steps += found[0]
        values.append(found[1])
    if rule is None:
        said = "yes" if values[0] == values[1] else "no"
        conclusion = f"One is {values[0]}, the other {values[1]}, so the answer is {said}."
    elif values[0] == values[1]:
        return None
    else:
        earlier = values[0] < values[1]  # type: ignore[operator]
        said = names[0] if earlier == rule[1] else names[1]
        conclusion = f"The years are {values[0][0]} and {values[1][0]}, so the answer is {said}."
    if _plain(said) not in {_plain(a) for a in question.answers}:
        return None
    return Chain(tuple(steps), conclusion, said)


def _attribute(
    name: str, attribute: str, of_director: bool, look: Lookup
) -> tuple[list[Step], tuple[int, ...] | str] | None:
    """The searches that show an attribute of `name` (or of its director), and its value."""
    found = look.titled(name, "film", "director", "born")
    if found is None:
        return None
    query, document = found
    why = f"To compare, I look up {name}."
    if not of_director:
        read = _read(document, attribute)
        return ([Step(why, query, read[0])], read[1]) if read else None
    for sentence in _sentences(document):
        if "direct" not in sentence:
            continue
        for director in _names(sentence, exclude=document.title):
            about = look.titled(director, "director", "born")
            read = _read(about[1], attribute) if about is not None and about[1].id != document.id else None
            if about is not None and read is not None:
                onward = f"So I look up its director, {director}."
                quote = clip(sentence, director)
                return [Step(why, query, quote), Step(onward, about[0], read[0])], read[1]
    return None


def _read(document: Document, attribute: str) -> tuple[str, tuple[int, ...] | str] | None:
    """(quote, value) of an attribute: a date as (year, month, day), or a nationality."""
    sentences = _sentences(document)
    if attribute == "nation":
        nation = next(((s, m["nation"]) for s in sentences if (m := _NATION.search(s))), None)
        return (clip(nation[0], nation[1]), nation[1]) if nation else None
    for sentence in sentences:
        dates = list(_DATE.finditer(sentence))
        born = attribute == "born" and re.search(r"\bborn\b|[–-]|\bdied\b|\bto\b", sentence)
        died = attribute == "died" and (len(dates) > 1 or re.search(r"\bdied\b|\bd\.", sentence))
        if dates and (attribute == "released" or born or died):
            date = dates[1] if died and len(dates) > 1 else dates[0]
            return clip(sentence, date[0]), _day(date)
    return None


def _day(found: re.Match[str]) -> tuple[int, ...]:
    month, day = found["month"] or found["month2"], found["day"] or found["day2"]
    return (int(found["year"]), _MONTHS.split("|").index(month) + 1 if month else 0, int(day) if day else 0)


def _sentences(document: Document) -> list[str]:
    return [s.strip() for s in _SENTENCE.split(" ".join(document.text.split())) if s.strip()]


def _names(sentence: str, exclude: str) -> list[str]:
    """Capitalised spans of a sentence; after each span, its parts between commas and between "and"."""
    names: list[str] = []
    for span in _NAME.findall(sentence):
        for name in (span, *span.split(", "), *re.split(r" and ", span)):
            name = name.strip(" .,'’-")
            if len(name) > 2 and name not in names and _bare(name) != _bare(exclude):
                names.append(name)
    return names


def _mentions(sentence: str, gold: str) -> bool:
    return bool(gold) and re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", sentence, re.IGNORECASE) is not None


def _trim(name: str) -> str:
    return name.strip(' ?,"')


def _plain(name: str) -> str:
    return " ".join(re.findall(r"\w+", name.casefold()))


def _bare(name: str) -> str:
    """A name without a trailing parenthesis: "Tiger Cage (film)" is the same as "Tiger Cage"."""
    return _plain(re.sub(r"\([^)]*\)\s*$", "", name))


def shares(questions: Sequence[Question], retriever: Search, topk: int) -> dict[str, float]:
    """Share of questions of each kind whose chain is found."""
    kinds: dict[str, list[bool]] = {}
    for question in questions:
        kinds.setdefault(question.kind or "all", []).append(find_chain(question, retriever, topk) is not None)
    return {kind: sum(found) / len(found) for kind, found in kinds.items()}

"""Instruction templates and cue pools, as named sets (METHOD §1, §2.5). All wording is this project's own."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from rexrag.agent.protocols.tags import neutralise
from rexrag.errors import ConfigError, DataError
from rexrag.io import read_lines, read_text

T = TypeVar("T")
QUESTION_FIELD = "{question}"
"""Where the question goes in an instruction template."""
TEXT_FILE = ".txt"
"""A template or a cue pool with this suffix is the user's own file."""

TEMPLATES: Mapping[str, str] = MappingProxyType(
    {
        # Same meaning as Search-R1's instruction.
        "search-r1": (
            "Answer the question below. Whenever new information reaches you, first reason about it "
            "between <think> and </think>. If your reasoning shows that a fact is missing, you may ask a "
            "search engine with <search> query </search>; its best results are then shown to you between "
            "<information> and </information>. Search as many times as you like. Once nothing more has to "
            "be looked up, state the answer between <answer> and </answer>, with no explanation around it. "
            "For example, <answer> Beijing </answer>. Question: {question}\n"
        ),
        # For a small instruction model, which acts only when it is told when: no name that could be copied
        # as an answer, and the first thought ends with a search.
        "search-first": (
            "Answer the question below with the help of a search engine. Every step is a thought and then an "
            "action. The first step is a thought between <think> and </think> about what has to be found "
            "out, and right after it a search: <search> words to look up </search>. Its best results are "
            "then shown to you between <information> and </information>. The next step is a thought about "
            "these results, and right after it one more search, or the end: between <answer> and </answer> "
            "nothing but the name, the date or the number that was asked for, never a sentence. No step "
            "stops after </think>. Question: {question}\n"
        ),
        # For a model that was taught the protocol by demonstration.
        "terse": "Question: {question}",
        # The baseline without search.
        "direct": (
            "Answer the question below from what you already know. Reply with nothing but the answer, "
            "between <answer> and </answer>. For example, <answer> Beijing </answer>. Question: {question}\n"
        ),
    }
)
"""Instruction templates; `{question}` is the only field. `agent.template` names one, or a text file."""

BASELINES: Mapping[str, str] = MappingProxyType(
    {
        "cot": (
            "Answer the question below from what you already know. First reason step by step between <think> "
            "and </think>, then state the answer between <answer> and </answer>, with no explanation around "
            "it. For example, <answer> Beijing </answer>. Question: {question}\n"
        ),
        "rag": (
            "Answer the question below with the help of the passages. Reply with nothing but the answer, "
            "between <answer> and </answer>. For example, <answer> Beijing </answer>.\n\n{passages}\n\n"
            "Question: {question}\n"
        ),
        "ircot": (
            "Work towards the answer of the question below, one sentence at a time, with the help of the "
            "passages. Write only the next sentence of the reasoning, naming what has to be found out next. "
            "If the reasoning so far is enough, write only the answer, between <answer> and </answer>, with "
            "no explanation around it. For example, <answer> Beijing </answer>.\n\n{passages}\n\n"
            "Question: {question}\nReasoning so far: {thoughts}\n"
        ),
        "refine": (
            "Somebody who reasons about a question has searched for something. Read the passages that were "
            "found and write down, in a few sentences, only what helps with the next step of the reasoning. "
            "If nothing helps, write: No helpful information found.\n\nQuestion: {question}\n"
            "Reasoning so far: {thoughts}\nSearched for: {query}\n\n{passages}\n"
        ),
    }
)
"""Instructions of the baselines that `rexrag eval` compares an agent with; each names the fields it takes."""

_DEFAULT = (
    "<think> Wait, that came too easily, so I should try to prove it wrong.",
    "<think> Maybe the passage was about somebody else and I misread the name.",
    "<think> I am not convinced yet, because one step of this rests on a guess.",
    "<think> Hold on, the question asks for something slightly different from what I found.",
    "<think> Before I commit to this, another search might tell me whether it holds.",
    "<think> Did I really read that, or did I fill a gap from memory?",
    "<think> Something here does not fit together. I want to know why.",
    "<think> My last query was vague, so a more precise one may change the picture.",
    "<think> Perhaps I stopped one step short of what the question is asking me.",
    "<think> Actually, I have seen no evidence for the last part.",
    "<think> Let me go back over the facts, since one of them may be mistaken.",
    "<think> Hmm, two different things could share this name and I picked one blindly.",
    "<think> If I had to defend this answer right now, I could not say why.",
    "<think> There may be a newer or better source that says something else entirely.",
    "<think> No, I should not trust this until I have confirmed it with a search.",
    "<think> What if the first thing I looked up led me in the wrong direction?",
    "<think> Looking at it again, I may have mixed up two details.",
    "<think> One piece is still missing, and I can look it up.",
    "<think> Could it be that I answered an easier question than the one asked?",
    "<think> On second thought, the documents only hint at this and never say it.",
    "<think> It would be careless to finish now, as I only checked half of it.",
    "<think> So far I have assumed the link between these facts without testing it.",
    "<think> Am I sure about this? A different search could show otherwise.",
    "<think> The evidence I have is thin, and a second source would help.",
    "<think> Rather than settle for this, I want to try the question from another angle.",
    "<think> Looks plausible, but plausible is not enough and I still have searches left.",
    "<think> Thinking it over, I doubt that this is the person or thing they meant.",
    "<think> Some of what I wrote above may be wrong and needs checking.",
    "<think> Not so fast, I skipped a step and it could matter.",
    "<think> Still, I have a feeling that a key fact has slipped past me here.",
)

_DEFAULT_DEMO = (
    "<think> But is that really what was asked?",
    "<think> I should check this again before I answer.",
    "<think> Wait, I have not looked at everything yet.",
    "<think> Maybe that is not it. Let me read the passage again.",
    "<think> That was quick, and I could have missed something.",
    "<think> Hmm, let me make sure of this first.",
    "<think> I am unsure whether this answers the question.",
    "<think> Let me look once more at what I know so far.",
    "<think> This may be wrong. What would I have to know?",
    "<think> No, let me think about the question again.",
    "<think> Is there a step that I left out?",
    "<think> I could be mistaken here, so I go on.",
)

_TINY = (
    "<think> maybe this is not the right one i should look again",
    "<think> i am not sure yet let me check this",
    "<think> that may be wrong i need to search once more",
    "<think> something is missing here so i should search again",
    "<think> wait this does not answer the question yet",
    "<think> let me look at this once more before i answer",
    "<think> no i still need more to be sure",
    "<think> hmm i may have missed something let me search",
    "<think> this could be wrong so let me check it",
    "<think> one more search should make me sure",
)

_TINY_DEMO = (
    "<think> i need to check this once more before i answer",
    "<think> wait i may have missed one",
    "<think> hmm that is not right let me look again",
    "<think> maybe i should search once more to be sure",
    "<think> this is not the answer yet so i need more",
    "<think> not sure this could be the wrong one",
    "<think> i still have to look for something more",
    "<think> let me search again here something is missing",
    "<think> so i am not sure yet let me look at it",
    "<think> no this does not answer it",
)

CUE_POOLS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "default": _DEFAULT,
        "default_demo": _DEFAULT_DEMO,
        "small-5": _DEFAULT[::6],
        "small-15": _DEFAULT[::2],
        "tiny": _TINY,
        "tiny_demo": _TINY_DEMO,
    }
)
"""Cue pools: first-person doubts that open a thought and leave it open.

`tiny` is for the embedded word-level model. The `_demo` pools are what demonstrations of a warm-up say; they
share no sentence with the pools that probes use, so that a cue is not simply remembered.
"""


def render_prompt(template: str, question: str) -> str:
    """The user message for a question under a template; "?" is added where the question lacks it.

    Raises what `template_text` raises.
    """
    return template_text(template).replace(QUESTION_FIELD, _asked(question))


def template_text(template: str) -> str:
    """The text of a named template, or of a user's own text file (`*.txt`), which holds `{question}`.

    Any other brace is text. Raises ConfigError for an unknown name, naming the nearest known one; DataError
    for a file that cannot be read, is empty, or lacks the field.
    """
    if not template.endswith(TEXT_FILE):
        return _lookup(TEMPLATES, template, "agent.template", "your own template is a .txt file")
    text = read_text(template)
    if QUESTION_FIELD not in text:
        problem = f"no {QUESTION_FIELD} here" if text.strip() else "empty"
        expected = f"expected an instruction with {QUESTION_FIELD} where the question goes"
        raise DataError(f"{problem}; {expected}", file=template)
    return text


def template_digest(template: str) -> str:
    """sha256 over the text of a template: what a checkpoint stores to notice that a text file changed."""
    return hashlib.sha256(template_text(template).encode()).hexdigest()


def render_baseline(name: str, question: str, **fields: str) -> str:
    """The user message of a baseline. Braces in the fields are text."""
    return BASELINES[name].format(question=_asked(question), **fields)


def cue_pool(name: str) -> tuple[str, ...]:
    """The cues of a named pool, or of a user's own text file (`*.txt`), one doubt a line.

    Raises ConfigError for an unknown name, naming the nearest known one; DataError for a wrong line.
    """
    if not name.endswith(TEXT_FILE):
        return _lookup(CUE_POOLS, name, "agent.cues")
    cues = tuple(_own_cue(name, row, line) for row, line in read_lines(name))
    if not cues:
        raise DataError("no cue here; expected one doubt a line", file=name)
    return cues


def _own_cue(path: str, row: int, line: str) -> str:
    """A line as a cue: it opens a thought and leaves it open."""
    words = line.removeprefix("<think>").strip()
    if not words or neutralise(words) != words:
        raise DataError("expected a doubt without a tag, such as 'Is that so?'", file=path, row=row)
    return f"<think> {words}"


def pool_digest(cues: Sequence[str]) -> str:
    """sha256 over the exact texts of a pool, in order: what a checkpoint stores to notice a change."""
    return hashlib.sha256(json.dumps(list(cues)).encode()).hexdigest()


def _asked(question: str) -> str:
    text = question.strip()
    return text if text.endswith("?") else text + "?"


def _lookup(table: Mapping[str, T], name: str, key: str, more: str = "") -> T:
    if name in table:
        return table[name]
    nearest = difflib.get_close_matches(name, table, n=1, cutoff=0.0)
    known = f"Known: {', '.join(table)}" + (f"; {more}" if more else "")
    raise ConfigError(f"{key} = '{name}': not known; did you mean '{nearest[0]}'? {known}")

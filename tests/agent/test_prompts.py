"""Templates and cue pools: their promises, and errors that name the nearest set."""

import os
import re

import pytest

from rexrag.agent.codec import load_codec
from rexrag.agent.prompts import (
    CUE_POOLS,
    TEMPLATES,
    cue_pool,
    pool_digest,
    render_prompt,
    template_digest,
)
from rexrag.agent.protocols.tags import NOTICE, actions
from rexrag.errors import ConfigError, DataError
from tests.support.codecs import TAGS


def test_question_mark_is_added_only_where_it_lacks():
    assert render_prompt("terse", " Who is Al ") == "Question: Who is Al?"
    assert render_prompt("terse", "Who is Al?") == "Question: Who is Al?"


def test_braces_in_a_question_are_text():
    assert "What is {question} {x}?" in render_prompt("search-r1", "What is {question} {x}")


def test_search_r1_explains_every_tag():
    prompt = render_prompt("search-r1", "Who is Al?")
    assert all(tag in prompt for tag in TAGS)
    assert "<answer> Beijing </answer>" in prompt
    assert prompt.rstrip().endswith("Question: Who is Al?")


def test_search_first_explains_every_tag_and_holds_no_answer_to_copy():
    prompt = render_prompt("search-first", "Who is Al?")
    assert all(tag in prompt for tag in TAGS)
    assert actions(prompt)[0].kind == "search", "a thought ends with a search"
    assert [action.argument for action in actions(prompt) if action.kind == "answer"] in ([], ["and"])
    # A real name is a capitalised word inside a sentence; a small model copies it as its answer.
    instruction = prompt.partition("Question:")[0]
    assert re.findall(r"(?<![.:] )(?<!^)\b[A-Z][a-z]+", instruction) == []
    assert prompt.rstrip().endswith("Question: Who is Al?")


def test_a_template_of_ones_own_is_a_text_file(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\ufeffFind {x}: {question}\nGo on.\n", encoding="utf-8")
    assert render_prompt(str(file), "Who is {Al}") == "Find {x}: Who is {Al}?\nGo on.\n"
    before = template_digest(str(file))
    file.write_text("Find {question}", encoding="utf-8")
    assert template_digest(str(file)) != before, "a checkpoint can notice that the file changed"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Answer this.\n", r"mine.txt: no \{question\} here; expected an instruction with \{question\}"),
        (b" \n", r"mine.txt: empty; expected an instruction with \{question\} where the question goes"),
        (b"\xff{question}", "mine.txt: expected a text in UTF-8"),
        (None, "mine.txt: no such file"),
    ],
)
def test_a_text_file_that_is_no_template_is_one_line(tmp_path, content, message):
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        render_prompt(str(file), "Who?")
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"agent\.template = 'serch-r1'.*did you mean 'search-r1'"):
        render_prompt("serch-r1", "x")
    with pytest.raises(ConfigError, match=r"agent\.cues = 'small5'.*did you mean 'small-5'"):
        cue_pool("small5")


@pytest.mark.parametrize("name", CUE_POOLS)
def test_a_cue_opens_a_thought_and_leaves_it_open(name):
    cues = cue_pool(name)
    assert len(set(cues)) == len(cues)
    for cue in cues:
        assert cue.startswith("<think> ")
        assert re.findall(r"<[^>]*>", cue) == ["<think>"]
        assert actions(cue) == []


def test_a_pool_of_ones_own_is_a_text_file(tmp_path):
    file = tmp_path / "doubts.txt"
    file.write_text("\ufeffWait, is 3 < 4?\n\n  <think> Ça ne va pas. \n", encoding="utf-8")
    assert cue_pool(str(file)) == ("<think> Wait, is 3 < 4?", "<think> Ça ne va pas.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\n\nno </think> here\n", "doubts.txt, row 3: expected a doubt without a tag"),
        (b"< Answer > x\n", "doubts.txt, row 1: expected a doubt without a tag"),
        (b"<think>\n", "doubts.txt, row 1: expected a doubt without a tag"),
        (b"fine\n\xff\n", "doubts.txt, row 2: expected a text in UTF-8"),
        (b"\n", "doubts.txt: no cue here; expected one doubt a line"),
        (None, "doubts.txt: no such file"),
    ],
)
def test_a_wrong_line_in_a_pool_is_named(tmp_path, content, message):
    file = tmp_path / "doubts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        cue_pool(str(file))


def test_the_default_pool_is_thirty_doubts_with_different_beginnings():
    assert len(cue_pool("default")) == 30
    assert len({cue.split()[1] for cue in cue_pool("default")}) == 30
    assert [len(cue_pool(f"small-{n}")) for n in (5, 15)] == [5, 15]
    assert set(cue_pool("small-5")) | set(cue_pool("small-15")) <= set(cue_pool("default"))


def test_what_demonstrations_say_is_not_what_probes_say():
    for pool in ("default", "tiny"):
        assert not set(cue_pool(pool)) & set(cue_pool(f"{pool}_demo"))


def test_tiny_pools_share_words_but_no_sentence():
    tiny, demo = cue_pool("tiny"), cue_pool("tiny_demo")
    assert len(tiny) == len(demo) == 10
    assert not set(tiny) & set(demo)
    words = [set(" ".join(pool).split()) for pool in (tiny, demo)]
    assert len(words[0] & words[1]) / len(words[0] | words[1]) > 0.8
    for cue in (*tiny, *demo):
        assert re.fullmatch(r"<think>( [a-z]+)+", cue), cue


def test_digest_sees_every_change_of_text_order_and_borders():
    assert pool_digest(["a", "b"]) == pool_digest(("a", "b"))
    others = [["b", "a"], ["a", "b "], ["ab"], ["a", "b", "b"], ['a", "b'], []]
    assert len({pool_digest(pool) for pool in [["a", "b"], *others]}) == len(others) + 1


def test_the_notice_spells_no_tag():
    assert "<" not in NOTICE
    assert set(TEMPLATES) == {"search-r1", "search-first", "terse", "direct"}


def test_default_cues_have_14_to_19_tokens():
    """The paper's length. They are common words, which a GPT-style BPE keeps whole, tag and marks apart."""
    assert all(14 <= len(re.findall(r"\w+|[^\w\s]", cue)) <= 19 for cue in cue_pool("default"))


@pytest.mark.slow
def test_default_cues_have_14_to_19_tokens_of_a_real_tokenizer():
    """REXRAG_TEST_MODEL names a folder made by `rexrag model import`, for example of SmolLM2."""
    folder = os.environ.get("REXRAG_TEST_MODEL")
    if not folder:
        pytest.skip("set REXRAG_TEST_MODEL to an imported model folder")
    codec = load_codec(folder)
    assert all(14 <= len(codec.encode(cue)) <= 19 for cue in cue_pool("default"))

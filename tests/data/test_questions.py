"""Every format in use is read to the same questions, and a bad row is named by file, row and field."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rexrag.data.question_rows import bare_question, parse_question
from rexrag.data.questions import load_questions, questions_digest, write_questions
from rexrag.errors import ConfigError, DataError
from rexrag.io import FieldError
from rexrag.types import Question

PROMPT = "Answer the given question. For example, <answer> Beijing </answer>. Question: {}\n"


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain(**change: object) -> dict[str, object]:
    return {"id": "q1", "question": "who?", "answers": ["Ada"]} | change


def search_r1(text: str = "who wrote it?", index: object = 0, **change: object) -> dict[str, object]:
    return {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": PROMPT.format(text)}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["Ada", "Ada Lovelace"]}},
        "extra_info": {"split": "test", "index": index},
    } | change


def test_plain_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"id": "a", "question": "who?", "answers": ["Ada"], "kind": "bridge", "hops": 2},
        {"id": 7, "question": "where?", "golden_answers": ["London", "England"], "metadata": {}},
        {"question": "when?", "answers": ["1843"], "id": None, "kind": "", "source": "nq", "split": "dev"},
    )
    assert load_questions(path) == [
        Question("a", "who?", ("Ada",), hops=2, kind="bridge"),
        Question("7", "where?", ("London", "England")),
        Question("3", "when?", ("1843",), source="nq", split="dev"),
    ]
    assert load_questions(path, source="2wiki", split="dev")[0].group == "2wiki/dev/a"


def test_search_r1_rows_are_the_same_from_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [
        search_r1("who wrote it?"),
        search_r1("where?", data_source="hotpotqa"),
        search_r1('the song "Question: why" is by whom?', 1),
    ]
    jsonl = write(tmp_path / "q.jsonl", *rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    questions = load_questions(jsonl)
    assert questions == load_questions(tmp_path / "q.parquet")
    assert questions[0] == Question("0", "who wrote it?", ("Ada", "Ada Lovelace"), source="nq", split="test")
    # Index 0 of two sets: the official uid collides here, the group does not.
    assert [question.group for question in questions] == ["nq/test/0", "hotpotqa/test/0", "nq/test/1"]
    assert questions[2].text == 'why" is by whom?'


def test_search_r1_rows_that_kept_the_columns_of_their_source(tmp_path: Path) -> None:
    row = search_r1("who wrote it?", 5) | {
        "id": "train_5",
        "question": "who wrote it",
        "golden_answers": ["x"],
    }
    [question] = load_questions(write(tmp_path / "q.jsonl", row))
    assert (question.id, question.text, question.answers) == ("5", "who wrote it?", ("Ada", "Ada Lovelace"))


def test_parquet_of_plain_rows_with_nulls(tmp_path: Path) -> None:
    rows = [plain(kind="bridge", hops=None), plain(id=None, kind=None, hops=2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    assert load_questions(tmp_path / "q.parquet") == [
        Question("q1", "who?", ("Ada",), kind="bridge"),
        Question("2", "who?", ("Ada",), hops=2),
    ]


def test_a_search_r1_row_without_extras_takes_row_number_and_split(tmp_path: Path) -> None:
    [question] = load_questions(write(tmp_path / "q.jsonl", search_r1(extra_info=None)), split="dev")
    assert question.group == "nq/dev/1"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (PROMPT.format("who?"), "who?"),
        ("who?", "who?"),
        ("Question: a? Question: b?", "b?"),
        ("Question:\nwho?\n\n", "who?"),
    ],
)
def test_the_bare_question(content: str, text: str) -> None:
    assert bare_question(content) == text


def test_the_last_user_message_holds_the_question() -> None:
    chat = [
        {"role": "system", "content": "Question: none"},
        {"role": "user", "content": "Question: first?"},
        {"role": "assistant", "content": "Question: what?"},
        {"role": "user", "content": "Question: second?"},
        {"role": "assistant", "content": "…"},
    ]
    assert parse_question(search_r1(prompt=chat), 1).text == "second?"


def test_a_trace_with_its_prompt_is_a_plain_row() -> None:
    assert parse_question(plain(prompt="<|im_start|>user …"), 1).text == "who?"


BAD = [
    (plain(question=None), "question", "missing; expected a text"),
    (plain(question=" "), "question", "expected a text that is not blank"),
    (plain(question=["who?"]), "question", "expected a text, got list"),
    (plain(answers=None), "answers", "missing; expected a text, a number or a list"),
    (plain(answers=True), "answers", "expected a text, a number or a list of them, got bool True"),
    (plain(answers=[]), "answers", "expected at least one answer"),
    (plain(answers=["Ada", ""]), "answers.1", "expected a text that is not blank"),
    (plain(answers=[["Ada"]]), "answers.0", "expected a text, a number or a list of them, got list"),
    ({"question": "who?", "golden_answers": {}}, "golden_answers", "expected one of value, Value"),
    (plain(id=1.5), "id", "expected a text or a whole number, got float 1.5"),
    (plain(hops=-1), "hops", "expected a whole number of at least 0"),
    (plain(hops=True), "hops", "expected a whole number of at least 0"),
    (plain(kind=3), "kind", "expected a text, got int 3"),
    (plain(source=3), "source", "expected a text, got int 3"),
    (plain(question="\ud800"), "question", "lone surrogate"),
    (search_r1(data_source=None), "data_source", "missing"),
    (search_r1(prompt=None), "prompt", "expected a list of messages, got NoneType"),
    (search_r1(prompt="Question: who?"), "prompt", "expected a list of messages, got str"),
    (search_r1(prompt=[]), "prompt", "expected a list of messages"),
    (search_r1(prompt=["who?"]), "prompt.0", "expected a message with role and content"),
    (search_r1(prompt=[{"role": "system", "content": "x"}]), "prompt", "whose role is 'user'"),
    (search_r1(prompt=[{"role": "user", "content": 3}]), "prompt.0.content", "expected a text, got int 3"),
    (search_r1(" "), "prompt.content", "expected a text that is not blank"),
    (search_r1(reward_model="rule"), "reward_model", "expected an object, got str 'rule'"),
    (search_r1(reward_model={}), "reward_model.ground_truth", "missing; expected a text"),
    (search_r1(reward_model={"ground_truth": {}}), "reward_model.ground_truth", "expected one of"),
    (
        search_r1(reward_model={"ground_truth": {"target": [True]}}),
        "reward_model.ground_truth.target.0",
        "expected a text, a number or a list of them, got bool True",
    ),
    (search_r1(index=[1]), "extra_info.index", "expected a text or a whole number"),
    (search_r1(extra_info=[1]), "extra_info", "expected an object"),
    (search_r1(extra_info={"index": 1, "split": 2}), "extra_info.split", "expected a text"),
]


@pytest.mark.parametrize(("row", "field", "message"), BAD)
def test_a_bad_row_is_named(tmp_path: Path, row: object, field: str, message: str) -> None:
    path = write(tmp_path / "q.jsonl", plain(id="fine"), row)
    with pytest.raises(DataError) as caught:
        load_questions(path)
    assert str(caught.value).startswith(f"{path}, row 2, field '{field}': ")
    assert message in str(caught.value)


def test_a_bad_parquet_row_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([plain(), plain(id="q2", answers=[])]), tmp_path / "q.parquet")
    with pytest.raises(DataError, match=r"q\.parquet, row 2, field 'answers': expected at least one answer"):
        load_questions(tmp_path / "q.parquet")


def test_duplicates_are_refused_within_a_source_and_split_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", plain(), plain(id="q2"), plain())
    with pytest.raises(DataError, match=r"row 3, field 'id': 'q1' was seen before in local/train"):
        load_questions(path)
    path = write(tmp_path / "b.jsonl", plain(), plain(source="nq"), plain(split="dev"))
    assert len({question.group for question in load_questions(path)}) == 3


def test_files_that_cannot_be_questions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown suffix '\.txt'; expected \.jsonl, \.json, \.parquet"):
        load_questions(tmp_path / "q.txt.gz")
    with pytest.raises(DataError, match="no such file"):
        load_questions(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match="no questions"):
        load_questions(write(tmp_path / "q.jsonl"))
    with pytest.raises(DataError, match=r"row 1: expected a JSON object"):
        load_questions(write(tmp_path / "q.jsonl", "who?"))
    with pytest.raises(ConfigError, match=r"written as \.jsonl"):
        write_questions(tmp_path / "q.parquet", [])


words = st.text(min_size=1).filter(lambda text: text.strip())
questions = st.lists(
    st.builds(
        Question,
        id=words,
        text=words,
        answers=st.lists(words, min_size=1, max_size=3).map(tuple),
        source=words,
        split=words,
        hops=st.integers(0, 5),
        kind=st.just("") | words,
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda question: question.group,
)


@settings(max_examples=50)
@given(questions)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, made: list[Question]) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.jsonl"
    assert write_questions(path, made) == len(made)
    assert load_questions(path) == made
    assert questions_digest(load_questions(path)) == questions_digest(made)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["role", "content", "ground_truth", "target", "split", "index"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


@given(base=st.sampled_from([plain(), search_r1()]), change=st.data())
def test_any_row_is_a_question_or_a_named_error(base: dict[str, object], change: st.DataObject) -> None:
    fields = [*base, "golden_answers", "kind", "hops", "source", "split"]
    row = base | change.draw(st.dictionaries(st.sampled_from(fields), json_values, min_size=1, max_size=3))
    try:
        question = parse_question(row, 9)
    except FieldError as error:
        known = [*fields, "question", "answers", "prompt", "reward_model", "data_source", "extra_info"]
        assert error.field.split(".")[0] in known
        assert "expected" in str(error)
    else:
        assert question.text.strip() and question.answers and question.id and question.source
        assert all(isinstance(answer, str) and answer.strip() for answer in question.answers)


def test_the_digest_knows_every_field_and_the_order() -> None:
    one, two = Question("1", "a?", ("x",)), Question("2", "b?", ("y",))
    others = [
        [two, one],
        [one],
        [one, Question("2", "b?", ("y",), kind="k")],
        [one, Question("2", "b?", ("y", "z"))],
        [one, Question("2", "b?", ("y",), split="dev")],
    ]
    assert len({questions_digest(made) for made in [[one, two], *others]}) == 6


REAL = {
    "2wiki/train.jsonl": 600,
    "2wiki/dev.jsonl": 200,
    "wiki18_nq/train.jsonl": 482,
    "wiki18_nq/dev.jsonl": 161,
    "benchmarks_flashrag_format/nq.jsonl": 200,
    "benchmarks_flashrag_format/popqa.jsonl": 200,
    "benchmarks_flashrag_format/triviaqa.jsonl": 200,
    "benchmarks_flashrag_format/bamboogle.jsonl": 125,
    "traces/search_r1_3b_base_bamboogle.jsonl": 125,
}


@pytest.mark.parametrize(("name", "count"), REAL.items())
def test_real_files(shared: Path, tmp_path: Path, name: str, count: int) -> None:
    made = load_questions(shared / "data" / name, source=name.split("/")[0])
    assert len(made) == count
    if name.startswith("2wiki"):
        assert {question.kind for question in made} >= {"bridge", "comparison"}
    write_questions(tmp_path / "again.jsonl", made)
    assert load_questions(tmp_path / "again.jsonl") == made


def test_real_prompts_give_back_their_questions(shared: Path) -> None:
    path = shared / "data" / "traces" / "search_r1_3b_base_bamboogle.jsonl"
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        message = re.search(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", row["prompt"], re.DOTALL)
        assert message is not None
        assert bare_question(message[1]) == row["question"].strip()

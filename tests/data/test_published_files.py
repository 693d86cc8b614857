"""Question files as they are published are read as they are; what is not understood is named."""

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from rexrag.data.qa_sets import load_sets
from rexrag.data.question_rows import answer_texts, parse_question
from rexrag.data.questions import load_questions
from rexrag.errors import DataError
from rexrag.io import FieldError
from rexrag.types import Question

CASES = Path(__file__).parents[1] / "cases"
TRIVIA = ("Sinclair Lewis", "Sinclair", "Lewis", "sinclair lewis")
PUBLISHED = {
    "q_hotpot_list.json": ("h1", ("yes",), "comparison", 0),
    "q_hotpot_fields.jsonl": ("h1", ("yes",), "comparison", 0),
    "q_2wiki.json": ("w1", ("Ada",), "compositional", 0),
    "q_musique.jsonl": ("2hop__1_2", ("1960", "in 1960"), "", 0),
    "q_triviaqa.json": ("tc_1", TRIVIA, "", 0),
    "q_triviaqa_hub.jsonl": ("tc_1", TRIVIA, "", 0),
    "q_nq_open.jsonl": ("1", ("A. Writer", "Writer"), "", 0),
    "q_nq_dpr.csv": ("1", ("A. Writer", "Writer"), "", 0),
    "q_popqa.tsv": ("4222362", ("politician", "political leader"), "", 0),
    "q_popqa.csv": ("4222362", ("politician", "political leader"), "", 0),
    "q_target_text.parquet": ("0", ("Writer",), "", 0),
    "q_str_answer.jsonl": ("1", ("A. Writer",), "", 0),
    "q_num_answer.jsonl": ("1", ("1960",), "", 0),
    "q_list_of_lines.json": ("1", ("Ada",), "", 0),
}


@pytest.mark.parametrize(("name", "expected"), PUBLISHED.items())
def test_a_published_file_is_read_as_it_is(name: str, expected: tuple[object, ...]) -> None:
    first = load_questions(CASES / name)[0]
    assert (first.id, first.answers, first.kind, first.hops) == expected


def test_a_musique_question_has_a_hop_for_each_step() -> None:
    row = {"id": "3hop1__1", "question": "When?", "answer": "1960", "question_decomposition": [{}, {}, {}]}
    assert parse_question(row, 1).hops == 3


def test_fields_that_are_not_understood_are_named() -> None:
    with pytest.raises(DataError) as caught:
        load_questions(CASES / "q_unknown_fields.jsonl")
    assert str(caught.value).endswith(
        "q_unknown_fields.jsonl, row 1, field 'question': missing; expected a text; "
        "this row has query, label, level"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c\n1,2,3\n", r"row 1: expected a column 'question', or two columns.*has a, b, c"),
        ("question,answers\nwho?\n", "row 2: expected 2 columns, got 1"),
        ("question,answers\nwho?,\n", "row 2, field 'answers': missing"),
        ("question,answers\n\udcff,x\n", "not readable as a table in UTF-8"),
    ],
)
def test_a_table_that_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        load_questions(tmp_path / "q.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON in UTF-8"),
        ("[1]", "row 1: expected an object, got int"),
        ("3", "row 1: expected an object, got int"),
        ("[]", "no questions"),
        ("[" * 100_000, "expected JSON in UTF-8"),
    ],
)
def test_json_that_holds_no_rows_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_questions(tmp_path / "q.json")


@pytest.mark.parametrize(
    "truth",
    [
        "Ada",
        ["Ada"],
        '["Ada"]',
        '{"target": ["Ada"]}',
        {"target": "Ada"},
        {"target": ["Ada"]},
        {"target": '["Ada"]'},
    ],
)
def test_ground_truth_is_a_text_a_list_or_json_text(tmp_path: Path, truth: object) -> None:
    row = {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "Answer. Question: who?\n"}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "test", "index": 0},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    assert load_questions(tmp_path / "q.parquet") == [Question("0", "who?", ("Ada",), "nq", "test")]


def test_a_verl_row_without_the_mark_takes_the_question_that_it_carries_apart(tmp_path: Path) -> None:
    row = {
        "data_source": "gsm",
        "prompt": [{"role": "user", "content": "How many? Think first."}],
        "reward_model": {"ground_truth": 72},
        "extra_info": {"question": "How many?", "index": 3},
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    assert load_questions(tmp_path / "q.parquet") == [Question("3", "How many?", ("72",), "gsm")]


@pytest.mark.parametrize(
    ("value", "texts"),
    [
        ("Ada", ("Ada",)),
        (1960, ("1960",)),
        (1960.0, ("1960",)),
        (2.5, ("2.5",)),
        (["Ada", 7, "Ada"], ("Ada", "7")),
        ('["Ada", 7]', ("Ada", "7")),
        ("['Ada']", ("Ada",)),
        ("[sic] Ada", ("[sic] Ada",)),
        ("[]", ("[]",)),
        ("{x}", ("{x}",)),
        ({"text": ["Ada"], "answer_start": [3]}, ("Ada",)),
    ],
)
def test_what_an_answer_may_be(value: object, texts: tuple[str, ...]) -> None:
    assert answer_texts(value, "answers") == texts


@pytest.mark.parametrize("value", [None, True, [], [[]], {}, {"x": 1}, "", " ", [""], float("nan"), "\ud800"])
def test_what_no_answer_may_be(value: object) -> None:
    with pytest.raises(FieldError, match="expected"):
        answer_texts(value, "answers")


PACKERS = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize(
    "name", ["q_nq_open.jsonl", "q_hotpot_list.json", "q_popqa.tsv", "q_target_text.parquet"]
)
@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_are_the_same_questions(tmp_path: Path, name: str, suffix: str) -> None:
    packed = tmp_path / f"{name}{suffix}"
    packed.write_bytes(PACKERS[suffix]((CASES / name).read_bytes()))
    assert load_questions(packed) == load_questions(CASES / name)


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_packed_file_that_ends_too_early_is_named(tmp_path: Path, suffix: str) -> None:
    rows = b"".join(b'{"question": "q%d", "answers": ["%d"]}\n' % (i, i * 7919) for i in range(5000))
    packed = tmp_path / f"q.jsonl{suffix}"
    packed.write_bytes(PACKERS[suffix](rows)[:-2000])
    with pytest.raises(DataError, match=rf"q\.jsonl\{suffix}"):
        load_questions(packed)


def test_a_line_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rexrag.io.LINE_BYTES", 1000)
    (tmp_path / "q.jsonl.gz").write_bytes(gzip.compress(b" " * 10**6))
    with pytest.raises(DataError, match="row 1: a line of more than 1,000 bytes"):
        load_questions(tmp_path / "q.jsonl.gz")


def test_published_names_are_benchmarks(tmp_path: Path) -> None:
    for name, case in (
        ("hotpot_dev_distractor_v1.json", "q_hotpot_list.json"),
        ("musique_ans_v1.0_dev.jsonl", "q_musique.jsonl"),
        ("NQ-open.dev.jsonl.gz", "q_nq_open.jsonl"),
        ("popQA.tsv", "q_popqa.tsv"),
    ):
        data = (CASES / case).read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        (found,) = load_sets(str(tmp_path / name))
        assert found.title in ("HotpotQA", "MuSiQue", "NQ", "PopQA"), name

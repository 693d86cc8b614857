"""The seven sets: shapes, folders, hubs, samples."""

import json
import sys

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from rexrag.data.qa_sets import BENCHMARKS, canonical, load_sets, sample, stratum, whole_set
from rexrag.errors import ConfigError, DataError
from rexrag.types import Question


def flashrag(name, n=3, **more):
    return [
        {"id": f"test_{i}", "question": f"{name} {i}?", "golden_answers": ["x"], **more} for i in range(n)
    ]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def search_r1(source, i):
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"Do it. Question: {source} {i}?\n"}],
        "reward_model": {"style": "rule", "ground_truth": {"target": ["x"]}},
        "extra_info": {"split": "test", "index": i},
    }


def test_flashrag_folders_take_the_split_of_the_paper(tmp_path):
    for name, split in (("nq", "test"), ("nq", "train"), ("hotpotqa", "dev"), ("hotpotqa", "test")):
        write(tmp_path / name / f"{split}.jsonl", flashrag(f"{name} {split}"))
    write(tmp_path / "2wiki.jsonl", flashrag("2wiki", metadata={"type": "comparison"}))
    found = {one.name: one for one in load_sets(str(tmp_path))}
    assert list(found) == ["nq", "hotpotqa", "2wikimultihopqa"]  # the paper's order
    assert found["nq"].questions[0].text == "nq test 0?" and found["nq"].split == "test"
    assert found["hotpotqa"].questions[0].text == "hotpotqa dev 0?"
    assert found["2wikimultihopqa"].questions[0].kind == "comparison"
    assert found["nq"].questions[0].group == "nq/test/test_0"
    assert [one.name for one in load_sets(str(tmp_path), ["HotpotQA"])] == ["hotpotqa"]


def test_search_r1_parquet_is_told_apart_by_its_source(tmp_path):
    rows = [search_r1(source, i) for source in ("popqa", "nq", "mine") for i in range(2)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    for source in (tmp_path, tmp_path / "test.parquet"):
        found = load_sets(str(source))
        assert [(one.name, len(one.questions)) for one in found] == [("nq", 2), ("popqa", 2), ("mine", 2)]
    assert found[0].questions[1].text == "nq 1?"
    assert [one.name for one in load_sets(str(tmp_path), ["popqa"])] == ["popqa"]


def test_one_s_own_files(tmp_path):
    rows = [{"question": "q?", "answers": ["a"]}]
    write(tmp_path / "mine" / "dev.jsonl", rows)
    assert [one.name for one in load_sets(str(tmp_path / "mine"))] == ["mine"]
    assert [one.title for one in load_sets(str(write(tmp_path / "special.jsonl", rows)))] == ["special"]


def test_the_samples_beside_the_project_load(shared):
    found = load_sets(str(shared / "data" / "benchmarks_flashrag_format"))
    sizes = {one.name: len(one.questions) for one in found}
    assert sizes == {"nq": 200, "triviaqa": 200, "popqa": 200, "bamboogle": 125}
    assert sizes["bamboogle"] == BENCHMARKS["bamboogle"].size
    assert len({one.digest for one in found}) == 4


def test_mistakes_name_file_row_and_field(tmp_path):
    broken = flashrag("nq")
    del broken[1]["golden_answers"]
    write(tmp_path / "nq.jsonl", broken)
    with pytest.raises(DataError, match=r"nq\.jsonl, row 2, field 'answers': missing"):
        load_sets(str(tmp_path))
    write(tmp_path / "nq.jsonl", flashrag("nq"))
    with pytest.raises(DataError, match=r"no set 'popqa' here; found: nq"):
        load_sets(str(tmp_path / "nq.jsonl"), ["popqa"])
    with pytest.raises(ConfigError, match="natural"):
        load_sets(str(tmp_path), ["natural"])
    with pytest.raises(DataError, match="no benchmark in this folder"):
        load_sets(str(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty"))
    with pytest.raises(DataError, match="no such file"):
        load_sets("nothing.jsonl")
    with pytest.raises(DataError, match="hub id"):
        load_sets("nothing")


def test_names_have_many_spellings():
    assert canonical("2Wiki") == canonical("2wikimultihopqa") == "2wikimultihopqa"
    assert canonical("HotpotQA") == canonical("hotpot-qa") == "hotpotqa"
    assert canonical("mine") == "mine"
    assert sum(known.size for known in BENCHMARKS.values()) == 51_713


def many(n=90):
    kinds = ["bridge"] * 60 + ["comparison"] * 30
    questions = [Question(str(i), "q", ("x",), "s", "test", kind=kinds[i]) for i in range(n)]
    return whole_set("s", questions, "here")


def test_samples_are_nested_and_do_not_depend_on_the_order_of_the_file():
    whole = many()
    few, more = sample(whole, 10, seed=3), sample(whole, 30, seed=3)
    names = [question.id for question in few.questions]
    assert len(names) == 10 and set(names) < {question.id for question in more.questions}
    assert names == sorted(names, key=int)  # in the old order
    turned = whole_set("s", whole.questions[::-1], "here")
    assert {q.id for q in sample(turned, 10, seed=3).questions} == set(names)
    assert {q.id for q in sample(whole, 10, seed=4).questions} != set(names)
    assert sample(whole, 0) is whole and sample(whole, 90) is whole
    assert few.digest == whole.digest and few.whole == 90


def test_a_stratified_sample_keeps_the_shares():
    chosen = sample(many(), 10, stratify=True)
    kinds = [question.kind for question in chosen.questions]
    assert (kinds.count("bridge"), kinds.count("comparison")) == (7, 3)
    assert chosen.strata == {"bridge/0": 60, "comparison/0": 30}
    assert chosen.stratum(chosen.questions[0]) == stratum(chosen.questions[0])


def test_a_hub_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[hub\]'"):
        load_sets("owner/name")


def test_hub_layouts(tmp_path, monkeypatch):
    """Both hub layouts, as local repositories that `datasets` itself reads."""
    pytest.importorskip("datasets", reason="needs the extra [hub]")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "owner" / "flash" / "nq" / "test.jsonl", flashrag("nq"))
    write(tmp_path / "owner" / "flash" / "hotpotqa" / "dev.jsonl", flashrag("hotpotqa"))
    card = "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n  - split: {split}\n    path: {name}/{split}.jsonl\n"
        for name, split in (("nq", "test"), ("hotpotqa", "dev"))
    )
    (tmp_path / "owner" / "flash" / "README.md").write_text(card + "---\n")
    rows = [search_r1(source, i) for source in ("popqa", "nq") for i in range(2)]
    (tmp_path / "owner" / "r1").mkdir()
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "owner" / "r1" / "test.parquet")
    from rexrag.data import qa_sets as benchmarks

    found = list(benchmarks._from_hub("owner/flash", []))
    assert [(one.name, one.split, len(one.questions)) for one in found] == [
        ("nq", "test", 3),
        ("hotpotqa", "dev", 3),
    ]
    assert [one.name for one in benchmarks._from_hub("owner/r1", [])] == ["nq", "popqa"]
    with pytest.raises(DataError, match=r"owner/none: not readable from the hub"):
        list(benchmarks._from_hub("owner/none", []))

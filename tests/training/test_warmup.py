"""`rexrag warmup` on the embedded checkpoint: a file of one's own, and the policy's own right rollouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rexrag.agent.codec import load_codec
from rexrag.agent.protocols.tags import extract_answer
from rexrag.agent.reward import exact_match
from rexrag.config import presets
from rexrag.config.schema import Config, PolicyConfig
from rexrag.engine.loading import load_policy, resolve
from rexrag.errors import ConfigError, DataError, RexragError
from rexrag.training.components import load_data
from rexrag.training.rejection_sampling import RejectionSampling
from rexrag.training.warmup import RECORD, ROWS, warm_up, warm_up_on_file, warm_up_on_rollouts

SMALL = RejectionSampling(questions=6, rollouts=3)


def config(*changes: str) -> Config:
    small = ["policy.path=tiny-easy", "policy.device=cpu", "data.world_questions=20"]
    small += ["data.world_people=40", "data.dev_limit=1", "train.threads=1", "warmup.lr=0.001"]
    return presets.resolve("quickstart", "", [*small, *changes])


def weights(folder: str | Path) -> dict:
    return load_file(Path(folder) / "model.safetensors")


def moved(folder: Path) -> bool:
    before = weights(resolve("tiny-easy"))
    return any((before[name].float() != tensor).any() for name, tensor in weights(folder).items())


def written(tmp_path: Path, *rows: dict) -> Path:
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_own_demonstrations_train_and_bad_rows_are_named_and_counted(tmp_path) -> None:
    trace = "<think> i should look </think> <search> right one </search><information>Doc 1(Title: a) b"
    good = {"question": "who ?", "trace": f"{trace}</information><answer> right one </answer>"}
    messages = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "right one"}]
    file = written(tmp_path, good, {"question": "who ?"}, {"messages": messages}, {"trace": "x"})
    facts, refused = warm_up_on_file(
        config("data.train=no.jsonl", "data.corpus=no.jsonl"), tmp_path / "m", file
    )
    assert facts["demonstrations"] == 2 and facts["refused"] == 2 == len(refused)
    assert [line.split(", field")[0] for line in refused] == [f"{file}, row 2", f"{file}, row 4"]
    assert json.loads((tmp_path / "m" / RECORD).read_text())["demonstrations"] == 2
    assert moved(tmp_path / "m") and load_codec(tmp_path / "m").eos_ids


def test_a_policy_is_trained_on_its_own_right_rollouts(tmp_path) -> None:
    facts = warm_up_on_rollouts(config(), tmp_path / "one", RejectionSampling(2, 6, 3))
    assert [row["round"] for row in facts["rounds"]] == [1, 2]
    for row in facts["rounds"]:
        assert row["questions"] == 6 and row["rollouts"] == 18
        assert 0 < row["demonstrations"] <= 12 and 0 < row["right"] < 1
    rows = [json.loads(line) for line in (tmp_path / "one" / ROWS).read_text().splitlines()]
    assert [row["round"] for row in rows] == sorted(row["round"] for row in rows)
    assert len(rows) == sum(row["demonstrations"] for row in facts["rounds"])
    gold = {question.text: question.answers for question in load_data(config().data).train}
    assert all(exact_match(extract_answer(row["trace"]), gold[row["question"]]) == 1.0 for row in rows)
    warm_up_on_rollouts(config(), tmp_path / "two", RejectionSampling(2, 6, 3))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all((one[name] == two[name]).all() for name in one), "the same seed gives the same weights"
    policy = load_policy(PolicyConfig(path=str(tmp_path / "one"), device="cpu"))
    assert moved(tmp_path / "one") and policy.codec.eos_ids
    # What was trained on is a file of demonstrations.
    again, refused = warm_up_on_file(config(), tmp_path / "again", tmp_path / "one" / ROWS)
    assert refused == [] and again["demonstrations"] == len(rows)


def test_the_next_round_samples_what_the_last_one_trained_in_another_precision(tmp_path, monkeypatch) -> None:
    from rexrag.training import warmup

    seen = []
    draw = warmup.draw_demonstrations

    def watched(policy, *arguments):
        seen.append({name: p.clone() for name, p in policy.model.named_parameters()})
        return draw(policy, *arguments)

    monkeypatch.setattr(warmup, "draw_demonstrations", watched)
    changes = ("policy.precision=bfloat16", "policy.train_last_layers=2")
    warm_up_on_rollouts(config(*changes), tmp_path / "m", RejectionSampling(2, 6, 3))
    changed = {name for name in seen[0] if (seen[0][name] != seen[1][name]).any()}
    assert changed and not any("embed" in name for name in changed)


def test_a_policy_that_is_never_right_has_nothing_to_train_on(tmp_path) -> None:
    questions = [{"question": f"who {i} ?", "answers": ["nobody"]} for i in range(3)]
    train = written(tmp_path, *questions)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"title": "a", "text": "b"}) + "\n")
    own = config(f"data.train={train}", f"data.corpus={tmp_path}/corpus.jsonl", "data.dev=missing.jsonl")
    expected = (
        r"round 1: none of 9 rollouts of 3 questions was right, \d+% gave no answer: no row to train on; try"
    )
    with pytest.raises(DataError, match=expected):
        warm_up_on_rollouts(own, tmp_path / "m", SMALL)
    assert not (tmp_path / "m").exists()


def test_the_rule_says_what_it_was_made_for_where_it_finds_nothing(tmp_path) -> None:
    with pytest.raises(DataError, match=r"made for questions of 2WikiMultihopQA, finds no .*--from-rollouts"):
        warm_up(config(), tmp_path / "m")


def test_demonstrations_in_tags_are_refused_for_another_protocol(tmp_path) -> None:
    other = config("agent.protocol=my_package.protocols:Bracketed")
    with pytest.raises(
        ConfigError, match=r"agent\.protocol = 'my_package.protocols:Bracketed': demonstrations"
    ):
        warm_up_on_file(other, tmp_path / "m", tmp_path / "own.jsonl")


@pytest.mark.parametrize("way", [warm_up, warm_up_on_file, warm_up_on_rollouts])
def test_a_folder_that_is_not_empty_is_refused_before_any_work(tmp_path, way) -> None:
    (tmp_path / "own.jsonl").write_text("x")
    more = {warm_up_on_file: (tmp_path / "own.jsonl",), warm_up_on_rollouts: (SMALL,)}.get(way, ())
    with pytest.raises(ConfigError, match="exists and is not empty"):
        way(config("policy.path=missing"), tmp_path, *more)
    with pytest.raises(RexragError):
        way(config("policy.path=./missing"), tmp_path / "m", *more)
    assert not (tmp_path / "m").exists()

"""verl's real trainer on two CPU ranks: FSDP2 over gloo, a reference model, the embedded world over HTTP."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from rexrag.config.files import load_config
from rexrag.config.schema import PolicyConfig
from rexrag.engine.loading import load_policy, resolve
from rexrag.errors import CheckpointError
from tests.support.verl.runs import SMALL
from tests.verl.conftest import needs_verl

pytestmark = [pytest.mark.verl, needs_verl, pytest.mark.filterwarnings("ignore")]


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_steps_with_probes(run):
    steps = rows(run / "metrics.jsonl")
    assert [row["step"] for row in steps] == [1, 2]
    base = SMALL["train.questions"] * SMALL["algorithm.rollouts"]
    for row in steps:
        assert row["probes/drawn"] > row["probes/kept"] > 0, "every dead end is probed, a share is kept"
        assert row["rows"] == base + row["probes/kept"]
        assert row["alpha"] == pytest.approx(row["probes/kept"] / row["rows"])
        assert row["tokens/evidence"] > 0, "searches were answered"
        assert all(math.isfinite(value) for value in row.values()), row
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6) and steps[1]["kl"] > 1e-4, "the reference stays"


def test_exact_match_before_and_after(run):
    before, after = rows(run / "eval.jsonl")
    assert (before["step"], after["step"]) == (0, 2)
    for row in (before, after):
        assert row["em"]["n"] == SMALL["data.dev_limit"] == len(row["em_by_question"])
        assert set(row["em_by_question"]) <= {0.0, 1.0}
        assert row["tokens"] > 0 and 0 <= row["unanswered"] <= 1
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["em_after"]["value"] == after["em"]["value"]


def test_one_update_a_step_however_many_probes(run):
    """The optimizer itself counts; one row too many must not become one more update."""
    for step in (1, 2):
        actor = run / "checkpoints" / f"global_step_{step}" / "actor"
        state = torch.load(actor / "optim_world_size_2_rank_0.pt", weights_only=False)["state"]
        assert {int(entry["step"]) for entry in state.values()} == {step}


def test_the_weights_moved_and_load_as_a_model(run, tmp_path, monkeypatch):
    from rexrag.verl.export import export

    facts = export(run, tmp_path / "model")
    assert facts["from"].endswith("global_step_2/actor/huggingface")
    moved = load_file(tmp_path / "model" / "model.safetensors")
    start = load_file(f"{resolve('tiny-hard')}/model.safetensors")
    gaps = {name: (moved[name].float() - start[name].float()).abs().max() for name in start if name in moved}
    assert len(gaps) >= len(start) - 1 and 1e-5 < max(gaps.values()) < 1e-2
    policy = load_policy(PolicyConfig(path=str(tmp_path / "model"), device="cpu"))
    assert policy.codec.encode("who") and torch.isfinite(policy.score([([2, 3], [4, 5])], 1.0)[0]).all()


def test_resume_goes_on_where_it_stopped(run, resumed):
    before, after = rows(run / "metrics.jsonl"), rows(resumed / "metrics.jsonl")
    assert after[:2] == before, "what was logged stays"
    third = after[2]
    assert third["step"] == 3 and third["rollouts"] > before[1]["rollouts"]
    assert third["probes/kept"] > 0 and math.isfinite(third["loss"])
    actor = resumed / "checkpoints" / "global_step_3" / "actor"
    state = torch.load(actor / "optim_world_size_2_rank_1.pt", weights_only=False)["state"]
    assert {int(entry["step"]) for entry in state.values()} == {3}
    assert [row["step"] for row in rows(resumed / "eval.jsonl")] == [0, 2, 3]


def test_a_resume_with_other_data_is_refused(run):
    from rexrag.verl.launch import check_checkpoint

    state = json.loads((run / "checkpoints" / "global_step_2" / "rexrag.json").read_text())
    check_checkpoint(run / "checkpoints", state["digests"])
    with pytest.raises(CheckpointError, match="'train' has changed"):
        check_checkpoint(run / "checkpoints", state["digests"] | {"train": "another"})


def test_the_run_folder_is_like_any_other(run):
    assert load_config(run / "config.toml").engine == "verl"
    assert (run / "report.html").stat().st_size > 1000
    assert json.loads((run / "environment.json").read_text())["cues"] != "none"


def test_an_evaluation_inside_verl_is_an_evaluation(tmp_path):
    """verl hands back figures by name, in the order in which rollouts ended."""
    from rexrag.training.loop import Progress
    from rexrag.training.validation import figures, numbers, scored
    from rexrag.types import Question
    from rexrag.verl.trainer import RexragTrainer

    answers = ("oslo", None, "rome")
    rows = [
        scored(Question(str(i), "where", ("oslo",), hops=i + 1), a, i, 10, 0) for i, a in enumerate(answers)
    ]
    ended = [2, 0, 1]
    infos = {name: [numbers(rows[i])[name] for i in ended] for name in numbers(rows[0])}
    infos |= {"place": [float(i) for i in ended], "acc": [rows[i].em for i in ended], "reward": [0.0] * 3}
    trainer = RexragTrainer.__new__(RexragTrainer)
    trainer.folder, trainer.progress, trainer.val_dataset = tmp_path, Progress(step=4), rows
    known = trainer._val_metrics_update(["world"] * 3, ["a", "b", "c"], infos, [1, 2, 3])
    assert known["val-core/world/acc/mean@1"] == pytest.approx(1 / 3)
    (row,) = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert row["step"] == 4 and row["em_by_question"] == [1.0, 0.0, 0.0]
    assert {name: row[name] for name in figures(rows)} == json.loads(json.dumps(figures(rows)))

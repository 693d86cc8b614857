"""Comparisons: plans that are refused, pairs, resuming, and statistics with known answers."""

import json
import math
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from rexrag.errors import ConfigError, RunFolderError
from rexrag.experiments import runner as experiment
from rexrag.stats import area, interval, paired_p
from rexrag.training.run_folder import has_checkpoint, held

ARMS = ["grpo", "rex-rag", "rex-rag-context-distillation"]


def make(arms=ARMS, seeds=(1, 2, 3, 4), budget="tokens", amount=1000, overrides=()):
    return experiment.plan(None, arms, list(seeds), budget, amount, list(overrides))


def pretend(em_of):
    """A `_run_one` that writes the run folder a real run would, EM by (arm, seed)."""
    calls = []

    def run_one(config, folder, going):
        calls.append((config.label, config.seed))
        folder.mkdir(parents=True, exist_ok=True)
        em = em_of(config.label, config.seed)
        lines = []
        for spent, value in ((0, 0.4), (500, (0.4 + em) / 2), (1040, em)):
            row = dict.fromkeys(("step", "generated_tokens", "spent_tokens", "rollouts", "seconds"), spent)
            row |= {"em": interval([value] * 3), "by_hops": {"1": interval([value / 2] * 3)}}
            lines.append(json.dumps(row | {"set": "held-out"}))
            lines.append(json.dumps(row | {"set": "fresh", "em": interval([value / 4] * 3)}))
        steps = [
            {"ess": 0.5, "probes/drawn": 4.0, "probes/right": 1.0, "probes/kept": 2.0,
             "gradient/base": 1.0, "kl_to_start": 0.0},
            {"ess": 1.0, "probes/drawn": 6.0, "probes/right": 4.0, "probes/kept": 2.0},
            {"ess": 0.75, "gradient/base": 0.6, "gradient/suffix": 0.4, "kl_to_start": 0.3},
        ]  # fmt: skip
        steps = [{"step": i, **step} for i, step in enumerate(steps, 1)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
        (folder / "eval.jsonl").write_text("\n".join(lines))
        (folder / "summary.json").write_text(
            json.dumps({"steps": 1040, "seconds": 1.0, "em_after": {"value": em}})
        )

    return run_one, calls


def test_every_run_has_the_same_budget_and_a_seed_is_one_world_in_every_arm():
    work = make(budget="time", amount=2.5)
    assert len(work.configs) == 12
    for (arm, seed), config in work.configs.items():
        assert (config.label, config.seed, config.train.max_seconds, config.train.threads) == (
            arm,
            seed,
            2.5,
            1,
        )
        assert (config.train.max_generated, config.train.max_tokens, config.train.max_rollouts) == (0, 0, 0)
        assert config.train.control == "" and config.data == work.configs["grpo", seed].data
    assert work.configs["grpo", 1].data.world_seed != work.configs["grpo", 2].data.world_seed


def test_arms_are_compared_in_pairs(tmp_path, monkeypatch):
    gain = {"grpo": 0.0, "rex-rag": -0.1, "rex-rag-context-distillation": 0.08}
    run_one, _ = pretend(lambda arm, seed: 0.5 + 0.05 * seed + gain[arm] + 0.001 * (seed % 2))
    monkeypatch.setattr(experiment, "_run_one", run_one)
    result = experiment.run(make(), tmp_path)
    better, worse = result["arms"]["rex-rag-context-distillation"], result["arms"]["rex-rag"]
    assert better["em_difference"]["value"] == pytest.approx(0.08)
    assert better["em_difference"]["low"] > 0 > worse["em_difference"]["high"]
    assert better["em_difference"]["p"] == pytest.approx(2 / 16)  # four pairs: 2 of 2⁴ signs are as extreme
    assert "em_difference" not in result["arms"]["grpo"]
    assert result["arms"]["grpo"]["em"]["value"] == pytest.approx(0.5 + 0.05 * 2.5 + 0.0005)
    assert better["em_half"]["value"] == pytest.approx((0.4 + 0.7055) / 2)
    assert better["em_fresh_difference"]["value"] == pytest.approx(0.02)
    assert better["em_1_hop_difference"]["value"] == pytest.approx(0.04)
    assert better["curve"][0] == (0.0, pytest.approx(0.4)) and better["curve"][-1] == (
        1040.0,
        pytest.approx(0.7055),
    )
    # At 1000, between the evaluations at 500 and 1040.
    assert better["em_at_budget"]["value"] == pytest.approx(0.7055 - 40 / 540 * (0.7055 - 0.55275))
    assert better["diagnostics"] == pytest.approx(
        {
            "ess": 0.75,
            "probes/success": 5 / 10,
            "probes/kept_share": 4 / 10,
            "gradient/base": 0.8,
            "gradient/suffix": 0.2,
            "kl_to_start": 0.3,
        }
    )
    assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(result))


def test_a_killed_comparison_goes_on_where_it_stood(tmp_path, monkeypatch):
    run_one, calls = pretend(lambda arm, seed: 0.5)

    def dies(config, folder, going):
        if (config.label, config.seed) == ("rex-rag", 2):
            raise RunFolderError("killed")
        run_one(config, folder, going)

    monkeypatch.setattr(experiment, "_run_one", dies)
    with pytest.raises(RunFolderError, match="killed"):
        experiment.run(make(), tmp_path, jobs=1)
    before = list(calls)
    assert before[:3] == [(arm, 1) for arm in ARMS]
    monkeypatch.setattr(experiment, "_run_one", run_one)
    experiment.run(make(), tmp_path, jobs=1)
    assert sorted(calls) == sorted((a, s) for a in ARMS for s in (1, 2, 3, 4))


def test_arms_and_seeds_can_be_added_but_settings_cannot_change(tmp_path, monkeypatch):
    run_one, calls = pretend(lambda arm, seed: 0.5)
    monkeypatch.setattr(experiment, "_run_one", run_one)
    experiment.run(make(ARMS[:2], seeds=(1, 2)), tmp_path)
    experiment.run(make(ARMS, seeds=(1, 2, 3)), tmp_path)
    assert len(calls) == 9
    with pytest.raises(RunFolderError, match="other settings"):
        experiment.run(make(ARMS, seeds=(1,), overrides=["learner.lr=0.5"]), tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"arms": ["grpo", "rex-rga"]},
            "algorithm 'rex-rga': there is no such algorithm or ablation; did you mean 'rex-rag'",
        ),
        ({"seeds": ()}, "at least one seed"),
        ({"amount": 0}, "expected a budget above 0"),
        ({"amount": 1e30}, "at most 1e"),
        ({"amount": 100}, "one step of arm 'grpo' draws 160 rollouts; expected a budget of at least 160"),
        ({"arms": ["grpo", "grpo"]}, "different names"),
    ],
)
def test_bad_input_is_one_line(change, says):
    with pytest.raises(ConfigError, match=says):
        make(**change)


@pytest.mark.parametrize(("section", "change"), [("data", "dev_limit = 5"), ("retriever", "topk = 5")])
def test_an_arm_that_changes_the_data_is_refused(section, change, tmp_path):
    (tmp_path / "cheat.toml").write_text(f"[{section}]\n{change}\n")
    with pytest.raises(ConfigError, match=f"arm 'cheat' changes \\[{section}\\]"):
        make(["grpo", str(tmp_path / "cheat.toml")])


@pytest.mark.parametrize("plan", ["{", "[]", '{"arms": []}'])
def test_a_folder_with_something_else_is_refused(plan, tmp_path):
    (tmp_path / "plan.json").write_text(plan)
    with pytest.raises(RunFolderError, match="not the plan of a comparison"):
        experiment.run(make(), tmp_path)


def test_a_run_that_lacks_its_start_or_end_is_not_compared(tmp_path, monkeypatch):
    run_one, _ = pretend(lambda arm, seed: 0.5)
    monkeypatch.setattr(experiment, "_run_one", run_one)
    experiment.run(make(), tmp_path)
    evaluations = tmp_path / "rex-rag" / "seed-2" / "eval.jsonl"
    evaluations.write_text("".join(evaluations.read_text().splitlines(keepends=True)[2:]))
    with pytest.raises(RunFolderError, match=r"rex-rag/seed-2: eval\.jsonl lacks step 0 or the last step"):
        experiment.run(make(), tmp_path)


TINY = ("train.questions=2", "algorithm.rollouts=2", "data.world_people=24", "data.world_questions=30",
        "data.dev_limit=4", "train.save_every=1", "policy.device=cpu")  # fmt: skip


PATIENCE = 600
"""Seconds; a loaded machine is slow."""


@contextmanager
def comparing(out):
    """`rexrag compare` in a process of its own, and its command; once its first run has made a step."""
    options = [word for change in TINY for word in ("--set", change)]
    command = [sys.executable, "-m", "rexrag", "compare", "--arms", "grpo", "--seeds", "1", "--jobs", "1"]
    command += ["--amount", "3000", "--evals", "2", "--out", str(out), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + PATIENCE
    try:
        while not (out / "grpo" / "seed-1" / "metrics.jsonl").is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        yield process, command
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_a_comparison_that_is_terminated_ends_its_runs_and_goes_on(tmp_path):
    folder = tmp_path / "grpo" / "seed-1"
    with comparing(tmp_path) as (process, command):
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, said
    assert has_checkpoint(folder) and not (folder / "summary.json").exists()
    with held(folder):
        pass  # nobody writes there any more
    assert subprocess.run(command, capture_output=True, timeout=PATIENCE).returncode == 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_that_outlived_its_comparison_is_left_alone(tmp_path):
    folder = tmp_path / "grpo" / "seed-1"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("its row")
    work = make(["grpo"], seeds=(1,))
    with held(folder), pytest.raises(RunFolderError, match="another process is training there"):
        experiment.run(work, tmp_path)
    assert (folder / "metrics.jsonl").read_text() == "its row"
    (folder / "checkpoints" / "step-1").mkdir(parents=True)
    with held(folder), pytest.raises(RunFolderError, match="another process is training there"):
        experiment.run(work, tmp_path)


def test_an_arm_from_a_file_is_called_by_its_name_and_runs_inside_the_folder(tmp_path, monkeypatch):
    own = tmp_path / "elsewhere" / "mine.toml"
    own.parent.mkdir()
    own.write_text('[algorithm]\nname = "grpo"\nrollouts = 7\n')
    run_one, calls = pretend(lambda arm, seed: 0.5)
    monkeypatch.setattr(experiment, "_run_one", run_one)
    work = make(["grpo", str(own)], seeds=(1,))
    result = experiment.run(work, tmp_path / "out")
    assert set(result["arms"]) == {"grpo", "mine"} and ("mine", 1) in calls
    assert work.configs["mine", 1].algorithm.rollouts == 7
    assert [p.name for p in own.parent.iterdir()] == ["mine.toml"]


def test_interval_of_a_known_distribution():
    got = interval([0.0, 1.0] * 200)
    assert got["value"] == 0.5 and got["n"] == 400
    assert got["low"] == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert got["high"] == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)
    assert interval([0.3, 0.3, 0.3]) == {"value": pytest.approx(0.3), "low": pytest.approx(0.3),
                                         "high": pytest.approx(0.3), "n": 3}  # fmt: skip
    assert interval([])["n"] == 0


def test_paired_p_is_fisher_s_exact_one():
    assert paired_p([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    assert paired_p([1.0, -1.0]) == 1.0
    assert paired_p([0.0, 0.0, 0.0]) == 1.0 and paired_p([0.4]) == 1.0


def test_area_is_the_mean_height_up_to_the_budget():
    assert area([0, 50, 100], [0.2, 0.2, 0.2], 100) == pytest.approx(0.2)
    assert area([0, 100], [0.0, 1.0], 100) == pytest.approx(0.5)
    assert area([0, 200], [0.0, 1.0], 100) == pytest.approx(0.25)
    assert not math.isnan(area([0], [0.4], 10))

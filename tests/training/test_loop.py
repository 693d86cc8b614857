"""The loop with a scripted policy in milliseconds; resume, damage and the run folder with the real engine."""

import json
import shutil
import signal

import pytest
import torch
import zstandard

from rexrag.config import presets
from rexrag.config.files import load_config, parse_config
from rexrag.errors import CheckpointError, DataError, RunFolderError, TrainingError
from rexrag.io import sha256_file, write_json
from rexrag.method import CueTrie
from rexrag.plugins import give
from rexrag.training import loop
from rexrag.training.components import Components, Data
from rexrag.training.loop import questions_of, step_seed, train
from rexrag.training.run_folder import clear_unsaved, free_folder, has_checkpoint, held, last_checkpoint
from rexrag.training.step import StepContext
from rexrag.types import Question
from tests.support.fakes import CharCodec, FakeRetriever, ScriptedPolicy

CODEC = CharCodec()
TRIE = CueTrie([CODEC.encode("<think> wait")])


class CountingLearner:
    """Counts updates; its weights are one number."""

    def __init__(self):
        self.updates = 0
        self.seen = []

    def update(self, samples, algorithm, temperature):
        self.updates += 1
        self.seen.append(len(samples))
        return {"loss": 0.0, "grad_norm": float("nan")}

    def save(self, folder):
        (folder / "weights.json").write_text(str(self.updates))

    def load(self, folder):
        self.updates = int((folder / "weights.json").read_text())


def scripted(question, turn, attempt):
    return "<think>x</think><answer>right</answer>" if attempt % 2 else "<answer>wrong</answer>"


def fake_components(learner=None, cues=TRIE):
    questions = [Question(str(i), f"Q{i}", ("right",)) for i in range(6)]
    policy = ScriptedPolicy(scripted)
    return Components(
        StepContext(policy, FakeRetriever(), cues, policy),
        learner or CountingLearner(),
        Data(questions, questions[:3], []),
    )


def config(*overrides):
    base = [
        "train.questions=2",
        "train.steps=4",
        "policy.precision=float32",
        "algorithm.name=rex-rag",
        "algorithm.rollouts=2",
        "algorithm.filter=none",
        "algorithm.allow_large_alpha=true",
        "train.save_every=2",
    ]
    return parse_config({}, [*base, "agent.template=terse", *overrides])


@pytest.fixture
def fake(monkeypatch):
    made = []

    def build(_):
        made.append(fake_components())
        return made[-1]

    monkeypatch.setattr(loop, "build", build)
    return made


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_leaves_everything_a_report_needs(tmp_path, fake):
    folder = tmp_path / "run"
    summary = train(config("train.evals=2"), folder)
    assert [r["step"] for r in rows(folder / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [r["step"] for r in rows(folder / "eval.jsonl")] == [0, 2, 4]
    assert rows(folder / "metrics.jsonl")[0]["grad_norm"] is None
    assert {"em_before", "em_after", "generated_tokens", "seconds", "arm", "seed"} <= set(summary)
    assert set(summary["em_after"]) == {"value", "low", "high", "n"}
    assert json.loads((folder / "summary.json").read_text()) == summary
    for name in ("config.toml", "environment.json", "rollouts.jsonl.zst", "checkpoints/step-4/digests.json"):
        assert (folder / name).stat().st_size > 0
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert fake[0].learner.updates == 4


@pytest.mark.parametrize(
    "limit, spent", [("max_generated", "generated_tokens"), ("max_tokens", "spent_tokens")]
)
def test_a_token_budget_stops_the_run(tmp_path, fake, limit, spent):
    summary = train(config("train.steps=1000", f"train.{limit}=300"), tmp_path / "run")
    steps = rows(tmp_path / "run" / "metrics.jsonl")
    assert steps[-1][spent] >= 300 > steps[-2][spent]
    assert summary[spent] == steps[-1][spent]
    assert summary["spent_tokens"] == summary["generated_tokens"] + summary["prefilled_tokens"]


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_saves_and_can_be_resumed(which, tmp_path, fake, monkeypatch):
    whole = train(config(), tmp_path / "whole")
    collect = loop.collect

    def interrupting(*args, **kwargs):
        log = tmp_path / "cut" / "metrics.jsonl"
        if log.exists() and len(rows(log)) == 2:
            signal.raise_signal(which)
        return collect(*args, **kwargs)

    monkeypatch.setattr(loop, "collect", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path / "cut")
    assert [r["step"] for r in rows(tmp_path / "cut" / "metrics.jsonl")] == [1, 2, 3]
    monkeypatch.setattr(loop, "collect", collect)
    resumed = train(config(), tmp_path / "cut", resume=True)
    for figure in ("steps", "generated_tokens", "prefilled_tokens"):
        assert resumed[figure] == whole[figure]
    assert [r["step"] for r in rows(tmp_path / "cut" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_resume_with_other_settings_says_so_and_keeps_the_old_ones(tmp_path, fake):
    folder = tmp_path / "run"
    train(config("train.steps=2"), folder)
    train(config("train.steps=2"), folder, resume=True)
    assert not list(folder.glob("config-to-step-*"))
    train(config("train.steps=4", "learner.lr=1e-5"), folder, resume=True)
    assert load_config(folder / "config.toml") == config("train.steps=4", "learner.lr=1e-5")
    assert load_config(folder / "config-to-step-2.toml") == config("train.steps=2")


def test_fewer_dead_ends_are_probed_once_probes_fail(tmp_path, fake):
    """Half of the scripted probes are right: with a target of one, p falls towards a half."""
    settings = ["train.steps=60", "algorithm.probe_probability=1.0", "train.log_rollouts=0", "train.evals=0"]
    drawn = {}
    for target in (0.0, 0.4, 1.0):
        train(config(*settings, f"algorithm.probe_target={target}"), tmp_path / f"{target}")
        drawn[target] = [row["probes/drawn"] for row in rows(tmp_path / f"{target}" / "metrics.jsonl")]
    assert drawn[0.0] == drawn[0.4] and min(drawn[0.0]) == max(drawn[0.0]) > 0
    assert drawn[1.0][0] == drawn[0.0][0]
    assert 0.3 < sum(drawn[1.0][30:]) / sum(drawn[0.0][30:]) < 0.7


def test_a_checkpoint_of_another_version_is_named(tmp_path, fake):
    train(config("train.steps=2"), tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step-2"
    state = json.loads((folder / "state.json").read_text())
    del state["probe_success"]
    write_json(folder / "state.json", state)
    digests = json.loads((folder / "digests.json").read_text())
    write_json(folder / "digests.json", digests | {"state.json": sha256_file(folder / "state.json")})
    with pytest.raises(CheckpointError, match="no 'probe_success': made by another version"):
        train(config(), tmp_path / "run", resume=True)


OLD = """
name = "run"
arm = "rex-rag"

[policy]
path = "embedded"

[agent]
template = "terse"
format_reward = 0.0

[method]
rollouts = 2
probe = true
dead_ends = ["wrong"]
probe_forced_turn = false
cues = "default"
filter = "none"
keep = "fixed"
keep_floor = 0.02
keep_momentum = 0.1
realignment = "paper"
tail = "one"
tail_cap = 1.0
allow_large_alpha = true

[train]
questions = 2
steps = 2
save_every = 2

[verl]
gpu_tflops = 989.0
gpu_bandwidth = 3350.0
"""
"""What 0.1.0 wrote for `config("train.steps=2")`."""


def test_a_run_of_0_1_0_goes_on_and_keeps_its_settings(tmp_path, fake):
    folder = tmp_path / "run"
    whole = train(config(), tmp_path / "whole")
    train(config("train.steps=2"), folder)
    (folder / "config.toml").write_text(OLD)
    checkpoint = folder / "checkpoints" / "step-2"
    state = json.loads((checkpoint / "state.json").read_text())
    write_json(checkpoint / "state.json", state | {"probe_accuracy": 0.5})
    digests = json.loads((checkpoint / "digests.json").read_text())
    write_json(checkpoint / "digests.json", digests | {"state.json": sha256_file(checkpoint / "state.json")})
    assert presets.resolve(folder / "config.toml") == config("train.steps=2")
    resumed = train(presets.resolve(folder / "config.toml", overrides=["train.steps=4"]), folder, resume=True)
    assert resumed["steps"] == 4 and resumed["generated_tokens"] == whole["generated_tokens"]
    assert load_config(folder / "config.toml") == config()
    assert load_config(folder / "config-to-step-2.toml") == config("train.steps=2")


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path, fake):
    folder = tmp_path / "run"
    train(config(), folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "summary.json").unlink()
    (folder / "tensorboard").mkdir()
    (folder / "checkpoints" / ".step-2.77-ab.tmp").mkdir(parents=True)
    (folder / "page.html").write_text("mine")
    assert not has_checkpoint(folder), "a save that a kill cut off is none"
    (folder / "checkpoints" / "mine.pt").write_text("not a run's")
    clear_unsaved(folder)
    assert {path.name for path in folder.iterdir()} == {"config.toml", "page.html", "checkpoints"}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["mine.pt"]
    train(config(), folder)
    clear_unsaved(folder)
    assert (folder / "metrics.jsonl").exists() and has_checkpoint(folder)


def test_a_run_that_is_over_is_not_begun_again_where_its_checkpoints_are_gone(tmp_path, fake):
    folder = tmp_path / "run"
    train(config(), folder)
    shutil.rmtree(folder / "checkpoints")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunFolderError, match="this run is over and has no checkpoint"):
        train(config(), folder, restart=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_nothing_goes_before_all_else_is_well(tmp_path, fake, monkeypatch):
    folder = tmp_path / "run"
    train(config(), folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "summary.json").unlink()

    def fails(_):
        raise DataError("no such corpus")

    monkeypatch.setattr(loop, "build", fails)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(DataError):
        train(config(), folder, restart=True)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_held_out_questions_that_are_trained_on_are_said(tmp_path, fake, capsys):
    train(config(), tmp_path / "run")
    assert capsys.readouterr().err == "3 of 3 held-out questions are training questions too: not held out\n"


def test_a_run_folder_has_one_writer(tmp_path, fake):
    folder = tmp_path / "run"
    train(config("train.steps=2"), folder)
    before = (folder / "config.toml").read_text()
    for how in ({"resume": True}, {"restart": True}, {}):
        with held(folder), pytest.raises(RunFolderError, match="another process is training there"):
            train(config(), folder, **how)
        assert (folder / "config.toml").read_text() == before
    train(config(), folder, resume=True)


def test_a_restart_does_not_mind_a_comment_in_its_settings(tmp_path, fake):
    folder = tmp_path / "run"
    train(config(), folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "summary.json").unlink()
    (folder / "config.toml").write_text("# mine\n" + (folder / "config.toml").read_text())
    train(config(), folder, restart=True)
    assert (folder / "summary.json").exists()


def test_a_config_toml_of_ones_own_is_not_written_over(tmp_path, fake):
    for text in ("[train]\nsteps = 3\n", "[tool.other]\nx = 1\n", "a = ="):
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(RunFolderError, match="is not empty"):
            train(config(), tmp_path)
        assert (tmp_path / "config.toml").read_text() == text


def test_what_a_kill_left_of_a_save_goes_with_the_next(tmp_path, fake):
    folder = tmp_path / "run"
    train(config("train.steps=2"), folder)
    (folder / "checkpoints" / ".step-4.77-ab.tmp").mkdir()
    train(config(), folder, resume=True)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_an_interrupt_in_the_last_step_ends_the_run_and_says_so(tmp_path, fake, monkeypatch):
    folder = tmp_path / "run"

    def interrupting(*args):
        signal.raise_signal(signal.SIGINT)
        return save(*args)

    save = loop._save
    monkeypatch.setattr(loop, "_save", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(config("train.steps=2"), folder)
    assert (folder / "summary.json").is_file() and has_checkpoint(folder)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, fake):
    train(config(), tmp_path / "run")
    (tmp_path / "run/checkpoints/step-4/weights.json").write_text("broken")
    assert last_checkpoint(tmp_path / "run")[0].name == "step-2"
    train(config(), tmp_path / "run", resume=True)
    assert [r["step"] for r in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    for step in (2, 4):
        (tmp_path / f"run/checkpoints/step-{step}/weights.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-4 \(weights.json is missing\), step-2"):
        train(config(), tmp_path / "run", resume=True)


def test_a_changed_cue_pool_is_an_error(tmp_path, fake, monkeypatch):
    train(config(), tmp_path / "run")
    other = CueTrie([CODEC.encode("<think> hm")])
    monkeypatch.setattr(loop, "build", lambda _: fake_components(cues=other))
    with pytest.raises(CheckpointError, match="run's 'cues' has changed since this checkpoint"):
        train(config(), tmp_path / "run", resume=True)


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path, fake):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty; pass --resume"):
        train(config(), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
    with pytest.raises(RunFolderError, match="no run to resume"):
        train(config(), tmp_path / "run", resume=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="file"):
        train(config(), tmp_path / "file" / "run")


def test_too_few_questions_are_named_before_anything_is_written(tmp_path, fake):
    with pytest.raises(DataError, match=r"6 training questions, train.questions = 99"):
        train(config("train.questions=99"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_questions_go_round_in_seeded_epochs():
    questions = [Question(str(i), "", ("",)) for i in range(10)]
    seen = [q.id for asked in (0, 4, 8, 12, 16) for q in questions_of(questions, asked, 4, seed=1)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(q.id for q in questions)
    assert seen[:10] != seen[10:]
    assert step_seed(0, 1, "a") != step_seed(0, 1, "b") != step_seed(1, 1, "b")


def test_free_folder_counts_up(tmp_path):
    assert free_folder("a", tmp_path) == tmp_path / "a"
    (tmp_path / "a").mkdir()
    assert free_folder("a", tmp_path) == tmp_path / "a-2"
    assert free_folder("../../out of here", tmp_path) == tmp_path / "out-of-here"
    assert free_folder("..", tmp_path) == tmp_path / "run"


REAL = [
    "train.questions=3",
    "train.steps=4",
    "train.save_every=2",
    "train.control=''",
    "train.max_generated=0",
    "train.threads=1",
    "policy.device=cpu",
    "algorithm.rollouts=3",
    "data.world_people=24",
    "data.world_questions=30",
    "data.dev_limit=6",
]


PROBING = ["algorithm.probe_probability=1.0", "algorithm.filter=none"]
LARGE = "algorithm.allow_large_alpha=true"
FOLLOWING = [*PROBING, "algorithm.probe_target=1.0", "algorithm.keep_per_group=0"]
"""With a p that depends on what earlier steps saw."""


@pytest.mark.parametrize(
    ("arm", "more"),
    [
        ("grpo", []),
        ("rex-rag", [*PROBING, LARGE]),
        ("rex-rag-context-distillation", PROBING),
        ("rex-rag-distill", FOLLOWING),
    ],
)
def test_two_steps_and_two_more_are_four_bit_for_bit(tmp_path, arm, more):
    settings = presets.resolve("quickstart", arm, [*REAL, *more])
    train(settings, tmp_path / "whole")
    short = presets.resolve("quickstart", arm, [*REAL, *more, "train.steps=2"])
    train(short, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-4", ignore_errors=True)
    train(settings, tmp_path / "cut", resume=True)
    for name in ("model.safetensors", "optimizer.safetensors", "learner.json"):
        whole, cut = (tmp_path / f / "checkpoints/step-4" / name for f in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), name
    timeless = [
        [
            {k: v for k, v in r.items() if "time" not in k and k != "seconds"}
            for r in rows(tmp_path / f / "metrics.jsonl")
        ]
        for f in ("whole", "cut")
    ]
    assert timeless[0] == timeless[1]
    assert torch.get_num_threads() == 1


def test_diagnostics_and_a_fresh_world_are_measured_beside_the_budget(tmp_path):
    small = ["policy.path=tiny-hard", "train.questions=6", "algorithm.rollouts=3", "data.dev_limit=12"]
    small += [
        "train.evals=1",
        "data.fresh_questions=10",
        "train.diagnose_every=2",
        "train.steps=3",
        "train.control=''",
    ]
    small += ["algorithm.probe_probability=1.0", "algorithm.keep_ratio=0.5", "train.max_generated=0"]
    config = presets.resolve(None, "rex-rag", [*small, LARGE])
    summary = train(config, tmp_path / "run")
    steps = rows(tmp_path / "run" / "metrics.jsonl")
    assert ["kl_to_start" in step for step in steps] == [True, False, True]
    assert steps[0]["kl_to_start"] == pytest.approx(0.0, abs=1e-6) and steps[2]["kl_to_start"] > 0
    shares = {name: v for name, v in steps[0].items() if name.startswith("gradient/")}
    assert sum(shares.values()) == pytest.approx(1.0) and "gradient/cue" in shares
    evaluated = rows(tmp_path / "run" / "eval.jsonl")
    assert [row["seconds"] for row in evaluated[-2:]] == [summary["seconds"]] * 2, (
        "of the run, not of the evaluation"
    )
    sets = [(row["set"], row["step"], row["em"]["n"]) for row in rows(tmp_path / "run" / "eval.jsonl")]
    assert sets == [("held-out", 0, 12), ("fresh", 0, 10), ("held-out", 3, 12), ("fresh", 3, 10)]
    assert summary["em_fresh_after"]["n"] == 10 and summary["em_after"]["n"] == 12


class DestroyedLearner(CountingLearner):
    """Drops every update."""

    def update(self, samples, algorithm, temperature):
        return super().update(samples, algorithm, temperature) | {
            "updates": 0.0, "nonfinite_updates": 1.0, "lr": 10.0,
        }  # fmt: skip


def test_updates_that_are_not_finite_five_times_in_a_row_end_the_run_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "build", lambda config: fake_components(DestroyedLearner()))
    with pytest.raises(TrainingError, match=r"step 5: 5 updates in a row.*learning rate 10 .*learner\.lr"):
        train(config("train.steps=50"), tmp_path / "run")
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 5
    assert not (tmp_path / "run" / "summary.json").exists()


def longer_is_worse(rollout):
    return -float(len(rollout.tokens))


def takes_every_answer(answer, question):
    return True


@pytest.mark.parametrize("named", [True, False])
def test_a_reward_and_a_judge_of_answers_of_ones_own_reach_logs_and_evaluations(tmp_path, named):
    overrides = [*REAL, "train.steps=1", "train.log_rollouts=99", "algorithm.probe_probability=1.0"]
    here = "tests.training.test_loop"
    reward, judge = f"{here}:longer_is_worse", f"{here}:takes_every_answer"
    if not named:
        reward, judge = give(lambda rollout: longer_is_worse(rollout)), give(takes_every_answer)
    overrides += [f"agent.reward={reward}", f"agent.answer_judge={judge}"]
    train(presets.resolve("quickstart", "rex-rag", overrides), tmp_path / "run")
    with zstandard.open(tmp_path / "run" / "rollouts.jsonl.zst", "rt") as file:
        logged = [json.loads(line) for line in file]
    assert len(logged) == 9 and all(row["reward"] == -len(row["tokens"]) for row in logged)
    assert all(row["correct"] == (row["answer"] is not None) for row in logged)
    (step,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert step["reward/mean"] == pytest.approx(sum(row["reward"] for row in logged) / 9)
    assert step["dead_ends/rate"] == step["probes/drawn"] == 0.0, "no answer is wrong"
    for row in rows(tmp_path / "run" / "eval.jsonl"):
        assert row["correct"]["value"] == pytest.approx(1.0 - row["unanswered"]) != row["em"]["value"]


def gives_up(rollouts, context):
    scores = context.score([(r.prompt, r.tokens) for r in rollouts], 1.0)
    assert [len(score) for score in scores] == [len(r.tokens) for r in rollouts]
    return [1.0] * len(rollouts)


def test_a_judge_of_dead_ends_that_is_named_decides_who_is_probed(tmp_path):
    judge = ["algorithm.dead_ends=judge", "algorithm.dead_end_judge=tests.training.test_loop:gives_up"]
    overrides = [*REAL, *judge, "train.steps=1", "train.evals=0", "algorithm.probe_probability=1.0"]
    train(presets.resolve("quickstart", "rex-rag-distill", overrides), tmp_path / "run")
    (step,) = rows(tmp_path / "run" / "metrics.jsonl")
    assert step["probes/drawn"] == 9.0 and step["dead_ends/rate"] < 1.0

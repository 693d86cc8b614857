"""Bad input for engine = "verl": one line each, before any process starts. The mapping, the dry run."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import rexrag.verl.checks as checks
from rexrag.cli import main
from rexrag.config import presets
from rexrag.config.files import dump_toml, parse_config
from rexrag.config.schema import Config
from rexrag.errors import ConfigError, ModelError
from rexrag.retrieval import check_service
from rexrag.training.components import Data
from rexrag.types import Question, Rollout, StopReason, Turn
from rexrag.verl import cost
from rexrag.verl.checks import (
    check_attention,
    check_devices,
    check_installed,
    check_settings,
)
from rexrag.verl.export import checkpoint_folder, export, merge_lora
from rexrag.verl.launch import retriever_service, serving
from rexrag.verl.mapping import TABLE, settings
from rexrag.verl.records import probe_of, question_of, question_row, rollout_of, rollout_record
from rexrag.verl.worker_context import worker_context
from tests.support.fakes import FakeRetriever, document

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("qwen2.5-3b-nq-hotpot", "qwen2.5-7b-nq-hotpot", "qwen2.5-3b-lora-24gb")
BASE = {"engine": "verl", "policy.path": '"Qwen/Qwen2.5-3B"', "algorithm.name": '"rex-rag"'}


def configured(**changes):
    pairs = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    return parse_config({}, [f"{key}={value}" for key, value in pairs.items()])


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["rexrag", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


# -- before any process starts -----------------------------------------------------------------------------


def absent(name):
    raise importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (absent, ["verl, which is not installed", 'pip install -e ".[verl]"']),
        (lambda name: {**checks.PINS, "verl": "0.9.2"}[name], ["verl 0.9.2", "0.9.1", "pip install"]),
        (lambda name: {**checks.PINS, "ray": "2.61.0"}[name], ["ray 2.61.0", "2.60.0"]),
    ],
)
def test_what_is_installed(monkeypatch, found, words):
    monkeypatch.setattr(checks, "version", found)
    with pytest.raises(ConfigError) as caught:
        check_installed()
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_without_verl_train_says_which_command_installs_it(run, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "version", absent)
    code, _, err = run("train", "--set", "engine=verl", "--set", "train.control=", "--out", tmp_path / "run")
    assert code == 2 and len(err.splitlines()) == 1 and 'pip install -e ".[verl]"' in err
    assert not (tmp_path / "run").exists()


def test_the_pins_are_those_of_the_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = " ".join(project["optional-dependencies"]["verl"])
    constraints = (ROOT / "constraints.txt").read_text()
    for name, version in checks.PINS.items():
        assert re.search(rf"{name}(\[\w+\])?=={re.escape(version)}", extra), name
        assert f"{name}=={version}\n" in constraints, name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__questions": 31, "algorithm__rollouts": 5}, ["31 × 5 = 155", "8 GPUs"]),
        ({"train__questions": 8, "learner__minibatches": 3}, ["do not divide", "24"]),
        ({"verl__tensor_parallel": 3}, ["verl.tensor_parallel = 3", "8"]),
        ({"algorithm__rollouts": 1}, ["algorithm.rollouts = 1"]),
        (
            {"algorithm__name": '"rex-rag-distill"', "algorithm__suffix_weight": '"truncated-is"'},
            ["algorithm.suffix_weight", "'clipped'", "engine = 'local'"],
        ),
        ({"train__max_tokens": 1000}, ["train.max_tokens", "train.steps"]),
        ({"train__track": '["wandb"]'}, ["train.track", "verl.loggers"]),
        ({"train__control": '"grpo"'}, ["train.control"]),
        ({"train__diagnose_every": 5}, ["train.diagnose_every"]),
        ({"policy__train_last_layers": 2}, ["policy.train_last_layers"]),
        ({"verl__prompt_tokens": 4096}, ["verl.prompt_tokens = 4096", "agent.total_tokens"]),
        ({"verl__tokens_per_gpu": 1024}, ["verl.tokens_per_gpu = 1024"]),
    ],
)
def test_settings_that_cannot_be_honoured(changes, words):
    with pytest.raises(ConfigError) as caught:
        check_settings(configured(**changes))
    assert all(word in str(caught.value) for word in words), caught.value


def test_fewer_gpus_than_asked():
    check_devices(configured(), 8)
    with pytest.raises(ConfigError, match=r"verl.gpus_per_node = 8, but this machine has 2"):
        check_devices(configured(), 2)


def test_a_gpu_needs_flash_attention_or_another_choice(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    check_attention(configured(), "cpu")
    with pytest.raises(ConfigError, match="flash-attn is not installed") as caught:
        check_attention(configured(), "cuda")
    assert "\n" not in str(caught.value)
    key = "+actor_rollout_ref.model.override_config.attn_implementation"
    tree = {"verl": {"overrides": {key: "sdpa"}}}
    check_attention(parse_config(tree), "cuda")
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    check_attention(configured(), "cuda")


def test_a_retriever_that_does_not_answer():
    remote = configured(retriever__kind='"remote"', retriever__url='"http://127.0.0.1:9"').retriever
    with pytest.raises(ConfigError, match=r"retriever.url = 'http://127.0.0.1:9' does not answer"):
        check_service(remote)
    with serving(FakeRetriever({"test": [document("a")]})) as url:
        check_service(remote.model_copy(update={"url": url}))


def test_other_nodes_need_a_service_of_their_own():
    data = Data([], [], [document("a", "b")])
    with (
        pytest.raises(ConfigError, match=r"rexrag serve"),
        retriever_service(configured(verl__nodes=2), data),
    ):
        pass
    with retriever_service(configured(), data) as (url, digest):
        assert url.startswith("http://127.0.0.1:") and len(digest) == 64


# -- the mapping -------------------------------------------------------------------------------------------


def test_what_the_table_makes_of_our_settings():
    config = presets.resolve("qwen2.5-3b-nq-hotpot")
    known = {key.lstrip("+"): value for key, value in settings(config).items()}
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    assert known["data.train_batch_size"] == 512 and known[f"{rollout}.n"] == 5
    assert known[f"{actor}.optim.lr"] == 1e-6 and known[f"{actor}.optim.lr_warmup_steps"] == 286
    assert (known[f"{actor}.use_kl_loss"], known[f"{actor}.kl_loss_coef"]) == (True, 0.001)
    assert (known["algorithm.adv_estimator"], known["algorithm.norm_adv_by_std_in_grpo"]) == ("grpo", True)
    assert (known[f"{actor}.clip_ratio_low"], known[f"{actor}.clip_ratio_high"]) == (0.2, 0.2)
    assert known["algorithm.rollout_correction"] is None, "never merged with the mixture"
    assert known[f"{actor}.strategy"] == "fsdp2" and known["trainer.v1.trainer_mode"] == "rexrag"
    dapo = settings(presets.resolve("qwen2.5-3b-nq-hotpot", "rex-rag-dapo", ["verl.rollout=sglang"]))
    assert dapo[f"{actor}.clip_ratio_high"] == 0.28 and dapo[f"{actor}.use_kl_loss"] is False
    assert dapo["algorithm.filter_groups.enable"] is True and dapo[f"{rollout}.name"] == "sglang"


def test_what_depends_on_the_server_and_on_the_steps():
    window = "actor_rollout_ref.rollout.max_model_len"
    config = presets.resolve("qwen2.5-3b-nq-hotpot")
    assert settings(config)[window] == config.agent.total_tokens
    sglang = presets.resolve("qwen2.5-3b-nq-hotpot", overrides=["verl.rollout=sglang"])
    assert settings(sglang)[window] == config.agent.total_tokens + 1, "its server keeps a token for itself"
    lora = settings(presets.resolve("qwen2.5-3b-lora-24gb"))
    assert lora["actor_rollout_ref.actor.fsdp_config.model_dtype"] == "fp32"
    for steps, evals in ((1005, 10), (100, 30), (10, 6), (7, 7)):
        every = settings(configured(train__steps=steps, train__evals=evals))["trainer.test_freq"]
        assert len({*range(every, steps + 1, every), steps}) <= evals


def test_advantages_map_or_are_refused():
    rloo = configured(algorithm__advantage_baseline='"leave-one-out"', algorithm__advantage_scale='"none"')
    assert settings(rloo)["algorithm.adv_estimator"] == "rloo"
    with pytest.raises(ConfigError, match="advantage_scale"):
        settings(configured(algorithm__advantage_baseline='"leave-one-out"'))


def test_overrides_win_however_they_are_spelled():
    tree = {"verl": {"overrides": {"trainer": {"save_freq": 7}, "data.seed": "null"}}}
    config = parse_config(
        tree, ["verl.overrides.+a.b=1", "verl.overrides.actor_rollout_ref.actor.shuffle=false"]
    )
    known = settings(config)
    assert known["trainer.save_freq"] == 7 and known["data.seed"] is None and known["+a.b"] == 1
    assert known["actor_rollout_ref.actor.shuffle"] is False
    assert parse_config(tomllib.loads(dump_toml(config))) == config, "a run folder remembers them"


def test_every_entry_of_the_table_reads_a_setting():
    known = Config.model_json_schema()
    for entry in TABLE:
        if entry.ours:
            section, _, name = entry.ours.rpartition(".")
            assert name in json.dumps(known) and (not section or section in known["properties"])


def test_a_worker_has_what_the_configuration_names():
    """The judge too; it cannot ask verl's servers for scores."""
    judge = '"tests.verl.test_checks:gives_up"'
    config = configured(
        policy__path='"tiny-hard"',
        agent__cues='"tiny"',
        retriever__kind='"remote"',
        retriever__url='"http://127.0.0.1:9"',
        algorithm__dead_ends='"judge"',
        algorithm__dead_end_judge=judge,
    )
    context = worker_context(dump_toml(config))
    assert context.config == config and len(context.trie) > 0
    rollout = Rollout(
        Question("7", "who", ("a",)), (1,), (5,), (0,), (-1.0,), (), StopReason.TURNS, None, 0.0
    )
    assert context.judge([rollout, rollout]) == [0.75, 0.75]


def gives_up(rollouts, context):
    assert context.score is None
    return [0.75] * len(rollouts)


# -- the dry run and the cost model ------------------------------------------------------------------------


def test_parameters_of_known_models():
    """The counts on the models' cards: 3.09 B and 7.61 B."""
    assert cost.KNOWN["Qwen2.5-3B"].parameters == pytest.approx(3.09e9, rel=0.01)
    assert cost.KNOWN["Qwen2.5-7B"].parameters == pytest.approx(7.61e9, rel=0.01)
    assert cost.KNOWN["Qwen2.5-7B"].kv_bytes == 57344


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("arm", ["", "rex-rag-dapo", "dapo", "grpo"])
def test_shipped_configurations_fit(run, name, arm, monkeypatch):
    monkeypatch.setattr(checks, "version", absent)
    code, out, err = run("train", name, "--dry-run", "--json", *(["--arm", arm] if arm else []))
    assert code == 0, err
    facts = json.loads(out)
    memory = facts["memory_gib"]
    assert max(memory["= while training"], memory["= while sampling"]) < memory["of"]
    assert any("not checked" in note for note in facts["notes"])


def test_what_cannot_fit_is_refused(run):
    def refused(*changes):
        options = [word for change in changes for word in ("--set", change)]
        code, _, err = run("train", "qwen2.5-7b-nq-hotpot", "--dry-run", *options)
        assert code == 2 and len(err.splitlines()) == 1, err
        return err

    assert "training takes" in refused("verl.gpu_memory=24")
    assert "training takes" in refused("verl.gpus_per_node=1", "verl.tensor_parallel=1")
    assert "rollout engine gets" in refused("verl.rollout_memory=0.05")
    assert "rollouts take" in refused("verl.rollout_memory=0.9")
    assert "shape is not known" in refused('policy.path="someone/unknown"')
    assert "engine = 'verl'" in run("train", "quickstart", "--dry-run")[2]


def test_the_dry_run_is_readable(run, monkeypatch):
    monkeypatch.setattr(checks, "version", absent)
    code, out, _ = run("train", "qwen2.5-3b-nq-hotpot", "--dry-run")
    assert code == 0
    for words in ("actor_rollout_ref.actor.optim.lr", "= while training", "estimated"):
        assert words in out


# -- records and export ------------------------------------------------------------------------------------


def test_questions_and_rollouts_survive_the_journey():
    question = Question("7", "who is it", ("a", "b"), "nq", "train", 2, "bridge")
    row = json.loads(json.dumps(question_row(question, 3, "search-r1")))
    assert question_of(row["extra_info"]) == question and row["extra_info"]["index"] == 3
    turn = Turn(0, 2, "search", "q", 1, None, ("d1",))
    rollout = Rollout(question, (1, 2), (5, 6, 7), (0, 1, 2), (-1.0, -2.0, 0.0), (turn,), StopReason.TURNS,
                      None, 0.5, 0.25, True, "", True)  # fmt: skip
    fork = SimpleNamespace(cut=1, cue=9, cue_length=1)
    record = json.loads(json.dumps(rollout_record(rollout, fork)))
    again = rollout_of(record, rollout.prompt, rollout.tokens, (-1.0, -2.0, -3.0))
    assert again == rollout, "log-probs of inserted evidence are dropped"
    probe = probe_of(record, again, rollout)
    assert (probe.rollout, probe.parent) == (again, rollout)
    assert (probe.cut, probe.cue, probe.cue_length, probe.kept) == (1, 9, 1, False)
    assert rollout_record(rollout, SimpleNamespace(cut=None))["probe"] is None


def test_a_lora_is_merged():
    import torch

    up, down, weight = torch.randn(4, 2), torch.randn(2, 3), torch.randn(4, 3)
    merged = merge_lora(
        {"base_model.model.x.base_layer.weight": weight, "base_model.model.x.lora_A.default.weight": down,
         "base_model.model.x.lora_B.default.weight": up, "base_model.model.norm.weight": weight[0]}, 2.0,
    )  # fmt: skip
    assert set(merged) == {"x.weight", "norm.weight"}
    torch.testing.assert_close(merged["x.weight"], weight + 2.0 * up @ down)


def test_a_save_that_a_kill_cut_off_is_not_exported(tmp_path):
    import torch
    from safetensors.torch import save_file

    def step(number: int, *files: str) -> Path:
        folder = tmp_path / "checkpoints" / f"global_step_{number}" / "actor" / "huggingface"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        for name in files:
            save_file({"x": torch.zeros(1)}, folder / name)
        return folder

    good, late = step(1, "model.safetensors"), step(2, "model.safetensors")
    assert checkpoint_folder(tmp_path) == late
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1")
    assert checkpoint_folder(tmp_path) == good
    index = {"weight_map": {"a": "model.safetensors", "b": "lost.safetensors"}}
    (good / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError):
        checkpoint_folder(tmp_path)


def test_exporting_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        export(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ModelError, match="no checkpoint here"):
        export(tmp_path, tmp_path / "out")
    actor = tmp_path / "checkpoints" / "global_step_1" / "actor"
    (actor / "huggingface").mkdir(parents=True)
    (actor / "model_world_size_2_rank_0.pt").write_bytes(b"")
    with pytest.raises(ModelError, match=r"verl\.model_merger"):
        export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()

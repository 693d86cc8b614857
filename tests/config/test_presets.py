"""Shipped configurations, algorithms and ablations by name."""

import tomllib

import pytest

from rexrag import io
from rexrag.config import presets
from rexrag.config.algorithms import ALGORITHMS, RexRag
from rexrag.config.files import dump_toml, parse_config
from rexrag.errors import ConfigError


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(io, "_SAID", set())


@pytest.mark.parametrize("name", sorted(p.stem for p in presets.FOLDER.glob("*.toml")))
@pytest.mark.parametrize("arm", ["", *presets.arm_names()])
def test_every_shipped_config_and_arm_resolves(name, arm, capsys):
    config = presets.resolve(name, arm)
    assert config.label == (arm or config.algorithm.name)
    assert parse_config(tomllib.loads(dump_toml(config))) == config
    # What is shipped is written in the names of today.
    assert capsys.readouterr().err == ""


PAPER = {"name": "rex-rag", "correction": "mixture", "filter": "cue-logp", "cue_loss": "all"}
DISTILLED = {"name": "rex-rag-distill", "probe_groups": "all", "filter": "cue-logp", "keep_ratio": 0.08}
DISTILLED |= {"probe_probability": 0.2, "probe_target": 0.0, "keep_per_group": 0}
OURS = {"filter": "right", "probe_groups": "all-wrong", "keep_per_group": 1, "probe_target": 0.2}
OURS |= {"probe_probability": 0.5, "keep_ratio": 0.2}
PROMISED = {
    "grpo": {"name": "grpo", "rollouts": 5},
    "dapo": {
        "name": "dapo",
        "clip_high": 0.28,
        "kl": 0.0,
        "dynamic_sampling": 3,
        "aggregation": "token-mean",
    },
    "dr-grpo": {"name": "dr-grpo", "advantage_scale": "none", "aggregation": "sequence-sum"},
    "rex-rag": PAPER | {"cue_density": "fine", "probe_probability": 0.2, "keep_ratio": 0.08},
    "rex-rag-distill": OURS | {"name": "rex-rag-distill", "suffix_weight": "unclipped"},
    "grpo-more-rollouts": {"name": "grpo", "rollouts": 6},
    "probe-without-cue": PAPER | {"correction": "none"},
    "probe-no-correction": PAPER | {"correction": "none"},
    "rex-rag-coarse": PAPER | {"cue_density": "coarse"},
    "rex-rag-no-filter": PAPER | {"filter": "none"},
    "rex-rag-context-distillation": DISTILLED | {"suffix_weight": "clipped"},
    "rex-rag-context-distillation-is": DISTILLED | {"suffix_weight": "truncated-is"},
    "rex-rag-cue-first": PAPER | {"cue_loss": "first"},
    "rex-rag-cue-none": PAPER | {"cue_loss": "none"},
    "rex-rag-prefix-none": PAPER | {"prefix_loss": "none"},
    "rex-rag-oracle-filter": PAPER | {"filter": "right"},
    "rex-rag-group": PAPER | {"alpha": "group", "failure_rate": "question"},
    "rex-rag-dapo": PAPER | {"clip_high": 0.28, "kl": 0.0, "dynamic_sampling": 3, "keep_ratio": 0.12},
    "rex-rag-distill-probes": PAPER | OURS,
}


def test_every_arm_does_what_its_file_says():
    assert set(PROMISED) == set(presets.arm_names())
    for arm, promised in PROMISED.items():
        config = presets.resolve("quickstart", arm)
        assert {name: getattr(config.algorithm, name) for name in promised} == promised, arm
        assert config.agent.cues == ("none" if arm == "probe-without-cue" else "tiny")


def test_algorithms_are_named_first():
    assert presets.arm_names()[: len(ALGORITHMS)] == list(ALGORITHMS)


def test_an_arm_is_laid_between_file_and_overrides():
    assert presets.resolve("quickstart", "grpo", ["algorithm.kl=0.5"]).algorithm.kl == 0.5
    config = presets.resolve("qwen2.5-3b-nq-hotpot", "grpo")
    assert (config.algorithm.name, config.algorithm.kl) == ("grpo", 0.001)  # what all algorithms share stays
    assert presets.resolve("quickstart", "grpo", ["algorithm.name=rex-rag"]).algorithm == RexRag()


def test_a_file_of_one_s_own_is_an_arm(tmp_path, capsys):
    (tmp_path / "mine.toml").write_text('[algorithm]\nname = "rex-rag"\nkeep_ratio = 0.3\n')
    config = presets.resolve("quickstart", str(tmp_path / "mine.toml"))
    assert (config.label, config.algorithm) == ("mine", RexRag(keep_ratio=0.3))
    (tmp_path / "old.toml").write_text("[method]\nprobe = true\nkeep_ratio = 0.3\n")
    config = presets.resolve("quickstart", str(tmp_path / "old.toml"))
    assert (config.label, config.algorithm) == ("old", RexRag(keep_ratio=0.3))
    assert "[method] is read as [algorithm]" in capsys.readouterr().err


def test_unknown_names_show_the_nearest():
    with pytest.raises(ConfigError, match=r"no such algorithm or ablation; did you mean 'grpo'\?"):
        presets.resolve("quickstart", "grop")
    with pytest.raises(ConfigError, match=r"did you mean 'rex-rag-coarse'\?"):
        presets.resolve("quickstart", "rexrag-coarse")
    with pytest.raises(ConfigError, match=r"did you mean 'quickstart'\?"):
        presets.resolve("quickstrt")


def test_a_file_without_an_algorithm_says_the_default_once(tmp_path, capsys):
    for text in ('name = "mine"\n', "[algorithm]\nkl = 0.1\n"):
        (tmp_path / f"{len(text)}.toml").write_text(text)
        for _ in range(2):
            assert presets.resolve(tmp_path / f"{len(text)}.toml").algorithm.name == "rex-rag-distill"
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "names no algorithm: rex-rag-distill" in said
        presets.resolve(tmp_path / f"{len(text)}.toml", "grpo")
        presets.resolve(tmp_path / f"{len(text)}.toml", "", ["algorithm.name=grpo"])
        assert capsys.readouterr().err == ""
    presets.resolve("quickstart")
    assert capsys.readouterr().err == ""


def test_a_file_with_an_arm_alone_runs_that_arm(tmp_path):
    for arm, name in (("grpo", "grpo"), ("rex-rag-rescue", "rex-rag-distill"), ("resample", "rex-rag")):
        file = tmp_path / "mine.toml"
        file.write_text(f'arm = "{arm}"\n[train]\nsteps = 3\n')
        config = presets.resolve(file)
        assert config.algorithm.name == name and config.train.steps == 3


def test_two_method_tables_of_0_1_0_are_one_table(tmp_path):
    (tmp_path / "base.toml").write_text("[method]\nprobe_probability = 0.4\nkeep_ratio = 0.3\n")
    (tmp_path / "arm.toml").write_text('[method]\nfilter = "none"\n')
    algorithm = presets.resolve(tmp_path / "base.toml", str(tmp_path / "arm.toml")).algorithm
    assert (algorithm.probe_probability, algorithm.keep_ratio, algorithm.filter) == (0.4, 0.3, "none")


def test_an_algorithm_s_own_defaults_do_not_leak_into_another(tmp_path):
    for name in ("dapo", "dr-grpo"):
        file = tmp_path / f"{name}.toml"
        file.write_text(dump_toml(presets.resolve("quickstart", name, ["algorithm.kl=0.01"])))
        algorithm = presets.resolve(file, "grpo").algorithm
        assert (algorithm.clip_high, algorithm.dynamic_sampling) == (0.2, 0)
        assert (algorithm.advantage_scale, algorithm.aggregation, algorithm.kl) == ("std", "token-mean", 0.01)

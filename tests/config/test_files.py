"""Configuration files: unknown keys name the nearest, overrides, round trip."""

import tomllib

import pytest

from rexrag.config.algorithms import ALGORITHMS, Grpo, RexRag
from rexrag.config.files import dump_toml, known_keys, load_config, parse_config
from rexrag.config.schema import Config
from rexrag.errors import ConfigError


@pytest.mark.parametrize("algorithm", [kind() for kind in ALGORITHMS.values()], ids=ALGORITHMS)
def test_defaults_survive_a_round_trip(tmp_path, algorithm):
    file = tmp_path / "c.toml"
    config = Config(algorithm=algorithm)
    file.write_text(dump_toml(config))
    assert load_config(file) == config


def test_a_judged_dead_end_survives_a_round_trip():
    tree = {"algorithm": {"name": "rex-rag", "dead_ends": "judge", "dead_end_judge": "a.b:c"}}
    config = parse_config(tree)
    assert parse_config(tomllib.loads(dump_toml(config))) == config
    assert config.algorithm == RexRag(dead_ends="judge", dead_end_judge="a.b:c")


def test_overrides_are_typed_and_later_ones_win():
    config = parse_config(
        {}, ["algorithm.kl=0.001", "data.train=a.jsonl", "algorithm.kl=0.5", "policy.lora_rank=8"]
    )
    assert config.algorithm.kl == 0.5 and config.policy.lora_rank == 8 and config.data.train == "a.jsonl"
    assert parse_config({}, ["learner.betas=[0.9, 0.99]"]).learner.betas == (0.9, 0.99)
    assert parse_config({}, ["algorithm.name=grpo"]).algorithm == Grpo()


@pytest.mark.parametrize(
    ("tree", "overrides", "says"),
    [
        ({"algoritm": {}}, [], "unknown key 'algoritm'.*"),
        (
            {"algorithm": {"keep_ration": 0.1}},
            [],
            "algorithm 'rex-rag-distill' has no key 'keep_ration': unknown; did you mean 'keep_ratio'",
        ),
        (
            {"algorithm": {"name": "grpo", "probe_probability": 0.1}},
            [],
            "algorithm 'grpo' has no key 'probe_probability': rex-rag, rex-rag-distill has it",
        ),
        (
            {"algorithm": {"name": "rex-rag"}},
            ["algorithm.suffix_weight=clipped"],
            "algorithm 'rex-rag' has no key 'suffix_weight': rex-rag-distill has it",
        ),
        (
            {"algorithm": {"name": "rexrag"}},
            [],
            r"algorithm\.name = 'rexrag': unknown; did you mean 'rex-rag'",
        ),
        ({}, ["algorithm.name=dpo"], r"algorithm\.name = 'dpo': unknown; did you mean 'dapo'"),
        ({"algorithm": 3}, [], "'algorithm' is a table, got 3"),
        ({}, ["keep_ratio=0.1"], "unknown key 'keep_ratio'; did you mean 'algorithm.keep_ratio'"),
        ({}, ["algorithm.kl"], "expected key=value"),
        ({}, ["algorithm.probe_probability=1.5"], r"my.toml: algorithm\.probe_probability = 1\.5: "),
        ({}, ["algorithm.suffix_weight=cliped"], r"algorithm\.suffix_weight = 'cliped'"),
        ({}, ["algorithm.dead_ends=judge"], "dead_end_judge go together"),
    ],
)
def test_bad_input_is_one_line(tree, overrides, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_config(tree, overrides, where="my.toml")
    assert "\n" not in str(caught.value)


def test_known_keys_are_those_of_every_algorithm():
    keys = list(known_keys())
    assert len(keys) == len(set(keys))
    assert {"algorithm.name", "algorithm.suffix_weight", "algorithm.cue_loss", "agent.cues"} <= set(keys)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.toml: no such config file"):
        load_config(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml: not readable as TOML"):
        load_config(tmp_path / "bad.toml")


def test_settings_with_any_text_survive_the_file(tmp_path):
    for name in ("𠮷野家 🦖", "tab\tand\x7fdel", 'quo"te\\'):
        config = parse_config({"name": name, "verl": {"overrides": {name: name, "a": [name]}}})
        (tmp_path / "c.toml").write_text(dump_toml(config), encoding="utf-8")
        assert load_config(tmp_path / "c.toml") == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learner.grad_clip=inf", "finite"),
        ("learner.betas=[1.0,0.9]", "less than 1"),
        ("name=2024-05-01", "valid string"),
    ],
)
def test_numbers_that_are_no_settings_are_refused(override, says):
    with pytest.raises(ConfigError, match=says):
        parse_config({}, [override])


def test_a_date_is_no_setting(tmp_path):
    (tmp_path / "c.toml").write_text("name = 2024-05-01\n")
    with pytest.raises(ConfigError, match="put it in quotes"):
        load_config(tmp_path / "c.toml")

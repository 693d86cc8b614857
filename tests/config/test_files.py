"""Configuration: unknown keys name the nearest, overrides, round trip, arms."""

import pytest

from rexrag.config import presets
from rexrag.config.files import dump_toml, known_keys, load_config, parse_config
from rexrag.config.schema import Config, MethodConfig
from rexrag.errors import ConfigError


def test_defaults_survive_a_round_trip(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(dump_toml(Config()))
    assert load_config(file) == Config()


def test_overrides_are_typed_and_later_ones_win():
    config = parse_config(
        {}, ["method.kl=0.001", "data.train=a.jsonl", "method.kl=0.5", "method.probe=false"]
    )
    assert config.method.kl == 0.5 and config.method.probe is False and config.data.train == "a.jsonl"
    assert parse_config({}, ["learner.betas=[0.9, 0.99]"]).learner.betas == (0.9, 0.99)


@pytest.mark.parametrize(
    ("tree", "overrides", "says"),
    [
        ({"methd": {}}, [], "unknown key 'methd'.*"),
        (
            {"method": {"keep_ration": 0.1}},
            [],
            "unknown key 'method.keep_ration'; did you mean 'method.keep_ratio'",
        ),
        ({"method": 3}, [], "'method' is a table, got 3"),
        ({}, ["keep_ratio=0.1"], "unknown key 'keep_ratio'; did you mean 'method.keep_ratio'"),
        ({}, ["method.kl"], "expected key=value"),
        ({}, ["method.probe_probability=1.5"], "method.probe_probability = 1.5"),
        ({}, ["method.realignment=papper"], "method.realignment = 'papper'"),
        ({}, ["method.keep_floor=0.5", "method.keep=adaptive"], "keep_floor 0.5 is above keep_ratio"),
        ({}, ["method.realignment=trajectory", "method.cues=none"], "needs cues"),
    ],
)
def test_bad_input_is_one_line(tree, overrides, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_config(tree, overrides, where="my.toml")
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.toml: no such config file"):
        load_config(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml: not readable as TOML"):
        load_config(tmp_path / "bad.toml")


@pytest.mark.parametrize("name", sorted(p.stem for p in presets.FOLDER.glob("*.toml")))
@pytest.mark.parametrize("arm", ["", *presets.arm_names()])
def test_every_shipped_config_and_arm_resolves(name, arm):
    config = presets.resolve(name, arm)
    assert config.arm == arm
    assert parse_config(__import__("tomllib").loads(dump_toml(config))) == config


PAPER = {"probe": True, "realignment": "paper", "filter": "cue-logp", "cue_loss": "all", "cues": "tiny"}
PROMISED = {
    "grpo": {"probe": False},
    "grpo-matched": {"probe": False, "rollouts": 6},
    "dapo": {
        "probe": False,
        "clip_high": 0.28,
        "kl": 0.0,
        "dynamic_sampling": 3,
        "aggregation": "token-mean",
    },
    "resample": {"probe": True, "cues": "none", "realignment": "none"},
    "probe-uncorrected": PAPER | {"realignment": "none"},
    "rex-rag": PAPER | {"cue_density": "fine", "probe_probability": 0.2, "keep_ratio": 0.08},
    "rex-rag-coarse": PAPER | {"cue_density": "coarse"},
    "rex-rag-no-filter": PAPER | {"filter": "none"},
    "rex-rag-trajectory": PAPER | {"realignment": "trajectory"},
    "rex-rag-internalize": PAPER | {"realignment": "internalize", "tail": "one"},
    "rex-rag-internalize-truncated": PAPER | {"realignment": "internalize", "tail": "truncated"},
    "rex-rag-cue-first": PAPER | {"cue_loss": "first"},
    "rex-rag-cue-none": PAPER | {"cue_loss": "none"},
    "rex-rag-prefix-none": PAPER | {"prefix_loss": "none"},
    "rex-rag-oracle-filter": PAPER | {"filter": "right"},
    "rex-rag-group": PAPER | {"alpha": "group", "failure_rate": "question"},
    "rex-rag-dapo": PAPER | {"clip_high": 0.28, "kl": 0.0, "dynamic_sampling": 3, "keep_ratio": 0.12},
    "rex-rag-rescue": PAPER
    | {"realignment": "internalize", "tail": "unclipped", "filter": "right", "probe_groups": "all-wrong"}
    | {"keep_per_group": 1, "probe_target": 0.2, "probe_probability": 0.5},
    "rex-rag-rescue-paper": PAPER
    | {"filter": "right", "probe_groups": "all-wrong"}
    | {"keep_per_group": 1, "probe_target": 0.2, "probe_probability": 0.5},
}


def test_every_arm_does_what_its_file_says():
    assert set(PROMISED) == set(presets.arm_names())
    for arm, promised in PROMISED.items():
        method = presets.resolve("quickstart", arm).method
        assert {name: getattr(method, name) for name in promised} == promised, arm


def test_an_arm_is_laid_between_file_and_overrides():
    assert presets.resolve("quickstart", "grpo").method.probe is False
    assert presets.resolve("quickstart", "grpo", ["method.probe=true"]).method.probe is True


def test_unknown_names_show_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'grpo'"):
        presets.resolve("quickstart", "grop")
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        presets.resolve("quickstrt")


def test_every_switch_of_the_method_is_a_config_value():
    switches = {
        "cue_density": ("fine", "coarse"),
        "realignment": ("paper", "trajectory", "internalize", "none"),
        "tail": ("one", "truncated"),
        "cue_loss": ("all", "first", "none"),
        "prefix_loss": ("all", "none"),
        "alpha": ("batch", "group"),
        "failure_rate": ("batch", "question"),
        "filter": ("cue-logp", "none"),
        "keep": ("fixed", "adaptive"),
        "advantage_scale": ("std", "none"),
        "advantage_baseline": ("mean", "leave-one-out"),
        "aggregation": ("token-mean", "sequence-mean", "sequence-sum"),
        "allow_large_alpha": (False, True),
    }
    for name, values in switches.items():
        for value in values:
            assert getattr(MethodConfig(**{name: value}), name) == value
    numbers = {"keep_ratio", "keep_floor", "clip_low", "clip_high", "kl", "probe_probability"}
    assert {f"method.{name}" for name in numbers | set(switches)} <= set(known_keys())


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

"""What version 0.1.0 wrote is read as what it meant, and each new name is said once."""

import pytest

from rexrag import io
from rexrag.config import presets
from rexrag.config.algorithms import DEFAULT_ALGORITHM, Dapo, Grpo, RexRag, RexRagDistill
from rexrag.config.files import load_config, parse_config
from rexrag.config.upgrade import ARMS, NOT_TRAINED, PATHS, lay_over, upgrade
from rexrag.errors import ConfigError

PAPER_S_PROBES = {
    "probe_probability": 0.2,
    "probe_target": 0.0,
    "probe_groups": "all",
    "filter": "cue-logp",
    "keep_ratio": 0.08,
    "keep_per_group": 0,
}
RESCUED = {
    "probe_probability": 0.5,
    "probe_target": 0.2,
    "probe_groups": "all-wrong",
    "filter": "right",
    "keep_ratio": 0.2,
    "keep_per_group": 1,
}
PAPER = {"probe": True, "realignment": "paper"}
OLD_ARMS = {
    "grpo": ({"probe": False}, Grpo()),
    "grpo-matched": ({"probe": False, "rollouts": 6}, Grpo(rollouts=6)),
    "dapo": (
        {"probe": False, "clip_high": 0.28, "kl": 0.0, "dynamic_sampling": 3, "aggregation": "token-mean"},
        Grpo(clip_high=0.28, dynamic_sampling=3),
    ),
    "resample": ({"probe": True, "cues": "none", "realignment": "none"}, RexRag(correction="none")),
    "probe-uncorrected": ({"probe": True, "realignment": "none"}, RexRag(correction="none")),
    "rex-rag": (
        PAPER
        | {"probe_probability": 0.2, "keep_ratio": 0.08, "cue_density": "fine"}
        | {"filter": "cue-logp", "cue_loss": "all"},
        RexRag(),
    ),
    "rex-rag-coarse": (PAPER | {"cue_density": "coarse"}, RexRag(cue_density="coarse")),
    "rex-rag-no-filter": (
        PAPER | {"filter": "none", "allow_large_alpha": True},
        RexRag(filter="none", allow_large_alpha=True),
    ),
    "rex-rag-internalize": (
        {"probe": True, "realignment": "internalize", "tail": "one"},
        RexRagDistill(suffix_weight="clipped", **PAPER_S_PROBES),
    ),
    "rex-rag-internalize-truncated": (
        {"probe": True, "realignment": "internalize", "tail": "truncated"},
        RexRagDistill(suffix_weight="truncated-is", **PAPER_S_PROBES),
    ),
    "rex-rag-cue-first": (PAPER | {"cue_loss": "first"}, RexRag(cue_loss="first")),
    "rex-rag-cue-none": (PAPER | {"cue_loss": "none"}, RexRag(cue_loss="none")),
    "rex-rag-prefix-none": (PAPER | {"prefix_loss": "none"}, RexRag(prefix_loss="none")),
    "rex-rag-oracle-filter": (PAPER | {"filter": "right"}, RexRag(filter="right")),
    "rex-rag-group": (
        PAPER | {"alpha": "group", "failure_rate": "question", "allow_large_alpha": True},
        RexRag(alpha="group", failure_rate="question", allow_large_alpha=True),
    ),
    "rex-rag-dapo": (
        PAPER | {"clip_high": 0.28, "kl": 0.0, "keep_ratio": 0.12, "dynamic_sampling": 3},
        RexRag(clip_high=0.28, keep_ratio=0.12, dynamic_sampling=3),
    ),
    "rex-rag-rescue": (
        RESCUED | {"probe": True, "realignment": "internalize", "tail": "unclipped"},
        RexRagDistill(),
    ),
    "rex-rag-rescue-paper": (RESCUED | PAPER, RexRag(**RESCUED)),
}
"""Arm of 0.1.0 → its [method] table → the algorithm of today that it was."""
RESOLVED = {
    "rollouts": 5, "probe": True, "probe_probability": 0.2, "probe_target": 0.0, "dead_ends": ["wrong"],
    "probe_forced_turn": False, "probe_groups": "all", "dynamic_sampling": 0, "cues": "tiny",
    "filter": "cue-logp", "keep_per_group": 0, "keep": "fixed", "keep_ratio": 0.08, "keep_floor": 0.02,
    "keep_momentum": 0.1, "realignment": "paper", "cue_density": "fine", "tail": "one", "tail_cap": 1.0,
    "cue_loss": "all", "prefix_loss": "all", "alpha": "batch", "failure_rate": "batch",
    "allow_large_alpha": False, "advantage_scale": "std", "advantage_baseline": "mean", "clip_low": 0.2,
    "clip_high": 0.2, "aggregation": "token-mean", "kl": 0.0, "mismatch_cap": 0.0,
}  # fmt: skip
"""A [method] table as a run folder of 0.1.0 holds it: every key."""


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr(io, "_SAID", set())


@pytest.mark.parametrize("arm", OLD_ARMS)
def test_an_old_table_is_the_algorithm_that_it_was(arm):
    table, algorithm = OLD_ARMS[arm]
    assert parse_config({"method": table}).algorithm == algorithm
    # Laid over all of 0.1.0's defaults, as its run folders hold it, it is the same, read in either way.
    for strict in (True, False):
        assert parse_config({"method": RESOLVED | table}, strict=strict).algorithm == algorithm


@pytest.mark.parametrize("arm", OLD_ARMS)
def test_an_old_arm_by_name_is_its_old_table(arm, capsys):
    table, algorithm = OLD_ARMS[arm]
    config = presets.resolve("quickstart", arm)
    expected = Dapo() if arm == "dapo" else algorithm
    assert config.algorithm == expected
    assert config.agent.cues == table.get("cues", "tiny")
    assert config.label == ARMS.get(arm, arm)
    said = capsys.readouterr().err
    assert said == (f"rexrag: {arm} is now called {ARMS[arm]}\n" if arm in ARMS else "")


def test_every_old_name_is_an_old_arm_and_every_new_one_exists():
    assert set(ARMS) <= set(OLD_ARMS)
    assert set(ARMS.values()) <= set(presets.arm_names())
    assert set(OLD_ARMS) - set(ARMS) <= set(presets.arm_names())


def test_an_arm_that_cannot_be_trained_says_where_its_proof_is():
    assert set(NOT_TRAINED) == {"rex-rag-trajectory"}
    with pytest.raises(ConfigError, match=r"rex-rag-trajectory: .*rexrag\.theory"):
        presets.resolve("quickstart", "rex-rag-trajectory")


def test_an_empty_old_table_is_the_old_default():
    assert parse_config({"method": {}}).algorithm == RexRag()
    assert parse_config({}).algorithm == RexRagDistill()


@pytest.mark.parametrize(
    ("change", "says", "kept"),
    [
        ({"keep": "adaptive"}, "method.keep = 'adaptive' is gone", {}),
        ({"keep": "adaptive", "keep_floor": 0.05}, "is gone", {}),
        ({"probe_forced_turn": True}, "method.probe_forced_turn = True is gone", {}),
        ({"tail_cap": 2.0}, "method.tail_cap = 2.0 is gone", {}),
        ({"realignment": "trajectory"}, "method.realignment = 'trajectory' is gone", {}),
        ({"aggregation": "sequence-mean"}, "method.aggregation = 'sequence-mean' is gone", {}),
        ({"filter": "random"}, "method.filter = 'random' is gone", {}),
        (
            {"dead_ends": ["wrong", "no-evidence"]},
            "method.dead_ends has 'no-evidence'",
            {"dead_ends": ("wrong",)},
        ),
        ({"dead_ends": ["repeated-search"]}, "has 'repeated-search'", {"dead_ends": ("wrong",)}),
        (
            {"dead_ends": ["unanswered", "no-evidence"]},
            "has 'no-evidence'",
            {"dead_ends": ("unanswered",)},
        ),
    ],
)
def test_what_is_gone_is_refused_in_a_new_run_and_dropped_from_a_finished_one(change, says, kept):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_config({"method": RESOLVED | change}, where="my.toml")
    assert str(caught.value).startswith("my.toml: ") and "\n" not in str(caught.value)
    read = parse_config({"method": RESOLVED | change}, strict=False).algorithm
    assert read == RexRag(**kept)


def test_the_format_reward_is_gone_unless_it_was_off():
    assert parse_config({"agent": {"format_reward": 0.0}}) == parse_config({})
    with pytest.raises(ConfigError, match="reward plug-in"):
        parse_config({"agent": {"format_reward": 0.1}})
    assert parse_config({"agent": {"format_reward": 0.1}}, strict=False) == parse_config({})


def test_cues_moved_to_the_agent():
    assert parse_config({"method": {"cues": "tiny"}}).agent.cues == "tiny"
    both = parse_config({"method": {"cues": "tiny"}, "agent": {"cues": "default", "search_turns": 2}})
    assert (both.agent.cues, both.agent.search_turns) == ("default", 2)


@pytest.mark.parametrize("old", PATHS)
def test_shipped_checkpoints_have_new_names(old, capsys):
    assert parse_config({"policy": {"path": old}}).policy.path == PATHS[old]
    assert f"policy.path '{old}' is now called '{PATHS[old]}'" in capsys.readouterr().err
    assert parse_config({}, [f"policy.path={old}"]).policy.path == PATHS[old]
    assert f"policy.path '{old}' is now called '{PATHS[old]}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arm", "method", "label"),
    [
        ("rex-rag-rescue", OLD_ARMS["rex-rag-rescue"][0], "rex-rag-distill"),
        ("resample", OLD_ARMS["resample"][0], "probe-without-cue"),
        ("rex-rag", PAPER, "rex-rag"),
        ("grpo", {"probe": False}, "grpo"),
        ("dapo", OLD_ARMS["dapo"][0], "dapo"),
        ("", PAPER, "rex-rag"),
        ("my arm", PAPER, "my arm"),
    ],
)
def test_a_run_folder_s_arm_is_shown_by_its_new_name(arm, method, label):
    config = parse_config({"arm": arm, "method": method}, strict=False)
    assert config.label == label
    assert config.arm == ("" if label == config.algorithm.name else label)


def test_each_new_name_is_said_once(capsys):
    for _ in range(3):
        parse_config({"method": {"probe": False}}, where="my.toml")
    assert capsys.readouterr().err == 'rexrag: my.toml: [method] is read as [algorithm] name = "grpo"\n'


@pytest.mark.parametrize(
    ("old", "key", "value"),
    [
        ("method.kl=0.5", "kl", 0.5),
        ("method.tail=truncated", "suffix_weight", "truncated-is"),
        ("method.tail=one", "suffix_weight", "clipped"),
        ("method.keep_ratio=0.3", "keep_ratio", 0.3),
    ],
)
def test_old_overrides_are_read_and_say_their_new_key(old, key, value, capsys):
    assert getattr(parse_config({}, [old]).algorithm, key) == value
    assert capsys.readouterr().err == (
        f"rexrag: --set {old.partition('=')[0]}: this key is now called algorithm.{key}\n"
    )


def test_an_override_of_the_old_cues_is_one_of_the_agent_s():
    assert parse_config({}, ["method.cues=none"]).agent.cues == "none"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "method.probe=false",
            r"which algorithm runs is --algorithm NAME now \(grpo, dapo, dr-grpo",
        ),
        ("method.realignment=paper", "--algorithm NAME"),
        ("method.keep=adaptive", "method.keep: this switch is gone, see CHANGELOG.md"),
        ("method.tail_cap=1.0", "this switch is gone"),
        ("method.filter=random", r"algorithm\.filter = 'random'"),
        ("method.keep_ration=0.1", r"unknown key 'algorithm\.keep_ration'; did you mean 'algorithm\.keep_"),
        ("method=3", "unknown key 'method'"),
        ("agent.format_reward=0.1", r"unknown key 'agent\.format_reward'"),
    ],
)
def test_old_overrides_that_mean_nothing_now_are_one_line(override, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_config({}, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"method": 3}, "'method' is a table, got 3"),
        ({"method": []}, r"'method' is a table, got \[\]"),
        ({"method": {}, "algorithm": {"name": "grpo"}}, r"both \[method\] and \[algorithm\]"),
        ({"method": {"keep_ration": 0.1}}, "'rex-rag' has no key 'keep_ration': .*'keep_ratio'"),
        ({"method": {"realignment": "papper"}}, r"algorithm\.correction = 'papper'"),
        ({"method": {"cues": "tiny"}, "agent": 3}, "'agent' is a table, got 3"),
    ],
)
def test_old_tables_with_mistakes_are_one_line(tree, says):
    with pytest.raises(ConfigError, match=says) as caught:
        parse_config(tree, where="my.toml")
    assert "\n" not in str(caught.value)


ODD = (3, 0.5, "?", ["x"], [], {"a": 1}, True)


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_value_of_any_type_is_read_or_refused_in_one_line(odd):
    trees = [{key: odd} for key in ("arm", "method", "algorithm", "policy", "agent", "verl")]
    trees += [{"method": {key: odd}} for key in RESOLVED]
    trees += [{"policy": {"path": odd}}, {"agent": {"format_reward": odd}}, {"algorithm": {"name": odd}}]
    for tree in trees:
        for strict in (True, False):
            try:
                parse_config(tree, strict=strict)
            except ConfigError as error:
                assert "\n" not in str(error)
    for key in ("method.tail", "policy.path", "algorithm.name", "method.cues"):
        try:
            parse_config({}, [f"{key}={odd}"])
        except ConfigError as error:
            assert "\n" not in str(error)


def test_a_run_folder_of_the_old_version_is_read(tmp_path):
    (tmp_path / "config.toml").write_text(
        'name = "old"\narm = "rex-rag-trajectory"\n[policy]\npath = "embedded"\n'
        '[method]\nrealignment = "trajectory"\ncues = "tiny"\nkeep_floor = 0.02\n'
        "[verl]\ngpu_tflops = 100.0\ngpu_bandwidth = 2.0\n"
    )
    with pytest.raises(ConfigError, match="is gone"):
        load_config(tmp_path / "config.toml")
    config = load_config(tmp_path / "config.toml", strict=False)
    assert (config.label, config.policy.path) == ("rex-rag-trajectory", "tiny-hard")


def test_a_tree_of_today_is_left_as_it_is(capsys):
    tree = {"name": "x", "algorithm": {"name": "grpo", "kl": 0.1}, "policy": {"path": "tiny-easy"}}
    assert upgrade(tree, "my.toml") == tree
    assert capsys.readouterr().err == ""


# -- laying one tree over another ---------------------------------------------------------------------------


def test_another_algorithm_keeps_only_what_all_algorithms_share():
    base = {"algorithm": {"name": "rex-rag", "rollouts": 7, "kl": 0.1, "cue_loss": "none"}, "seed": 1}
    merged = lay_over(base, {"algorithm": {"name": "grpo"}})
    assert merged == {"algorithm": {"name": "grpo", "rollouts": 7, "kl": 0.1}, "seed": 1}
    assert base["algorithm"]["cue_loss"] == "none"  # what was laid over is untouched
    # Both probe, but what a probing algorithm was set to says nothing of another one.
    base = {"algorithm": {"name": "rex-rag", "keep_ratio": 0.9, "clip_high": 0.3}}
    distilled = parse_config(lay_over(base, {"algorithm": {"name": "rex-rag-distill"}})).algorithm
    assert distilled == RexRagDistill(clip_high=0.3)


def test_the_same_algorithm_keeps_everything_else():
    base = {"algorithm": {"name": "rex-rag", "cue_loss": "none", "kl": 0.1}}
    expected = {"algorithm": {"name": "rex-rag", "cue_loss": "none", "kl": 0.5}}
    assert lay_over(base, {"algorithm": {"name": "rex-rag", "kl": 0.5}}) == expected
    assert lay_over(base, {"algorithm": {"kl": 0.5}}) == expected


def test_other_tables_merge_and_anything_else_replaces():
    merged = lay_over({"a": {"b": {"c": 1, "d": 2}}, "e": [1, 2], "f": 1}, {"a": {"b": {"c": 3}}, "e": [4]})
    assert merged == {"a": {"b": {"c": 3, "d": 2}}, "e": [4], "f": 1}


def test_an_override_of_the_algorithm_drops_no_other_override():
    for overrides in (
        ["algorithm.keep_ratio=0.9", "algorithm.name=rex-rag"],
        ["algorithm.name=rex-rag", "algorithm.keep_ratio=0.9"],
    ):
        assert parse_config({}, overrides).algorithm == RexRag(keep_ratio=0.9)
    named = {"algorithm": {"name": DEFAULT_ALGORITHM, "keep_ratio": 0.5}}
    assert parse_config(named, ["algorithm.name=rex-rag"]).algorithm == RexRag()

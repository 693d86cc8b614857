"""Each algorithm has its own settings and defaults, and refuses those of another."""

import pytest
from pydantic import ValidationError

from rexrag.config.algorithms import (
    ALGORITHMS,
    DEFAULT_ALGORITHM,
    Dapo,
    Grpo,
    Probing,
    RexRag,
    RexRagDistill,
    Shared,
)
from rexrag.config.files import known_keys
from rexrag.config.schema import Config
from rexrag.types import DeadEnd

SWITCHES = {
    Shared: {
        "advantage_scale": ("std", "none"),
        "advantage_baseline": ("mean", "leave-one-out"),
        "aggregation": ("token-mean", "sequence-sum"),
        "dynamic_sampling": (0, 3),
    },
    Probing: {
        "probe_groups": ("all", "all-wrong"),
        "filter": ("cue-logp", "none", "right"),
        "dead_ends": ((DeadEnd.WRONG,), (DeadEnd.WRONG, DeadEnd.UNANSWERED)),
        "prefix_loss": ("all", "none"),
    },
    RexRag: {
        "correction": ("mixture", "none"),
        "cue_density": ("fine", "coarse"),
        "cue_loss": ("all", "first", "none"),
        "alpha": ("batch", "group"),
        "failure_rate": ("batch", "question"),
        "allow_large_alpha": (False, True),
    },
    RexRagDistill: {"suffix_weight": ("clipped", "truncated-is", "unclipped")},
}


def test_names_and_the_default():
    assert list(ALGORITHMS) == ["grpo", "dapo", "dr-grpo", "rex-rag", "rex-rag-distill"]
    assert all(kind().name == name for name, kind in ALGORITHMS.items())
    assert Config().algorithm == ALGORITHMS[DEFAULT_ALGORITHM]() == RexRagDistill()
    assert Config().label == "rex-rag-distill" and Config(arm="mine").label == "mine"


@pytest.mark.parametrize("kind", ALGORITHMS.values(), ids=ALGORITHMS)
def test_every_switch_of_the_method_is_a_setting_of_the_algorithms_that_have_it(kind):
    for owner, switches in SWITCHES.items():
        for name, values in switches.items():
            assert f"algorithm.{name}" in set(known_keys())
            if issubclass(kind, owner):
                assert all(getattr(kind(**{name: value}), name) == value for value in values)
            else:
                with pytest.raises(ValidationError, match="Extra inputs"):
                    kind(**{name: values[0]})


def test_vetted_defaults():
    assert Grpo().clip_high == Grpo().clip_low == 0.2 and Grpo().rollouts == 5
    assert (Dapo().clip_high, Dapo().dynamic_sampling, Dapo().kl, Dapo().aggregation) == (
        0.28, 3, 0.0, "token-mean",
    )  # fmt: skip
    paper = RexRag()
    assert (paper.probe_probability, paper.keep_ratio, paper.filter) == (0.2, 0.08, "cue-logp")
    assert (paper.correction, paper.cue_density, paper.cue_loss) == ("mixture", "fine", "all")
    ours = RexRagDistill()
    assert (ours.probe_groups, ours.filter, ours.keep_per_group) == ("all-wrong", "right", 1)
    assert (ours.probe_probability, ours.probe_target, ours.keep_ratio) == (0.5, 0.2, 0.2)
    assert ours.suffix_weight == "unclipped"


def test_a_judge_and_its_name_go_together():
    assert RexRag(dead_ends="judge", dead_end_judge="my.module:judge").dead_ends == "judge"
    for half in ({"dead_ends": "judge"}, {"dead_end_judge": "my.module:judge"}):
        with pytest.raises(ValidationError, match="go together"):
            RexRag(**half)


def test_the_same_tokens_are_not_corrected_twice():
    assert RexRagDistill(mismatch_cap=2.0).mismatch_cap == 2.0
    with pytest.raises(ValidationError, match="correct the same tokens twice"):
        RexRagDistill(mismatch_cap=2.0, suffix_weight="truncated-is")

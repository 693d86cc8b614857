"""What `import rexrag` offers, and what it costs."""

import subprocess
import sys

import pytest

import rexrag

PUBLIC = [
    "Agent",
    "Answer",
    "BlindRollout",
    "Comparison",
    "Config",
    "Document",
    "Evaluation",
    "JudgeContext",
    "Probe",
    "Question",
    "RexragError",
    "Rollout",
    "RolloutGroup",
    "Run",
    "Trainer",
    "__version__",
    "compare",
    "evaluate",
    "load_agent",
    "load_config",
    "train",
]


def test_the_public_names_are_these():
    assert sorted(rexrag.__all__) == PUBLIC


@pytest.mark.parametrize("name", [name for name in PUBLIC if not name.startswith("__")])
def test_every_public_name_is_there_and_says_what_it_is(name):
    thing = getattr(rexrag, name)
    assert thing.__doc__ and not thing.__doc__.startswith(f"{name}(")


def test_names_that_stay_for_outside_callers():
    from rexrag.agent.protocol import extract_answer, parse_action
    from rexrag.agent.reward import exact_match, f1, sub_exact_match
    from rexrag.method import (
        CueTrie,
        clipped_surrogate,
        group_advantages,
        k3_kl,
        keep_probes,
        mixture_log_density,
        probe_log_density,
        trajectory_weight,
    )
    from rexrag.types import Origin

    assert all((CueTrie, clipped_surrogate, group_advantages, k3_kl, keep_probes, mixture_log_density))
    assert all((probe_log_density, trajectory_weight, exact_match, f1, sub_exact_match, Origin))
    assert parse_action("<answer> a </answer>").argument == extract_answer("<answer> a </answer>") == "a"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = rexrag.trian


def test_import_loads_neither_torch_nor_transformers():
    code = "import sys, rexrag; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"

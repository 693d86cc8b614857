"""Loggers get the run's numbers and nothing else; one that is missing is named before a run starts."""

import sys
from types import ModuleType

import pytest

from rexrag.config.files import parse_config
from rexrag.errors import ConfigError
from rexrag.training.trackers import Together, open_trackers

STEP = {"step": 3, "em/train": 0.25, "seconds": 1.5, "loss": None, "note": "text"}
EVAL = {
    "step": 3,
    "set": "held-out",
    "em": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9},
    "f1": {"value": 0.6},
    "by_hops": {"2": {"value": 0.1}},
    "searches": 1.25,
    "em_by_question": [1.0],
}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_hosted_logger_gets_numbers_only(name, monkeypatch, tmp_path):
    calls = []
    module = ModuleType(name)
    module.init = lambda **options: calls.append(("init", options))
    module.log = lambda values, step: calls.append((step, values))
    module.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, name, module)
    observer = Together(open_trackers([name]))
    observer.started(parse_config({}, ["seed=7"]), tmp_path / "my-run")
    observer.stepped(STEP, 0.5)
    observer.evaluated(EVAL)
    observer.finish()
    (what, options), step, evaluation, finished = calls
    assert finished == ("finish", None)
    assert what == "init" and options["name"] == "my-run" and options["config"]["seed"] == 7
    assert step == (3, {"em/train": 0.25, "seconds": 1.5})
    assert evaluation[1] == {
        "held-out/em": 0.5, "held-out/em_2_hop": 0.1, "held-out/f1": 0.6, "held-out/searches": 1.25,
    }  # fmt: skip


def test_a_logger_that_never_began_is_not_finished(monkeypatch):
    module = ModuleType("trackio")
    monkeypatch.setitem(sys.modules, "trackio", module)
    Together(open_trackers(["trackio"])).finish()  # trackio.finish() without init raises


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    (observer,) = open_trackers(["tensorboard"])
    observer.started(parse_config({}), tmp_path)
    observer.stepped(STEP, 1.0)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_missing_logger_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="'wandb' is not installed; pip install wandb"):
        open_trackers(["wandb"])

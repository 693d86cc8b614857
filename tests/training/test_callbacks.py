"""A callback that fails ends the run with its name and the event."""

import pytest

from rexrag.errors import PluginError, TrainingError
from rexrag.training.callbacks import Events


def fails(event, facts):
    raise KeyError("loss")


def stops(event, facts):
    raise TrainingError("enough")


def test_a_callback_that_fails_is_one_line():
    name = "tests.training.test_callbacks:fails"
    with pytest.raises(PluginError) as caught:
        Events(None, [fails]).evaluated({})
    assert str(caught.value) == f"callback {name}, event 'evaluate': KeyError: 'loss'"
    with pytest.raises(TrainingError, match=r"^enough$"):
        Events(None, [stops]).evaluated({})

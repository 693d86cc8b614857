"""Plug-ins by dotted name: what cannot be used is one line with the key and the name."""

import sys

import pytest

from rexrag.errors import PluginError, RetrievalError
from rexrag.plugins import calling, dotted_name, is_dotted, load_plugin, require_parameters
from tests.support import plugins

HERE = "tests.support.plugins"


def test_a_plugin_is_what_its_name_says():
    assert load_plugin(f"{HERE}:long_answer", "agent.reward", parameters=1) is plugins.long_answer
    assert load_plugin(f"{HERE}:Judges.inner", "algorithm.dead_end_judge", 2) is plugins.Judges.inner
    assert load_plugin(f"{HERE}:VALUE", "key") == 3
    assert is_dotted("a.b:c") and not is_dotted("em")


def test_a_thing_and_its_name_lead_to_each_other():
    for thing in (plugins.long_answer, plugins.Judges, plugins.Judges.inner):
        assert load_plugin(dotted_name(thing), "key") is thing
    assert dotted_name(plugins.Judges()) == f"{HERE}:Judges"


def test_a_module_beside_the_configuration_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_reward.py").write_text("def zero(rollout):\n    return 0.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_plugin("my_own_reward:zero", "agent.reward", parameters=1)(None) == 0.0


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        (f"{HERE}.deeper:f", "cannot be imported: ModuleNotFoundError"),
        ("tests.support.broken_plugin:f", "cannot be imported: RuntimeError: no such luck"),
        (f"{HERE}:long_anser", f"{HERE} has no 'long_anser'; did you mean 'long_answer'?"),
        (f"{HERE}:Judges.iner", f"{HERE} has no 'iner'; did you mean 'inner'?"),
        (f"{HERE}:zzz", f"{HERE} has no 'zzz'"),
        (f"{HERE}:needs_two", "takes (rollout, question), expected 1 positional argument"),
        (f"{HERE}:VALUE", "is a int, expected a function"),
        (f"{HERE}:", "expected em, f1, module:name"),
        (":f", "expected em, f1, module:name"),
        ("f11", "did you mean 'f1'?"),
        ("bleu", "expected em, f1, module:name"),
        ("..:f", "cannot be imported: "),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(name, says):
    with pytest.raises(PluginError) as caught:
        load_plugin(name, "agent.reward", parameters=1, known=("em", "f1"))
    assert str(caught.value).startswith(f"agent.reward = '{name}': ")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_function_whose_arguments_cannot_be_known_is_let_through():
    require_parameters(max, 5, "max")
    require_parameters(lambda *every: None, 3, "lambda")
    require_parameters(lambda a, b=1: None, 1, "lambda")
    with pytest.raises(PluginError, match="what: takes"):
        require_parameters(lambda a, *, b: None, 1, "what")


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("rewrd", "No module named 'rewrd'; did you mean 'reward:f'?"),
        ("mine.juge", "No module named 'mine.juge'; did you mean 'mine.judge:f'?"),
        ("mien.judge", "No module named 'mien'; did you mean 'mine.judge:f'?"),
        ("elsewhere", "No module named 'elsewhere'"),
        ("reward", "No module named 'rewards'"),
    ],
)
def test_a_module_that_cannot_be_found_names_the_nearest_beside_it(tmp_path, monkeypatch, module, says):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").touch()
    (tmp_path / "mine" / "judge.py").touch()
    (tmp_path / "reward.py").write_text("import rewards")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(PluginError) as caught:
        load_plugin(f"{module}:f", "agent.reward")
    expected = f"agent.reward = '{module}:f': cannot be imported: ModuleNotFoundError: {says}"
    assert str(caught.value) == expected
    for name in ("mine", "mine.judge", "reward"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (KeyError("gold"), "it: KeyError: 'gold'"),
        (ValueError("\n  first\nsecond"), "it: ValueError: first"),
        (AssertionError(), "it: AssertionError"),
    ],
)
def test_an_error_of_a_plug_in_is_one_line_with_its_name_and_its_cause(error, says):
    def fails(argument):
        raise error

    with pytest.raises(PluginError) as caught:
        calling("it", fails, 1)
    assert str(caught.value) == says and caught.value.__cause__ is error


def test_what_a_plug_in_returns_and_what_is_one_line_already_pass():
    def refused():
        raise RetrievalError("the service is down")

    assert calling("max", max, 1, 2) == 2
    with pytest.raises(RetrievalError, match=r"^the service is down$"):
        calling("it", refused)
    with pytest.raises(KeyboardInterrupt):
        calling("it", interrupted)


def interrupted():
    raise KeyboardInterrupt

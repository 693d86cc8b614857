"""Train, ask and evaluate from Python, on the tiny checkpoint."""

import json

import pytest

import rexrag
from rexrag.errors import ConfigError, PluginError, RunFolderError

SMALL = [
    "data.world_people=24",
    "data.world_questions=40",
    "data.dev_limit=8",
    "train.questions=4",
    "train.steps=1",
    "train.max_generated=0",
    "train.evals=1",
    "algorithm.rollouts=4",
    "train.threads=1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    seen = []

    def note(event, facts):
        seen.append(event)

    folder = tmp_path_factory.mktemp("api") / "run"
    made = rexrag.train(
        "quickstart", folder, overrides=SMALL, reward=lambda r: 0.5 * r.correct, callbacks=[note]
    )
    return made, seen


def test_a_run_has_its_summary_rows_and_events(run):
    made, seen = run
    assert made.summary["steps"] == 1 and made.verdict
    assert [row["step"] for row in made.metrics()] == [1] and len(made.evaluations()) == 2
    assert seen == ["start", "evaluate", "step", "evaluate", "end"]
    assert made.metrics()[0]["reward/mean"] <= 0.5, "the reward given as an argument"
    page = made.report()
    assert page.exists() and page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_an_agent_answers_and_is_evaluated(run, tmp_path):
    made, _ = run
    with made.agent() as agent:
        answer = agent.ask("Who is married to Clara Nyberg?")
        assert answer.tokens > 0 and "<" in answer.trace and answer.confidence is None
        found = rexrag.evaluate(agent, strategies=["agent", "reflect"], limit=4, out=tmp_path / "eval")
    assert found.em("agent")["n"] == 4 and {row["strategy"] for row in found.rows} == {"agent", "reflect"}
    again = rexrag.evaluate(str(made.folder), strategies=["agent"], limit=4, out=tmp_path / "eval")
    assert again.em() == found.em("agent"), "answers that are there are not asked again"


def test_a_comparison_gives_paired_differences(tmp_path):
    sizes = [s for s in SMALL if not s.startswith(("train.steps", "train.max", "train.threads"))]
    found = rexrag.compare(
        ["grpo", "rex-rag-distill"], seeds=[3], budget=("rollouts", 16), out=tmp_path, overrides=sizes
    )
    assert found.difference("rex-rag-distill")["n"] == 1 and found.report().exists()
    with pytest.raises(ConfigError, match="expected one of rex-rag-distill"):
        found.difference("grpo")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"reward": lambda: 1.0}, "takes .*, expected 1 positional"),
        ({"judge": 3}, "is a int, expected a function"),
        ({"retriever": object()}, "it has no 'search'"),
        ({"protocol": object()}, "it has no 'notice'"),
        ({"rewards": len}, "rewards: expected reward, judge"),
        ({"dead_end_judge": lambda rollouts, context: []}, "algorithm 'grpo' has no probes"),
    ],
)
def test_a_plug_in_that_cannot_be_used_is_one_line(given, says):
    with pytest.raises((ConfigError, PluginError), match=says) as caught:
        rexrag.Trainer("quickstart", algorithm="grpo", **given)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"summary\.json: not readable"):
        _ = rexrag.Run(tmp_path).summary


def test_a_config_can_be_made_in_python(tmp_path):
    config = rexrag.load_config("quickstart", algorithm="grpo", overrides=SMALL)
    alone = config.model_copy(update={"train": config.train.model_copy(update={"control": ""})})
    assert config.algorithm.name == "grpo" and rexrag.Trainer(config).config == alone
    with pytest.raises(ConfigError, match="not both"):
        rexrag.Trainer(config, algorithm="grpo")
    assert json.loads(config.model_dump_json())["train"]["steps"] == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": ("toks", 3)}, "budget = ('toks', 3): expected (NAME, amount), NAME one of rollouts, gen"),
        ({"budget": "generated"}, "budget = 'generated': expected (NAME, amount)"),
        ({"budget": ("rollouts", "9")}, "budget = ('rollouts', '9'): expected (NAME, amount)"),
        ({"budget": ("rollouts", -1)}, "budget -1: expected a budget above 0"),
        ({"algorithms": "grpo"}, "algorithms: expected a list of names, got 'grpo'"),
        ({"algorithms": []}, "algorithms : expected different names"),
        ({"seeds": "3"}, "seeds: expected a list of whole numbers, got '3'"),
        ({"seeds": 0}, "seeds: expected at least one seed"),
    ],
)
def test_a_comparison_that_cannot_be_made_names_the_argument(tmp_path, given, says):
    with pytest.raises(ConfigError) as caught:
        rexrag.compare(**{"algorithms": ["grpo"], "out": tmp_path / "out", **given})
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_one_override_or_strategy_may_be_given_as_one_text(run, tmp_path):
    assert rexrag.load_config("quickstart", algorithm="grpo", overrides="train.steps=7").train.steps == 7
    assert rexrag.Trainer("quickstart", algorithm="grpo", overrides="train.steps=7").config.train.steps == 7
    with rexrag.load_agent(run[0].folder, overrides="agent.search_turns=1") as agent:
        assert agent.config.agent.search_turns == 1
        found = rexrag.evaluate(agent, strategies="direct", limit=2, out=tmp_path / "eval")
    assert found.em("direct")["n"] == 2


def test_arguments_of_an_agent_and_an_evaluation_are_named(run, tmp_path):
    with pytest.raises(ConfigError, match=r"^foo: expected model, tokenizer, concurrency, timeout, retries"):
        rexrag.load_agent("tiny-hard", foo=3)
    with pytest.raises(ConfigError, match=r"^model and tokenizer belong to an endpoint: source http"):
        rexrag.load_agent(run[0].folder, model="m")
    with pytest.raises(ConfigError, match=r"^strategies agnet: expected some of"):
        rexrag.evaluate(run[0].folder, strategies="agnet", out=tmp_path)
    with pytest.raises(ConfigError, match=r"^callbacks: expected a list of functions, got <function"):
        rexrag.Trainer("quickstart", algorithm="grpo", callbacks=lambda event, facts: None)

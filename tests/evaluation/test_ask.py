"""One question: the answer, the trace while it is written; every kind of policy through one function."""

import json

import pytest

from rexrag.config.files import dump_toml
from rexrag.config.schema import AgentConfig, Config, DataConfig, RetrieverConfig
from rexrag.engine.loading import resolve
from rexrag.errors import CheckpointError, ConfigError, DataError, EndpointError
from rexrag.evaluation.ask import Answer, ask
from rexrag.evaluation.policies import EndpointOptions, load_agent_parts
from tests.support.completions_server import CompletionsServer, scripted
from tests.support.fakes import FakeRetriever, ScriptedPolicy, document
from tests.support.live_service import running

AGENT = AgentConfig(template="terse", search_turns=2, turn_tokens=100, evidence_tokens=120, total_tokens=900)
CONFIG = Config(agent=AGENT, retriever=RetrieverConfig(topk=1))


def say(question, turn, attempt):
    return "<search> it </search>" if turn == 0 else "<answer> Oslo </answer>"


def test_an_answer_has_its_trace_searches_and_tokens():
    pieces = []
    retriever = FakeRetriever({"it": [document("Oslo", "Oslo is in Norway.")]})
    answer = ask(ScriptedPolicy(say), "Where?", retriever, CONFIG, on_text=pieces.append)
    written = "<search> it </search>" + "<answer> Oslo </answer>"
    assert answer == Answer("Oslo", answer.trace, searches=1, tokens=len(written), confidence=None)
    assert "Oslo is in Norway." in answer.trace and "".join(pieces) == answer.trace


def test_a_question_that_is_never_answered_or_too_long():
    answer = ask(ScriptedPolicy(lambda *_: "hm"), "Where?", FakeRetriever(), CONFIG)
    assert answer.answer is None and answer.searches == 0
    with pytest.raises(DataError, match="leaves no room"):
        ask(ScriptedPolicy(say), "Where? " * 1000, FakeRetriever(), CONFIG)


def test_an_engine_that_gives_up_is_an_error_and_no_answer():
    class GivingUp(ScriptedPolicy):
        def session(self):
            session = super().session()
            session._drive = lambda episode, *_: episode.give_up("no connection")
            return session

    with pytest.raises(EndpointError, match="no connection"):
        ask(GivingUp(say), "Where?", FakeRetriever(), CONFIG)


SMALL = ["data.world_people=12", "policy.device=cpu"]


def test_every_kind_of_source_gives_an_agent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embedded = load_agent_parts("tiny-hard", overrides=SMALL)
    assert embedded.config.agent.template == "terse" and len(embedded.retriever.documents) > 12
    folder = resolve("tiny-hard")
    narrow = [*SMALL, "agent.total_tokens=900"]
    assert load_agent_parts(folder, overrides=narrow).config.agent.template == "search-r1"
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    kept = embedded.config.model_copy(update={"name": "mine"})
    (run / "config.toml").write_text(dump_toml(kept))
    with pytest.raises(CheckpointError, match="run: it has no checkpoint"):
        load_agent_parts("run", overrides=SMALL)
    parts = load_agent_parts("tiny-hard", config=str(run / "config.toml"))
    assert parts.config.name == "mine" and parts.source.digest == embedded.source.digest


def test_an_endpoint_is_an_agent_and_is_closed():
    from rexrag.agent.codec import load_codec

    folder = resolve("tiny-hard")
    codec = load_codec(folder)
    model = scripted(lambda prompt: "<answer> again </answer>", codec.decode, codec.encode)
    own = FakeRetriever()
    with running(CompletionsServer(model, codec.decode).app) as url:
        options = EndpointOptions(tokenizer=folder)
        agent = load_agent_parts(f"{url}/v1", config="quickstart", retriever=own, endpoint=options)
        try:
            assert agent.retriever is own and agent.source.name.startswith("the-model at http://127.0.0.1")
            assert ask(agent.policy, "Who?", agent.retriever, agent.config).answer == "again"
        finally:
            agent.close()
        assert agent.policy.client._http._http.is_closed


def test_what_is_missing_is_known_before_weights_are_loaded(tmp_path, monkeypatch):
    def never(config):
        raise AssertionError("loaded")

    monkeypatch.setattr("rexrag.engine.loading.load_policy", never)
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "q", "answers": "a"}) + "\n")
    data = [f"data.train={tmp_path}/q.jsonl", "data.corpus="]
    with pytest.raises(ConfigError, match=r"retriever\.index and data\.corpus are both empty"):
        load_agent_parts("tiny-hard", overrides=data)
    with pytest.raises(DataError, match="no such file"):
        load_agent_parts("tiny-hard", overrides=[f"data.corpus={tmp_path}/none.jsonl"])
    assert DataConfig().corpus == ""

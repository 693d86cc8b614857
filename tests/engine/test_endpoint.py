"""A policy behind an OpenAI-compatible endpoint: the local engine's rollouts; a server that fails."""

import asyncio
import time

import pytest
import torch
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM

from rexrag.agent.codec import load_codec
from rexrag.agent.episode import Episode
from rexrag.agent.protocols import register_protocol
from rexrag.agent.protocols.tags import Tags
from rexrag.config.schema import AgentConfig, PolicyConfig
from rexrag.data.world.generator import World
from rexrag.engine.endpoint import EndpointPolicy, connect
from rexrag.engine.endpoint import client as client_module
from rexrag.engine.endpoint.client import Completion, CompletionClient, base_url, parse_completion
from rexrag.engine.endpoint.policy import _trimmed_stop, _without_end
from rexrag.engine.loading import load_policy, resolve
from rexrag.errors import ConfigError, EndpointError, ModelError
from rexrag.retrieval.rankers.bm25 import BM25Retriever
from rexrag.types import Origin, Question
from tests.support.completions_server import CompletionsServer, says, scripted, slow, status
from tests.support.fakes import CharCodec, FakeRetriever, document
from tests.support.live_service import running

CODEC = CharCodec()
AGENT = AgentConfig(template="terse", search_turns=2, turn_tokens=200, evidence_tokens=200, total_tokens=2000)
QUESTION = Question("1", "Where?", ("Oslo",))
RETRIEVER = FakeRetriever({"it": [document("Oslo", "A city.")]})


def say(prompt: str) -> str:
    return (
        "<answer> Oslo </answer> and more" if "</information>" in prompt else "hm <search> it </search> more"
    )


def serve(dialect="vllm", script=say):
    model = scripted(script, CODEC.decode, CODEC.encode)
    return CompletionsServer(model, CODEC.decode, dialect)


def policy_at(url, retries=2, timeout=5.0, **named):
    client = CompletionClient(f"{url}/v1", "m", retries=retries, timeout=timeout, sleep=lambda seconds: None)
    return EndpointPolicy(client, CODEC, **named)


def roll(policy, questions=(QUESTION,), retriever=RETRIEVER, temperature=0.0):
    episodes = [Episode(question, policy.codec, AGENT, 3) for question in questions]
    session = policy.session()
    try:
        session.run(episodes, retriever, temperature, 0)
    finally:
        session.close()
        policy.client.close()
    return episodes, session


@pytest.mark.parametrize("dialect", ["vllm", "old-vllm", "llama.cpp", "text"])
def test_every_dialect_gives_the_same_rollout(dialect):
    server = serve(dialect)
    with running(server.app) as url:
        (episode,), session = roll(policy_at(url))
    rollout = episode.rollout()
    assert rollout.answer == "Oslo" and [turn.action for turn in rollout.turns] == ["search", "answer"]
    assert 'hm <search> it </search>\n\n<information>Doc 1(Title: "Oslo") A city.' in rollout.text
    assert rollout.text.endswith("<answer> Oslo </answer>")
    # The continuation is the tokens as they were: prompt and response so far, nothing else.
    asked = [request["prompt"] for request in server.requests if len(request["prompt"]) > len(rollout.prompt)]
    assert asked[-1] == [*rollout.prompt, *rollout.tokens[: rollout.turns[1].start]]
    assert session.generated_tokens == rollout.count(Origin.POLICY)
    assert episode.encoded_anew == (2 if dialect == "text" else 0)


def test_a_server_that_refuses_the_options_is_asked_plainly_from_then_on():
    server = serve("text")
    with running(server.app) as url:
        roll(policy_at(url))
    assert ["return_token_ids" in request for request in server.requests] == [True, False, False]


def test_the_same_model_behind_an_endpoint_and_in_the_local_engine():
    """The embedded model, greedy: token for token the local engine's rollouts."""
    world = World(0, 24)
    questions = world.questions("held-out", 4)
    retriever = BM25Retriever.build(world.documents)
    agent = AgentConfig(
        template="terse", search_turns=3, turn_tokens=48, evidence_tokens=120, total_tokens=512
    )
    folder = resolve("tiny-hard")
    codec = load_codec(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    @torch.inference_mode()
    def greedy(prompt, most, stops):
        ids = []
        while len(ids) < most:
            token = int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax())
            ids.append(token)
            text = codec.decode(ids)
            hit = next((stop for stop in stops if stop in text), None)
            if hit or token in codec.eos_ids:
                return ids, hit, True
        return ids, None, False

    local = [Episode(question, codec, agent, 2) for question in questions]
    session = load_policy(PolicyConfig(path="tiny-hard", device="cpu")).session()
    session.run(local, retriever, 0.0, 0)
    session.close()
    with running(CompletionsServer(greedy, codec.decode).app) as url:
        policy = connect(f"{url}/v1", tokenizer=folder, concurrency=3)
        remote = [Episode(question, codec, agent, 2) for question in questions]
        served = policy.session()
        served.run(remote, retriever, 0.0, 0)
        policy.client.close()
    assert policy.client.model == "the-model"
    for one, other in zip(local, remote, strict=True):
        assert one.rollout().tokens == other.rollout().tokens
        assert one.rollout().turns == other.rollout().turns
        assert other.encoded_anew == 0
    assert any(episode.rollout().turns[0].action == "search" for episode in local)


SLOW = slow(1.5)
BAD = [
    says("<html>504</html>"),
    says([1, 2]),
    says({"choices": []}),
    says({"choices": [{"text": None, "finish_reason": "stop"}]}),
    says({"choices": [{"text": "", "finish_reason": "length"}]}),
    says({"choices": [{"text": "x", "finish_reason": "tool_calls"}]}),
    says({"choices": [{"text": "x", "finish_reason": "stop", "token_ids": ["x"]}]}),
    says({"choices": [{"text": "x", "finish_reason": "stop", "token_ids": [10**12]}]}),
    says({"choices": [{"text": "x", "finish_reason": "stop", "token_ids": [9] * 999}]}),
    says({"choices": [{"text": "x", "finish_reason": "stop", "prompt_token_ids": [1]}]}),
    says('{"choices": [{"text": "\\ud800", "finish_reason": "stop"}]}'),
    status(500),
    status(503),
    SLOW,
]


@pytest.mark.parametrize("fault", BAD)
def test_a_fault_is_tried_again_and_then_ends_its_own_rollout_only(fault):
    server, timeout = serve(), 1.0 if fault is SLOW else 10.0
    server.faults = [fault, fault]
    with running(server.app) as url:
        (episode,), _ = roll(policy_at(url, timeout=timeout))
        assert episode.rollout().answer == "Oslo"
        server.faults = [fault] * 3
        other = Question("2", "Who?", ("x",))
        episodes, _ = roll(policy_at(url, timeout=timeout, concurrency=1), (QUESTION, other))
    assert "failed 3 times" in episodes[0].failure and str(url) in episodes[0].failure
    with pytest.raises(RuntimeError, match="failed 3 times"):
        episodes[0].rollout()
    assert episodes[1].rollout().answer == "Oslo"


def test_a_page_instead_of_json_shows_its_first_words():
    server = serve()
    server.faults = [says("<html><h1>It works!</h1></html>")] * 3
    with running(server.app) as url:
        (episode,), _ = roll(policy_at(url))
    assert episode.failure.endswith("'<html><h1>It works!</h1></html>'")


def test_the_first_failure_is_said_at_once(capsys):
    client = CompletionClient("http://127.0.0.1:9/v1", "m", retries=2, sleep=lambda seconds: None)
    with pytest.raises(EndpointError, match="failed 3 times"):
        client.complete([65], 5, 0.0, 0)
    client.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rexrag: http://127.0.0.1:9/v1") and "trying again, 2 times at most" in line


def test_proxy_settings_that_cannot_be_used_are_one_line(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "localhost,fe80::/10")
    with pytest.raises(ConfigError, match="NO_PROXY"):
        CompletionClient("http://policy.invalid:8000/v1", "m")
    CompletionClient("http://127.0.0.1:8000/v1", "m").close()  # a proxy is not asked for this machine


def test_an_answer_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(client_module, "MOST_BYTES", 1000)
    server = serve()
    server.faults = [says("x" * 5000)] * 3
    with running(server.app) as url:
        (episode,), _ = roll(policy_at(url))
    assert "the answer is longer than 1,000 bytes" in episode.failure


def test_an_answer_that_trickles_in_is_given_up_after_the_time_limit():
    async def trickle():
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.05)

    server = serve()
    server.faults = [lambda body: StreamingResponse(trickle())]
    with running(server.app) as url:
        start = time.monotonic()
        (episode,), _ = roll(policy_at(url, retries=0, timeout=0.5))
    assert "no whole answer within 0.5 s" in episode.failure and time.monotonic() - start < 4


def test_more_text_than_its_tokens_can_hold_is_refused_before_it_is_encoded():
    body = {"choices": [{"text": "word " * 1_200_000, "finish_reason": "stop"}]}
    with pytest.raises(ValueError, match=r"a text of 6,000,000 characters for 48 tokens at most"):
        parse_completion(body, [1], 48)


class SmallCodec(CharCodec):
    vocabulary = 1000


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (
            {"text": "hm <search> it </search>", "token_ids": [104, 5000]},
            "token id 5000, but 1,000 are known",
        ),
        ({"text": "hm", "token_ids": [65, 66]}, "its token ids say str 'AB', its text str 'hm'"),
    ],
)
def test_a_wrong_tokenizer_is_found_out_in_the_first_answer(choice, said):
    server = serve()
    server.faults = [says({"choices": [{"finish_reason": "stop", **choice}]})]
    with running(server.app) as url:
        client = CompletionClient(f"{url}/v1", "the-model", sleep=lambda seconds: None)
        with pytest.raises(ConfigError) as caught:
            roll(EndpointPolicy(client, SmallCodec()))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "is not that of the-model; name it with --tokenizer" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "hm <search> it",
        "hm <search> it </search>",
        " hm<search>it</search>",
        "",
        "hm <search> it </search> \ufffd",
    ],
)
def test_text_may_lack_its_stop_its_spaces_and_cut_characters(text):
    policy = EndpointPolicy(CompletionClient("http://x:1", "m"), CODEC)
    done = Completion(text, tuple(CODEC.encode("hm <search> it </search>")), True, None, False)
    assert policy.tokens(done, 100) == (CODEC.encode("hm <search> it </search>"), True)
    policy.client.close()


def test_a_running_event_loop_is_no_obstacle():
    """A notebook has one."""

    async def in_a_notebook(url):
        return roll(policy_at(url))

    with running(serve().app) as url:
        ((episode,), _) = asyncio.run(in_a_notebook(url))
    assert episode.rollout().answer == "Oslo"


def test_tokens_that_say_nothing_are_a_fault_and_not_an_endless_loop():
    body = {"choices": [{"text": "abc", "token_ids": [], "finish_reason": "length"}]}
    with pytest.raises(ValueError, match="an empty completion at the token limit"):
        parse_completion(body, [1], 5)


def test_the_tag_that_was_opened_last_is_the_one_that_stopped():
    assert _trimmed_stop("I could <search> and so <answer> Oslo ", None, False) == "</answer>"
    assert _trimmed_stop("first <answer> no, <search> Oslo ", None, False) == "</search>"


def test_an_end_token_that_is_written_out_is_not_read_as_text():
    codec = load_codec(resolve("tiny-hard"))
    end = codec.decode([min(codec.eos_ids)])
    assert end.strip() and _without_end(f"oslo{end}", codec) == "oslo"


def test_a_bad_request_is_not_repeated():
    server = serve()
    server.faults = [status(400), status(400)]
    with running(server.app) as url:
        (episode,), _ = roll(policy_at(url))
    assert "status 400" in episode.failure and len(server.requests) == 2  # with and without the options


def test_a_refusal_that_concerns_every_question_stops_all():
    server = serve()
    server.faults = [status(401)]
    with running(server.app) as url, pytest.raises(ConfigError, match=r"401.*REXRAG_POLICY_TOKEN"):
        roll(policy_at(url))


def test_a_failed_search_ends_its_own_rollout():
    with running(serve().app) as url:
        (episode,), _ = roll(policy_at(url), retriever=FakeRetriever(failures=1))
    assert "told to fail" in episode.failure


def test_a_server_asks_for_a_pause():
    server, pauses = serve(), []
    server.faults = [status(429, **{"Retry-After": "7"})]
    with running(server.app) as url:
        client = CompletionClient(f"{url}/v1", "m", sleep=pauses.append)
        assert client.complete([65], 50, 0.0, 0).text.startswith("hm")
        client.close()
    assert pauses == [7.0]


def test_rollouts_share_the_endpoint_and_the_retriever():
    server = serve()
    server.faults = [slow(0.05)] * 32
    retriever = FakeRetriever(RETRIEVER.answers)
    questions = [Question(str(i), "Where?", ("Oslo",)) for i in range(16)]
    with running(server.app) as url:
        episodes, _ = roll(policy_at(url, concurrency=8), questions, retriever)
    assert all(episode.rollout().answer == "Oslo" for episode in episodes)
    assert 2 <= server.most_at_once <= 8
    # All ask the same; those that wait for it together share a search.
    assert sum(len(queries) for queries, _ in retriever.calls) <= 16


def test_seeds_differ_between_rollouts_and_turns_and_come_again():
    def seeds():
        server = serve()
        with running(server.app) as url:
            roll(policy_at(url, concurrency=1), (QUESTION, QUESTION), temperature=1.0)
        return [request["seed"] for request in server.requests]

    first = seeds()
    assert len(set(first)) == len(first) == 4 and first == seeds()


def test_the_server_stops_where_the_protocol_says(monkeypatch):
    class Shout(Tags):
        stop_strings = ("</SEARCH>", "</ANSWER>")

    agent = AGENT.model_copy(update={"protocol": register_protocol(Shout())})
    monkeypatch.setitem(globals(), "AGENT", agent)
    server = serve()
    with running(server.app) as url:
        roll(policy_at(url))
    assert all(request["stop"] == ["</SEARCH>", "</ANSWER>"] for request in server.requests)


def test_an_end_token_ends_the_turn():
    server = serve(script=lambda prompt: "I do not know")
    with running(server.app) as url:
        (episode,), _ = roll(policy_at(url))
    rollout = episode.rollout()
    assert rollout.answer is None and [turn.action for turn in rollout.turns] == [None, None, None]


def test_what_connect_refuses(monkeypatch):
    server = serve()
    with running(server.app) as url:
        server.names = ["a", "b"]
        with pytest.raises(ConfigError, match=r"a, b.*--model"):
            connect(f"{url}/v1")
        with pytest.raises(ConfigError, match="--tokenizer"):
            connect(f"{url}/v1", "/no/model")
    for url, word in (
        ("http://x/v1?key=K", "without a query"),
        ("http://u:p@x/v1", "secret"),
        ("ftp://x", "expected for example"),
    ):
        with pytest.raises(ConfigError, match=word):
            base_url(url)
    assert str(base_url("http://x:1")) == "http://x:1/v1"
    assert str(base_url("http://x:1/v1/completions")) == "http://x:1/v1"
    policy = EndpointPolicy(CompletionClient("http://x:1", "m"), CODEC)
    with pytest.raises(ModelError, match="cannot score"):
        policy.score([], 1.0)
    policy.client.close()


def test_the_token_is_sent_and_never_part_of_the_identity(monkeypatch):
    monkeypatch.setenv("REXRAG_POLICY_TOKEN", "secret")
    client = CompletionClient("http://127.0.0.1:1/v1", "m")
    assert client._http._http.headers["Authorization"] == "Bearer secret"
    with_token = EndpointPolicy(client, CODEC).digest
    client.close()
    monkeypatch.delenv("REXRAG_POLICY_TOKEN")
    client = CompletionClient("http://127.0.0.1:1/v1", "m")
    assert EndpointPolicy(client, CODEC).digest == with_token
    client.close()

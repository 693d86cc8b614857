"""Protocols by name: the built-in one, a plug-in, and what is no protocol."""

import pytest

from rexrag.agent.episode import Episode, State
from rexrag.agent.protocols import Action, protocol_of, register_protocol
from rexrag.agent.protocols.tags import Tags
from rexrag.config.schema import AgentConfig
from rexrag.errors import ConfigError, PluginError
from rexrag.types import Question
from tests.support.fakes import CharCodec, document

HERE = "tests.agent.protocols.test_protocols"


class Lines:
    """A line that begins with `?` searches, one that begins with `=` answers."""

    notice = "\n(no)\n"
    stop_strings = ("\n",)

    def parse_action(self, text):
        start = max(text.find("?"), text.find("="))
        end = text.find("\n", start)
        if start < 0 or end < 0:
            return None
        kind = "search" if text[start] == "?" else "answer"
        return Action(kind, text[start + 1 : end].strip(), start, end + 1)

    def render_evidence(self, documents, codec, max_tokens):
        return codec.encode("[" + " ".join(d.title for d in documents) + "]")[:max_tokens]


class NoNotice:
    stop_strings = ("\n",)


class NumberAsNotice(Lines):
    notice = 3


class OneText(Lines):
    stop_strings = "\n"


class EmptyStop(Lines):
    stop_strings = ("",)


class FailsToStart(Lines):
    def __init__(self):
        raise OSError("no grammar here")


class OneArgument(Lines):
    def render_evidence(self, documents):
        return []


def test_the_built_in_protocol_is_one_object():
    assert isinstance(protocol_of("tags"), Tags) and protocol_of("tags") is protocol_of("tags")


@pytest.mark.parametrize("name", [f"{HERE}:Lines", None])
def test_an_episode_speaks_a_protocol_of_one_s_own(name):
    config = AgentConfig(template="terse", protocol=name or register_protocol(Lines()), search_turns=2)
    episode = Episode(Question("q", "who", ("al",)), CharCodec(), config)

    def say(text):
        for token in CharCodec().encode(text):
            episode.sampled(token, -1.0)

    say("hm ? paris\n")
    assert (episode.state, episode.query) == (State.SEARCH, "paris")
    episode.found([document("Paris")])
    assert CharCodec().decode(episode.forced) == "[Paris]"
    episode.take_forced([])
    say("so")
    episode.sampled(0, -1.0)
    assert CharCodec().decode(episode.forced) == "\n(no)\n"
    episode.take_forced([])
    say("= al\n")
    rollout = episode.rollout()
    assert (rollout.answer, rollout.correct) == ("al", True)
    assert CharCodec().decode(rollout.tokens[rollout.answer_start :]) == "= al\n"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tgas", "did you mean 'tags'?"),
        (f"{HERE}:Line", f"{HERE} has no 'Line'; did you mean 'Lines'?"),
        (f"{HERE}:NoNotice", "it has no 'notice'"),
        (f"{HERE}:NumberAsNotice", "notice is 3, expected text"),
        (f"{HERE}:OneText", r"stop_strings is '\n', expected a tuple of texts"),
        (f"{HERE}:EmptyStop", "stop_strings is ('',), expected a tuple of texts, none empty"),
        (f"{HERE}:FailsToStart", "OSError: no grammar here"),
        (f"{HERE}:OneArgument", "takes (documents), expected 3 positional arguments"),
    ],
)
def test_what_is_no_protocol_is_one_line(name, says):
    with pytest.raises(PluginError) as caught:
        protocol_of(name)
    assert str(caught.value).startswith(f"agent.protocol = '{name}'")
    assert says in str(caught.value) and "\n" not in str(caught.value)


class Faulty(Lines):
    """Does what a test sets it to, in place of what `Lines` does."""

    def __init__(self, parse=Lines.parse_action, render=Lines.render_evidence):
        self.parse, self.render = parse, render

    def parse_action(self, text):
        return self.parse(self, text)

    def render_evidence(self, documents, codec, max_tokens):
        return self.render(self, documents, codec, max_tokens)


def fails(*arguments):
    raise IndexError("list index out of range")


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        ({"parse": fails}, "parse_action: IndexError: list index out of range"),
        ({"parse": lambda *given: "search"}, "parse_action: returned 'search', expected Action or None"),
        ({"render": fails}, "render_evidence: IndexError: list index out of range"),
        ({"render": lambda *given: None}, "render_evidence: returned None, expected token ids"),
        ({"render": lambda *given: "text"}, "render_evidence: returned 'text', expected token ids"),
    ],
)
def test_a_protocol_that_fails_in_an_episode_is_one_line(faults, says):
    name = register_protocol(Faulty(**faults))
    config = AgentConfig(template="terse", protocol=name)
    with pytest.raises(PluginError) as caught:
        episode = Episode(Question("q", "who", ("al",)), CharCodec(), config)
        episode.sampled(CharCodec().encode("\n")[0], -1.0)
    assert str(caught.value) == f"agent.protocol = '{name}', {says}"
    assert name.startswith(f"{HERE}:Faulty")


def test_a_frame_that_does_not_fit_is_the_protocol_s_own_error():
    def refuses(*given):
        raise ConfigError("evidence_tokens = 1: too few")

    config = AgentConfig(template="terse", protocol=register_protocol(Faulty(render=refuses)))
    with pytest.raises(ConfigError, match=r"^evidence_tokens = 1: too few$"):
        Episode(Question("q", "who", ("al",)), CharCodec(), config)


def test_every_registered_object_says_its_own_notice_also_after_a_change():
    codec, said = CharCodec(), []
    first, second = Lines(), Lines()
    for protocol, notice in ((first, "(first)"), (second, "(second)"), (first, "(third)")):
        protocol.notice = notice
        config = AgentConfig(template="terse", protocol=register_protocol(protocol))
        episode = Episode(Question("q", "who", ("al",)), codec, config)
        episode.sampled(0, -1.0)
        said.append(codec.decode(episode.forced))
    assert said == ["(first)", "(second)", "(third)"]

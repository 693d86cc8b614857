"""Protocols by name: the built-in one, a plug-in, and what is no protocol."""

import pytest

from rexrag.agent.episode import Episode, State
from rexrag.agent.protocols import Action, protocol_of, register_protocol
from rexrag.agent.protocols.tags import Tags
from rexrag.config.schema import AgentConfig
from rexrag.errors import PluginError
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
        (f"{HERE}:OneArgument", "takes (documents), expected 3 positional arguments"),
    ],
)
def test_what_is_no_protocol_is_one_line(name, says):
    with pytest.raises(PluginError) as caught:
        protocol_of(name)
    assert str(caught.value).startswith(f"agent.protocol = '{name}'")
    assert says in str(caught.value) and "\n" not in str(caught.value)

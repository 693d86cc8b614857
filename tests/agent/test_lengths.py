"""Questions that are too long are all found, and texts without end are refused before they are encoded."""

from pathlib import Path

import pytest

from rexrag.agent.episode import Episode
from rexrag.agent.lengths import describe, too_long
from rexrag.config.schema import AgentConfig, Config, DataConfig
from rexrag.data.questions import load_questions
from rexrag.errors import ConfigError, DataError
from rexrag.training.components import Data, fit_prompts
from rexrag.types import Question
from tests.support.fakes import CharCodec

AGENT = AgentConfig(template="terse", turn_tokens=50, evidence_tokens=60, total_tokens=300)
OVERLONG = Path(__file__).parents[1] / "cases" / "q_overlong.jsonl"


class CountingCodec(CharCodec):
    def __init__(self) -> None:
        self.prompted = 0

    def prompt(self, user_message: str) -> list[int]:
        self.prompted += 1
        return super().prompt(user_message)


def test_every_question_that_is_too_long_is_counted_and_named() -> None:
    questions = load_questions(OVERLONG)
    long = too_long(questions, CharCodec(), AGENT)
    assert [question.group for question in long] == ["local/train/9"]
    many = [Question(str(i), "x" * (200 + 20 * i), ("y",)) for i in range(20)]
    assert len(too_long(many, CharCodec(), AGENT)) == 15
    assert describe(too_long(many, CharCodec(), AGENT), 20, AGENT).endswith(
        "15 of 20 questions leave no room for a response in agent.total_tokens = 300: "
        "local/train/5, local/train/6, local/train/7, local/train/8, local/train/9 and 10 more"
    )


def test_short_questions_are_not_encoded_one_by_one() -> None:
    codec = CountingCodec()
    assert too_long([Question(str(i), "who?", ("y",)) for i in range(1000)], codec, AGENT) == []
    assert codec.prompted == 1


def test_a_window_that_holds_nothing_is_a_mistake_of_the_configuration() -> None:
    narrow = AGENT.model_copy(update={"evidence_tokens": 3})
    with pytest.raises(ConfigError, match=r"agent\.evidence_tokens"):
        too_long([Question("1", "who?", ("y",))], CharCodec(), narrow)
    assert too_long([], CharCodec(), AGENT) == []


def test_questions_that_are_too_long_are_refused_or_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    questions = load_questions(OVERLONG)
    data, config = Data(questions, questions, ""), Config(agent=AGENT)
    with pytest.raises(DataError, match=r"^2 of 18 questions.*local/train/9.*data\.skip_long = true"):
        fit_prompts(data, CharCodec(), config)
    skipping = Config(agent=AGENT, data=DataConfig(skip_long=True))
    kept = fit_prompts(data, CharCodec(), skipping)
    assert len(kept.train) == len(kept.dev) == len(questions) - 1
    assert "left out: 2 of 18 questions" in capsys.readouterr().err
    with pytest.raises(DataError, match="none is left"):
        fit_prompts(Data(questions[-1:], [], ""), CharCodec(), skipping)


def test_a_text_without_end_is_refused_before_it_is_encoded() -> None:
    codec = CountingCodec()
    with pytest.raises(DataError, match=r"6,000,0\d\d characters"):
        Episode(Question("1", "x" * 6_000_000, ("y",)), codec, AGENT)
    assert codec.prompted == 0

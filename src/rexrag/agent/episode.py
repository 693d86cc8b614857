"""One multi-turn rollout as a pure state machine: no model, no IO (METHOD §1, §2.4).

    SAMPLE --sampled()--> SAMPLE | FORCED (a notice) | SEARCH | DONE
    SEARCH --found()----> FORCED (evidence) | DONE
    FORCED --take_forced()--> SAMPLE

The same code runs under the local sampler, token by token, and under an engine that samples a whole turn at
once and feeds it here token by token. Tokens are kept as they were sampled: text is decoded only to look for
an action, and nothing decoded is ever encoded again.

A turn ends at the first complete action, at an end-of-sequence token, or after `turn_tokens` sampled tokens.
After `search_turns` turns one more follows in which a search is not run. Prompt and response together never
exceed `total_tokens`; an insertion that does not fit, with at least one token to sample after it, ends the
rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Protocol
from weakref import WeakKeyDictionary, ref

from rexrag.agent.prompts import render_prompt
from rexrag.agent.protocols import Action, AgentProtocol, protocol_of
from rexrag.agent.protocols.tags import LONGEST_TOKEN
from rexrag.agent.scoring import Scoring
from rexrag.config.schema import AgentConfig
from rexrag.errors import DataError
from rexrag.types import Document, Origin, Probe, Question, Rollout, StopReason, Turn

POLICY = int(Origin.POLICY)


class Codec(Protocol):
    """Text to token ids and back, and a user message to a prompt."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with no special tokens added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids: special tokens kept, spaces left as they are."""
        ...

    def prompt(self, user_message: str) -> list[int]:
        """Prompt ids: the chat template where the tokenizer has one, with a generation prompt."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]: ...


class State(StrEnum):
    """What an episode waits for."""

    SAMPLE = "sample"
    """`sampled(token, logp)`."""
    FORCED = "forced"
    """`forced` to be run through the model, then `take_forced`."""
    SEARCH = "search"
    """Documents for `query`, then `found`."""
    DONE = "done"
    """`rollout()` is ready."""


class _Tables(dict[int, bool]):
    """What is kept of a codec under a protocol: token id -> may it end a turn, and the notice's tokens.

    Only a token that holds the last character of a stop string can complete one, whatever it is merged with,
    so that no other token needs a look at the text.
    """

    def __init__(self, codec: Codec, protocol: AgentProtocol, evidence_tokens: int) -> None:
        super().__init__()
        self.codec = ref(codec)  # a strong reference would keep the codec alive through its own table
        self.eos = codec.eos_ids
        self.last = {text[-1] for text in protocol.stop_strings}
        self.notice = tuple(codec.encode(protocol.notice))
        protocol.render_evidence((), codec, evidence_tokens)  # refuses where an empty frame does not fit

    def __missing__(self, token: int) -> bool:
        codec = self.codec()
        assert codec is not None
        text = codec.decode([token])
        stops = self[token] = token in self.eos or any(character in text for character in self.last)
        return stops


_TABLES: WeakKeyDictionary[Codec, dict[tuple[AgentProtocol, int], _Tables]] = WeakKeyDictionary()


def _tables(codec: Codec, protocol: AgentProtocol, evidence_tokens: int) -> _Tables:
    known = _TABLES.setdefault(codec, {})
    if (protocol, evidence_tokens) not in known:
        known[protocol, evidence_tokens] = _Tables(codec, protocol, evidence_tokens)
    return known[protocol, evidence_tokens]


class Episode:
    """A rollout in the making. `tokens`, `origins` and `logps` are the response so far, aligned.

    Raises DataError where the prompt leaves no token to sample, ConfigError where `evidence_tokens` cannot
    hold even an empty `<information>` block.
    """

    def __init__(
        self,
        question: Question,
        codec: Codec,
        config: AgentConfig,
        topk: int = 3,
        message: str | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        """message: replaces the user message that `config.template` makes of the question. scoring: reward
        and judge of answers, None for those that `config` names."""
        self.question, self.codec, self.config, self.topk = question, codec, config, topk
        self.scoring = scoring or Scoring.of(config)
        self.protocol = protocol_of(config.protocol)
        self._stops = _tables(codec, self.protocol, config.evidence_tokens)
        if message is None:
            message = render_prompt(config.template, question.text)
        if len(message) > LONGEST_TOKEN * config.total_tokens:  # before hours of encoding
            raise DataError(
                f"question '{question.group}': its prompt has {len(message):,} characters, "
                f"agent.total_tokens = {config.total_tokens} leaves no room for a response"
            )
        self.prompt: tuple[int, ...] = tuple(codec.prompt(message))
        self._room = config.total_tokens - len(self.prompt)
        if self._room < 1:
            raise DataError(
                f"question '{question.group}': its prompt has {len(self.prompt)} tokens, "
                f"agent.total_tokens = {config.total_tokens} leaves no room for a response"
            )
        self.tokens: list[int] = []
        self.origins: list[int] = []
        self.logps: list[float] = []
        self.turns: list[Turn] = []
        self.forced: tuple[int, ...] = ()
        self.forced_origin = Origin.EVIDENCE
        self.query = ""
        self.stop: StopReason | None = None
        self.answer: str | None = None
        self.parent: Episode | None = None
        self.cut: int | None = None
        self.cue: int | None = None
        self.cue_length = 0
        self.failure = ""
        """Why an engine gave up on this rollout; empty where it did not."""
        self.encoded_anew = 0
        """Turns whose tokens an engine had to make from text; the others are as they were sampled."""
        self._begin_turn()

    # -- what an engine calls ------------------------------------------------------------------------------

    def sampled(self, token: int, logp: float) -> None:
        """One token was sampled (state SAMPLE); may change the state."""
        if self.state is not State.SAMPLE:
            raise RuntimeError(f"a token was sampled in state '{self.state}'")
        tokens = self.tokens
        tokens.append(token)
        self.origins.append(POLICY)
        self.logps.append(logp)
        if self._stops[token] or len(tokens) >= self._limit:
            self._look(token)

    def take_forced(self, logps: Sequence[float]) -> None:
        """`forced` was run through the model. `logps` are kept for CUE tokens and 0.0 is stored otherwise."""
        if self.state is not State.FORCED:
            raise RuntimeError(f"forced tokens were appended in state '{self.state}'")
        forced, is_cue = self.forced, self.forced_origin is Origin.CUE
        if is_cue and len(logps) != len(forced):
            raise ValueError(f"{len(forced)} cue tokens need as many log-probs, got {len(logps)}")
        self.tokens += forced
        self.origins += [int(self.forced_origin)] * len(forced)
        self.logps += map(float, logps) if is_cue else [0.0] * len(forced)
        self.forced = ()
        if is_cue:
            self._resume_turn()
        else:
            self._begin_turn()

    def found(self, documents: Sequence[Document]) -> None:
        """The answer to SEARCH: evidence becomes `forced`, or ends the rollout where it does not fit."""
        if self.state is not State.SEARCH:
            raise RuntimeError(f"documents came in state '{self.state}'")
        documents = documents[: self.topk]
        self.turns[-1] = replace(self.turns[-1], documents=tuple(d.id for d in documents))
        self.query = ""
        shown = self.protocol.render_evidence(documents, self.codec, self.config.evidence_tokens)
        self._force(shown, Origin.EVIDENCE)

    @property
    def tokens_left(self) -> int:
        """How many tokens the turn may still sample (state SAMPLE)."""
        return self._limit - len(self.tokens)

    def give_up(self, reason: str) -> None:
        """End this rollout without a result: its engine cannot go on. `rollout()` raises then."""
        self.failure, self.state = reason, State.DONE

    def fork(self, cue: Sequence[int], cue_index: int | None = None) -> Episode:
        """A probe of this finished rollout: its tokens up to the cut, then `cue` as forced CUE tokens.

        The cut is before the `<answer>` tag; in an unanswered rollout, before the action its last turn was
        spent on, or at that turn's end. The probe inherits the turns before that one. The turn that was cut
        is reopened, not spent twice: it keeps its number and the tokens it has used of `turn_tokens` (unless
        it had used them all), and its record spans the cue. Only what the policy says after the cue can
        complete an action. With an empty cue the probe goes straight on. A cue that does not fit the window
        is not given: the probe is DONE at its cut, unanswered.
        """
        if self.state is not State.DONE or not self.turns:
            raise RuntimeError("only a finished rollout can be probed")
        last = self.turns[-1]
        cut = last.end if last.action_start is None else last.action_start
        probe = Episode.__new__(type(self))
        probe.__dict__.update(self.__dict__)
        probe.tokens, probe.origins, probe.logps = self.tokens[:cut], self.origins[:cut], self.logps[:cut]
        probe.turns = self.turns[:-1]
        probe.stop = probe.answer = None
        probe.parent, probe.cut = self, cut
        probe.cue, probe.cue_length, probe.encoded_anew = None, 0, 0
        probe._turn_start = last.start
        probe._turn_used = self.origins[last.start : cut].count(POLICY)
        if not cue and cut < self._room:
            probe._resume_turn()
        elif probe._force(cue, Origin.CUE):
            probe.cue, probe.cue_length = cue_index, len(cue)
        return probe

    def rollout(self) -> Rollout:
        """The finished rollout with its answer and reward (state DONE)."""
        if self.stop is None:
            raise RuntimeError(self.failure or f"the rollout is not finished: state '{self.state}'")
        rollout = Rollout(
            question=self.question,
            prompt=self.prompt,
            tokens=tuple(self.tokens),
            origins=tuple(self.origins),
            logps=tuple(self.logps),
            turns=tuple(self.turns),
            stop=self.stop,
            answer=self.answer,
            reward=0.0,
            text=self.codec.decode(self.tokens),
            forced_last_turn=len(self.turns) > self.config.search_turns,
        )
        return self.scoring.scored(rollout)

    def probe(self, parent: Rollout) -> Probe:
        """The finished probe that this fork became. parent: the rollout it was forked from."""
        if self.cut is None:
            raise RuntimeError("this episode is no fork of another")
        return Probe(self.rollout(), parent, self.cut, self.cue, self.cue_length)

    # -- turns ---------------------------------------------------------------------------------------------

    def _begin_turn(self) -> None:
        self._turn_start, self._turn_used = len(self.tokens), 0
        self._resume_turn()

    def _resume_turn(self) -> None:
        """Sample from here on, with what is left of the turn's tokens; all of them where nothing is left."""
        self._read_from = len(self.tokens)
        left = self.config.turn_tokens - self._turn_used
        self._limit = min(self._read_from + (left if left > 0 else self.config.turn_tokens), self._room)
        self.state = State.SAMPLE

    def _look(self, token: int) -> None:
        """Does the turn end with this token?"""
        text, action = "", None
        if token not in self._stops.eos:
            text = self.codec.decode(self.tokens[self._read_from :])
            action = self.protocol.parse_action(text)
        if action is not None:
            self._end_turn(self._record(text, action))
        elif token in self._stops.eos or len(self.tokens) >= self._limit:
            text, end = self.codec.decode(self.tokens[self._read_from :]), len(self.tokens)
            thought = self._thought_end(text, len(text), end)
            self._end_turn(Turn(self._turn_start, end, thought_end=thought))

    def _end_turn(self, turn: Turn) -> None:
        self.turns.append(turn)
        if turn.action == "answer":
            self.answer = turn.argument
            self._finish(StopReason.ANSWER)
        elif len(self.tokens) >= self._room:
            self._finish(StopReason.LENGTH)
        elif len(self.turns) > self.config.search_turns:
            self._finish(StopReason.TURNS)
        elif turn.action == "search":
            self.query, self.state = turn.argument, State.SEARCH
        else:
            self._force(self._stops.notice, Origin.NOTICE)

    def _record(self, text: str, action: Action) -> Turn:
        """The turn that ends with this action; `text` is what was sampled since `_read_from`."""
        action_start = self._boundary(action.start, len(self.tokens))
        return Turn(
            self._turn_start,
            len(self.tokens),
            action.kind,
            action.argument,
            action_start,
            self._thought_end(text, action.start, action_start),
        )

    def _thought_end(self, text: str, stop: int, end: int) -> int | None:
        """Token boundary before the last `</think>` that begins before character `stop`; `end` at most."""
        thought = text.rfind("</think>", 0, stop)
        return self._boundary(thought, end) if thought >= 0 else None

    def _boundary(self, position: int, end: int) -> int:
        """Largest token boundary, `end` at most, whose text ends at or before character `position`."""
        first = self._read_from
        while end > first and len(self.codec.decode(self.tokens[first:end])) > position:
            end -= 1
        return end

    def _force(self, tokens: Sequence[int], origin: Origin) -> bool:
        """Insert tokens; False where they leave no token to sample, which ends the rollout."""
        if len(self.tokens) + len(tokens) >= self._room:
            self._finish(StopReason.LENGTH)
            return False
        self.forced, self.forced_origin, self.state = tuple(tokens), origin, State.FORCED
        return True

    def _finish(self, reason: StopReason) -> None:
        self.stop, self.state = reason, State.DONE

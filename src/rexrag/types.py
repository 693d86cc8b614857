"""The records that flow through rexrag, and the words for them.

    questions → RolloutGroup (rollouts → dead ends → probes → kept) → rows → Samples → update → run folder

Positions are always indices into a *response* (`Rollout.tokens`), never into prompt + response.
Shape suffixes used on tensors throughout: B rows, T response tokens, K probes, G rollouts of a group,
m tokens of a cue, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Origin(IntEnum):
    """Where a response token came from. Only POLICY, and CUE in some variants, can be trained on."""

    POLICY = 0
    """Sampled by the model: thoughts, searches, answers."""
    CUE = 1
    """A probe's cue, inserted by the program."""
    EVIDENCE = 2
    """Retrieved text, inserted by the environment. Never trained on."""
    NOTICE = 3
    """The environment's text after a turn without a valid action. Never trained on."""


class StopReason(StrEnum):
    """Why a rollout ended."""

    ANSWER = "answer"
    """A complete `<answer>…</answer>`."""
    TURNS = "turns"
    """The last turn ended without an answer."""
    LENGTH = "length"
    """`agent.total_tokens` were reached without an answer."""


class DeadEnd(StrEnum):
    """Kinds of dead ends (METHOD §2)."""

    WRONG = "wrong"
    """It answered, and the answer is not correct."""
    UNANSWERED = "unanswered"
    """It never answered."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its accepted answers; `group` is unique across merged data sets."""

    id: str
    text: str
    answers: tuple[str, ...]
    source: str = "local"
    split: str = "train"
    hops: int = 0
    """Number of facts needed; 0 where unknown."""
    kind: str = ""
    """Template or question type, for tables by kind."""

    @property
    def group(self) -> str:
        return f"{self.source}/{self.split}/{self.id}"


@dataclass(frozen=True, slots=True)
class Document:
    """A retrieved passage. `contents` is `"Title"` newline text, as in Search-R1's corpora."""

    id: str
    contents: str
    score: float = 0.0

    @property
    def title(self) -> str:
        return self.contents.split("\n", 1)[0].strip().strip('"')

    @property
    def text(self) -> str:
        return self.contents.split("\n", 1)[1] if "\n" in self.contents else ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the policy: the tokens that it sampled, and its action.

    `start:end` are the sampled tokens. `action` is "search", "answer" or None (no valid action).
    `action_start` is the token boundary at or before the action's opening tag: everything before it was
    written before the tag began. `thought_end` is the boundary at or before the last `</think>` that
    precedes the action, None where no thought was closed. `documents` are the ids that a search returned.
    """

    start: int
    end: int
    action: str | None = None
    argument: str = ""
    action_start: int | None = None
    thought_end: int | None = None
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished response with an origin and a log-probability for each token.

    `logps` are log π_old of POLICY and CUE tokens as the sampler saw them (natural log, temperature
    applied), 0.0 for EVIDENCE and NOTICE.
    """

    question: Question
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    origins: tuple[int, ...]
    logps: tuple[float, ...]
    turns: tuple[Turn, ...]
    stop: StopReason
    answer: str | None
    reward: float
    em: float = 0.0
    """Exact match of the answer, whatever the reward is made of."""
    correct: bool = False
    """What the judge of answers decided; exact match by default."""
    text: str = ""
    forced_last_turn: bool = False
    """The rollout ended in the extra turn in which a search is not run."""

    @property
    def answer_start(self) -> int | None:
        """Token boundary at or before the answer's opening tag: where a probe would cut."""
        last = self.turns[-1] if self.turns else None
        return last.action_start if last is not None and last.action == "answer" else None

    def count(self, origin: Origin) -> int:
        return self.origins.count(int(origin))


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A base rollout cut before its answer and continued by the same policy, after a cue or without one.

    `cut` is the index of the first cue token in `rollout`; `cue` the cue's index in its pool, None where the
    probe only continues; `score` what the filter ranks by; `kept` whether it is trained.
    """

    rollout: Rollout
    parent: Rollout
    cut: int
    cue: int | None = None
    cue_length: int = 0
    score: float = 0.0
    kept: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup:
    """One question of a step: its base rollouts, and the probes of those that were dead ends."""

    question: Question
    rollouts: tuple[Rollout, ...]
    probes: tuple[Probe, ...] = ()

    @property
    def kept(self) -> tuple[Probe, ...]:
        return tuple(probe for probe in self.probes if probe.kept)

    @property
    def trained(self) -> tuple[Rollout, ...]:
        """Base rollouts, then kept probes."""
        return (*self.rollouts, *(probe.rollout for probe in self.kept))

    @property
    def has_signal(self) -> bool:
        """Do the trained rollouts differ in reward? Otherwise every advantage is 0."""
        return len({rollout.reward for rollout in self.trained}) > 1


def searches_run(turns: Sequence[Turn], forced_last_turn: bool) -> int:
    """How many searches of a rollout were run: one in the forced last turn is not."""
    return sum(turn.action == "search" for turn in (turns[:-1] if forced_last_turn else turns))


@dataclass(frozen=True, slots=True)
class Sample:
    """One training row: a response and its aligned per-token streams. A learner sees nothing else.

    Worked example, a probe cut after two tokens (`rex-rag`, cue_loss "all"):

        tokens          hmm   </think>  <think>  wait   search…  <info>…  answer
        origin          POL   POL       CUE      CUE    POL      EVI      POL
        mask            1     1         1        1      1        0        1
        behaviour_logp  log μ of each token: what the importance ratio divides by
        weight          1     1         1        1      1        1        1
        truncated       0     0         0        0      0        0        0

    `weight` multiplies the token's surrogate (the weight for the sampler's numerics).
    `truncated` marks tokens trained with min(cap, ratio)·log π instead of the clipped ratio.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    mask: tuple[bool, ...]
    behaviour_logp: tuple[float, ...]
    advantage: float
    weight: tuple[float, ...] = ()
    """Empty means 1 for every token."""
    truncated: tuple[bool, ...] = ()
    """Empty means False for every token."""
    segment: tuple[int, ...] = ()
    """`Segment` of each token, for diagnostics only."""
    policy_logp: tuple[float, ...] = ()
    """log π_old of each token, for diagnostics only."""
    source: Rollout | None = None
    """The rollout that this row was made of, for diagnostics only."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures of a step that its groups do not show. seconds: of each phase."""

    alpha: float
    """Share of kept probes among the trained rows."""
    failure_rate: float
    """z, the share of wrong base rollouts."""
    ess: float
    """Effective sample size of the trained tokens, as a share of their number."""
    scored_tokens: int
    """Tokens that the model read again to score rows."""
    seconds: dict[str, float]
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    """Tokens that the sampling model read: prompts, evidence, cues, and rows that are scored again."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step: what was drawn, by question, and the rows to train on (base rollouts, then kept probes)."""

    groups: tuple[RolloutGroup, ...]
    samples: list[Sample]
    statistics: Statistics

    @property
    def rollouts(self) -> list[Rollout]:
        """All base rollouts."""
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def probes(self) -> list[Probe]:
        return [probe for group in self.groups for probe in group.probes]


class Segment(IntEnum):
    """Part of a training row, for diagnostics: METHOD §3's o′, cue and o″, or a base rollout."""

    BASE = 0
    PREFIX = 1
    CUE = 2
    SUFFIX = 3

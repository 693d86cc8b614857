"""The records that flow through rexrag, and the words for them.

    questions → rollouts → dead ends → probes → filter → densities → loss → update → run folder → report

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
    """A probe's hint, inserted by us."""
    EVIDENCE = 2
    """Retrieved text, inserted by the environment. Never in the loss."""
    NOTICE = 3
    """The environment's "that was no valid action". Never in the loss."""


class StopReason(StrEnum):
    """Why a rollout ended."""

    ANSWER = "answer"
    """A complete `<answer>…</answer>`."""
    TURNS = "turns"
    """The last turn was spent without an answer."""
    LENGTH = "length"
    """The token budget was spent without an answer."""


class DeadEnd(StrEnum):
    """What went wrong in a rollout that is worth probing (METHOD §2)."""

    WRONG = "wrong"
    """It answered, and the answer is not the gold one."""
    UNANSWERED = "unanswered"
    """It never answered."""
    NO_EVIDENCE = "no-evidence"
    """It answered wrongly without having searched."""
    REPEATED_SEARCH = "repeated-search"
    """It answered wrongly after asking the same query twice."""


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
    """One turn of the policy: what it sampled, and what it asked for.

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
    applied), 0.0 for EVIDENCE and NOTICE. A probe has `parent` (index of the base rollout in its step),
    `cut` (index of its first cue token), `cue` (index in the pool; None when it only continues) and
    `cue_length`.
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
    text: str = ""
    forced_last_turn: bool = False
    """The rollout ended in the extra turn in which a search is not run."""
    parent: int | None = None
    cut: int | None = None
    cue: int | None = None
    cue_length: int = 0

    @property
    def is_probe(self) -> bool:
        return self.cut is not None

    @property
    def answer_start(self) -> int | None:
        """Token boundary at or before the answer's opening tag: where a probe would cut."""
        last = self.turns[-1] if self.turns else None
        return last.action_start if last is not None and last.action == "answer" else None

    def count(self, origin: Origin) -> int:
        return self.origins.count(int(origin))


def searches_run(turns: Sequence[Turn], forced_last_turn: bool) -> int:
    """How many searches of a rollout were run: one in the forced last turn is not."""
    return sum(turn.action == "search" for turn in (turns[:-1] if forced_last_turn else turns))


@dataclass(frozen=True, slots=True)
class Sample:
    """One training row: a response and its aligned per-token streams. Engines execute it blindly.

    Worked example, a probe cut after two tokens (`paper`, cue_loss "all"):

        tokens          hmm   </think>  <think>  wait   search…  <info>…  answer
        origin          POL   POL       CUE      CUE    POL      EVI      POL
        mask            1     1         1        1      1        0        1
        behaviour_logp  log μ of each token: what the importance ratio divides by
        weight          1     1         1        1      1        1        1
        truncated       0     0         0        0      0        0        0

    `weight` multiplies the token's surrogate (a trajectory weight, or the sampler-mismatch weight).
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
    group: int = 0


class Segment(IntEnum):
    """Part of a training row, for diagnostics: METHOD §3's o′, cue and o″, or a base rollout."""

    BASE = 0
    PREFIX = 1
    CUE = 2
    SUFFIX = 3

"""A search agent's world small enough to enumerate: every rollout, cut, cue and continuation, in float64.

Six tokens: `<think>` `</think>` `hmm` `<answer>` `right` `wrong`. A rollout ends with the token after
`<answer>` (it is right if that is `right`), or unanswered at the horizon. The policy is a table of logits
over contexts (the last two tokens, and whether a `<think>` was opened again), so parameters are shared
between rollouts as in a language model. A dead end is a wrong answer early enough that the longest cue and
a new answer still fit; its probe follows METHOD §2.4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rexrag.method.cues import CueTrie
from rexrag.types import Origin

OPEN, CLOSE, HMM, ANSWER, RIGHT, WRONG = range(6)
VOCABULARY = 6
CUES = ((OPEN, HMM), (OPEN, WRONG), (OPEN, RIGHT, HMM))
"""Three doubts that open a thought: "hmm", "wrong", "right, hmm"."""
_START = VOCABULARY


@dataclass(frozen=True, slots=True)
class Paths:
    """Token sequences padded on the right: tokens, context int64 [M, H]; written bool [M, H]; reward [M]."""

    tokens: Tensor
    context: Tensor
    written: Tensor
    reward: Tensor

    def logp(self, table: Tensor) -> Tensor:
        """log π of each token, float64 [M, H]; 0 where nothing is written."""
        chosen = torch.log_softmax(table, dim=-1)[self.context, self.tokens.clamp(min=0)]
        return torch.where(self.written, chosen, 0.0)


@dataclass(frozen=True, slots=True)
class Probes:
    """Every outcome of probing: which path results (`path`), and the cut and cue that led to it, int64 [O].

    `fail` is P(fail|o′) and `share` the density ε(outcome) of probing, summing to 1, both float64 [O].
    `prefix` names o′ as `ExactWorld.prefix` does, int64 [O].
    """

    path: Tensor
    cut: Tensor
    cue: Tensor
    cue_length: Tensor
    fail: Tensor
    share: Tensor
    origin: Tensor
    prefix: Tensor
    paths: Paths
    """The outcome as it was written."""
    logp: Tensor
    """log π of its tokens, float64 [O, H]."""
    spliced: Paths
    """The outcome as context distillation trains it."""
    spliced_cut: Tensor


@dataclass(frozen=True, slots=True)
class ExactWorld:
    table: Tensor
    """The policy's logits, float64 [contexts, 6]."""
    paths: Paths
    logp: Tensor
    """log π of each path's tokens, float64 [M, H]."""
    probability: Tensor
    """π of each path, float64 [M]."""
    dead: Tensor
    """Which paths can be probed, bool [M]."""
    prefix: Tensor
    """A number for the o′ of each path that can be probed, −1 for the others; int64 [M]."""
    probes: Probes
    trie: CueTrie

    @property
    def accuracy(self) -> float:
        return float((self.probability * self.paths.reward).sum())

    @property
    def dead_rate(self) -> float:
        """z: probability that a base rollout is a dead end."""
        return float(self.probability[self.dead].sum())


def build_world(horizon: int = 7, seed: int = 0) -> ExactWorld:
    """Enumerate the world. horizon: most tokens of a rollout, at least 5. Seven take a second."""
    table = random_policy(seed)
    paths = enumerate_paths(horizon)
    logp = paths.logp(table)
    answered_at = _first(paths.tokens == ANSWER, horizon)
    room = horizon - max(len(cue) for cue in CUES) - 2
    answer = paths.tokens.gather(1, (answered_at + 1).clamp(max=horizon - 1)[:, None])[:, 0]
    dead = (answered_at <= room) & (answer != RIGHT)
    trie = CueTrie(CUES)
    probes = _enumerate_probes(paths, logp, table, room, trie)
    prefix = torch.where(dead, _prefix(paths.tokens, answered_at), -1)
    return ExactWorld(table, paths, logp, logp.sum(1).exp(), dead, prefix, probes, trie)


def random_policy(seed: int) -> Tensor:
    """Logits that answer early and often wrongly, and better after a second `<think>`."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(2, _START + 1, _START + 1, VOCABULARY, generator=generator, dtype=torch.float64)
    table[..., CLOSE, ANSWER] += 2.0
    table[..., :CLOSE, ANSWER] -= 1.0
    table[0, :, ANSWER, WRONG] += 2.0
    table[1, :, ANSWER, RIGHT] += 2.0
    return table.reshape(-1, VOCABULARY)


def contexts(tokens: Tensor) -> Tensor:
    """Row of the policy's table that each position is sampled from, int64 [M, H]."""
    start = torch.full_like(tokens[:, :1], _START)
    last = torch.cat([start, tokens[:, :-1]], dim=1).clamp(min=0)
    before = torch.cat([start, last[:, :-1]], dim=1)
    reopened = torch.cat([torch.zeros_like(start), (tokens == OPEN).cumsum(1)[:, :-1]], dim=1) > 0
    size = _START + 1
    return (reopened.long() * size + before) * size + last


def enumerate_paths(horizon: int) -> Paths:
    """Every complete rollout of at most `horizon` tokens."""
    grown = torch.zeros(1, 0, dtype=torch.int64)
    finished: list[Tensor] = []
    for length in range(horizon):
        grown = torch.cat(
            [grown.repeat_interleave(VOCABULARY, 0), torch.arange(VOCABULARY).repeat(len(grown))[:, None]],
            dim=1,
        )
        done = grown[:, -2] == ANSWER if length else torch.zeros(len(grown), dtype=torch.bool)
        finished.append(torch.nn.functional.pad(grown[done], (0, horizon - length - 1), value=-1))
        grown = grown[~done]
    return _paths(torch.cat([*finished, grown]))


def _paths(tokens: Tensor) -> Paths:
    written = tokens >= 0
    answered = (tokens[:, :-1] == ANSWER) & (tokens[:, 1:] == RIGHT)
    return Paths(tokens, contexts(tokens), written, answered.any(1).double())


def _first(hit: Tensor, otherwise: int) -> Tensor:
    return torch.where(hit.any(1), hit.long().argmax(1), otherwise)


def _enumerate_probes(paths: Paths, logp: Tensor, table: Tensor, room: int, trie: CueTrie) -> Probes:
    """All (path, cut, cue) with a pool cue at a possible cut; ε = π(o′)·P(fail|o′)·q(h)·π(o″)/z."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for at in range(room + 1):
        for index, words in enumerate(CUES):
            window = paths.tokens[:, at : at + len(words)]
            row = (window == torch.tensor(words)).all(1) & (paths.tokens[:, :at] != ANSWER).all(1)
            hit = row.nonzero()[:, 0]
            found.append((hit, torch.full_like(hit, at), torch.full_like(hit, index)))
    path, cut, cue = (torch.cat(column) for column in zip(*found, strict=True))
    length = torch.tensor([len(c) for c in CUES])[cue]
    position = torch.arange(logp.shape[1])[None, :]
    in_cue = (position >= cut[:, None]) & (position < (cut + length)[:, None])

    share = torch.log_softmax(table, dim=-1)
    at_cut = paths.context[path, cut]
    after = _context_after_answer(paths.tokens[path], cut)
    fail = share[at_cut, ANSWER].exp() * (1.0 - share[after, RIGHT].exp())
    cue_share = trie.table().sum(1)[cue]
    density = torch.where(in_cue, 0.0, logp[path]).sum(1) + fail.log() + cue_share
    origin = torch.where(in_cue, int(Origin.CUE), int(Origin.POLICY))
    written = Paths(*(getattr(paths, name)[path] for name in ("tokens", "context", "written", "reward")))
    spliced, spliced_cut = _splice(written.tokens, cut, length)
    return Probes(
        path=path,
        cut=cut,
        cue=cue,
        cue_length=length,
        fail=fail,
        share=density.exp() / density.exp().sum(),
        origin=origin,
        prefix=_prefix(written.tokens, cut),
        paths=written,
        logp=logp[path],
        spliced=spliced,
        spliced_cut=spliced_cut,
    )


def _prefix(tokens: Tensor, cut: Tensor) -> Tensor:
    """The tokens before the cut, read as the digits of a number."""
    position = torch.arange(tokens.shape[1])[None, :]
    digits = torch.where(position < cut[:, None], tokens + 1, 0)
    return (digits * (VOCABULARY + 1) ** position).sum(1)


def _context_after_answer(tokens: Tensor, cut: Tensor) -> Tensor:
    """Context in which the answer's value would have been sampled, had `<answer>` followed o′."""
    failed = tokens.clone()
    failed[torch.arange(len(tokens)), cut] = ANSWER
    return contexts(failed)[torch.arange(len(tokens)), cut + 1]


def _splice(tokens: Tensor, cut: Tensor, cue_length: Tensor) -> tuple[Paths, Tensor]:
    """o′ without its last `</think>` and what follows it, then o″; and where o″ begins."""
    position = torch.arange(tokens.shape[1])[None, :]
    closing = (tokens == CLOSE) & (position < cut[:, None])
    last_close = torch.where(closing, position, -1).amax(1)
    end = torch.where(last_close >= 0, last_close, cut)
    source = torch.where(position < end[:, None], position, position + (cut + cue_length - end)[:, None])
    joined = torch.nn.functional.pad(tokens, (0, tokens.shape[1]), value=-1).gather(1, source)
    return _paths(joined), end

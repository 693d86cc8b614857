"""Small models with random weights, and an episode whose turns end on token values.

`Script` has the interface of `rexrag.agent.episode.Episode`. It needs no text: token 0 ends the episode,
a multiple of 5 asks for a search (the query is the turn's tokens), anything else goes on until the turn is
full, which draws a notice.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rexrag.agent.episode import State
from rexrag.types import Document, Origin

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def qwen2(seed: int = 0, **changes: object) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "tie_word_embeddings": True, **changes}))
    return spread(model)


def llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes}))
    return spread(model)


def spread(model):
    """Random matrices large enough that greedy decoding is not constant."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)
    return model.eval()


MAKERS = {"qwen2": qwen2, "llama": llama}


class Script:
    """See the module's docstring. `evidence` is the length of an answer to a search."""

    def __init__(
        self,
        prompt: Sequence[int],
        turns: int = 3,
        turn_tokens: int = 12,
        evidence: int = 9,
        total: int = 400,
    ) -> None:
        self.prompt = tuple(prompt)
        self.turns, self.turn_tokens, self.evidence, self.total = turns, turn_tokens, evidence, total
        self.tokens: list[int] = []
        self.origins: list[int] = []
        self.logps: list[float] = []
        self.state = State.SAMPLE
        self.forced: tuple[int, ...] = ()
        self.forced_origin = Origin.EVIDENCE
        self.query = ""
        self.topk = 2
        self.parent: Script | None = None
        self.cut: int | None = None
        self._turn: list[int] = []
        self._left = turns

    @property
    def tokens_left(self) -> int:
        return self.turn_tokens - len(self._turn)

    def sampled(self, token: int, logp: float) -> None:
        assert self.state is State.SAMPLE
        self._append([token], Origin.POLICY, [logp])
        self._turn.append(token)
        if token == 0:
            self.state = State.DONE
        elif token % 5 == 0:
            self.query, self.state = " ".join(map(str, self._turn)), State.SEARCH
        elif len(self._turn) >= self.turn_tokens:
            self._force([3, 4, 3], Origin.NOTICE)

    def found(self, documents: Sequence[Document]) -> None:
        assert self.state is State.SEARCH and len(documents) == self.topk
        tokens = [int(word) for document in documents for word in document.contents.split()]
        self._force(tokens[: self.evidence], Origin.EVIDENCE)

    def take_forced(self, logps: Sequence[float]) -> None:
        assert self.state is State.FORCED and len(logps) == len(self.forced)
        self._append(self.forced, self.forced_origin, logps)
        is_cue = self.forced_origin is Origin.CUE
        self.forced, self._turn = (), []
        self._left -= 0 if is_cue else 1
        full = len(self.prompt) + len(self.tokens) >= self.total
        self.state = State.DONE if self._left <= 0 or full else State.SAMPLE

    def fork(self, cue: Sequence[int], cut: int) -> Script:
        probe = Script(self.prompt, 2, self.turn_tokens, self.evidence, self.total)
        probe.tokens, probe.origins = self.tokens[:cut], self.origins[:cut]
        probe.logps = self.logps[:cut]
        probe.parent, probe.cut = self, cut
        if cue:
            probe._force(cue, Origin.CUE)
        return probe

    def _force(self, tokens: Sequence[int], origin: Origin) -> None:
        self.forced, self.forced_origin, self.state = tuple(tokens), origin, State.FORCED

    def _append(self, tokens: Sequence[int], origin: Origin, logps: Sequence[float]) -> None:
        self.tokens += tokens
        self.origins += [int(origin)] * len(tokens)
        self.logps += logps


class Echo:
    """A retriever whose documents are tokens derived from the query; remembers its calls."""

    digest = "echo"

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        self.calls.append(list(queries))
        return [[self._document(query, rank) for rank in range(topk)] for query in queries]

    @staticmethod
    def _document(query: str, rank: int) -> Document:
        seed = zlib.crc32(f"{query}/{rank}".encode())
        length = 3 + seed % 9
        words = [str(1 + (seed >> i) % (VOCABULARY - 1)) for i in range(length)]
        return Document(id=str(seed), contents=" ".join(words))


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of different lengths, 3 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 41, (n,), generator=generator).tolist()
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]

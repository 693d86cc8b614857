"""Other ways to sample the same rollouts: a library generates, and is asked again for every turn.

Each engine gets whole rows of token ids and returns what it sampled. What a turn is, where it stops, what a
search brings and how long a rollout may be is decided by the same `Episode` that the local sampler drives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from rexrag.agent.codec import HFCodec
from rexrag.agent.episode import Episode, State
from rexrag.agent.protocols.tags import parse_action
from rexrag.engine.loading import choose_device
from rexrag.retrieval.base import Retriever

STOPS = ["</search>", "</answer>"]


class TurnEngine(Protocol):
    """Samples one turn for each row."""

    read_tokens: int
    """Prompt tokens given to the model so far, with the padding that it computes."""

    def turn(self, rows: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        """rows: prompt and response so far; limits: tokens that each may sample, at most."""
        ...


def drive(episodes: Sequence[Episode], retriever: Retriever, engine: TurnEngine, codec: HFCodec) -> None:
    """Turn by turn until all are done. Every turn decodes, encodes and prefills the whole row again."""
    append_forced(episodes)
    while live := [episode for episode in episodes if episode.state is not State.DONE]:
        rows = [encode_again(codec, episode) for episode in live]
        sampled = engine.turn(rows, [episode.tokens_left for episode in live])
        for episode, tokens in zip(live, sampled, strict=True):
            take(episode, tokens)
        search([episode for episode in live if episode.state is State.SEARCH], retriever)
        append_forced(live)


def append_forced(episodes: Sequence[Episode]) -> None:
    """Evidence, notices and cues: text that the next turn reads."""
    for episode in episodes:
        while episode.state is State.FORCED:
            episode.take_forced([0.0] * len(episode.forced))


def encode_again(codec: HFCodec, episode: Episode) -> list[int]:
    """The row as text and back, as code does that keeps the conversation as text."""
    text = codec.decode([*episode.prompt, *episode.tokens])
    ids: list[int] = codec.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def take(episode: Episode, tokens: Sequence[int]) -> None:
    for token in tokens:
        episode.sampled(token, 0.0)
        if episode.state is not State.SAMPLE:
            return


def search(episodes: Sequence[Episode], retriever: Retriever) -> None:
    """One batch for each number of documents asked for."""
    for topk in sorted({episode.topk for episode in episodes}):
        asking = [episode for episode in episodes if episode.topk == topk]
        for episode, found in zip(asking, retriever.search([e.query for e in asking], topk), strict=True):
            episode.found(found)


class Stops:
    """transformers' StoppingCriteria: rows whose turn is complete or that spent their tokens, by row."""

    def __init__(self, codec: HFCodec) -> None:
        self.codec = codec
        self.closing: dict[int, bool] = {}

    def begin(self, length: int, limits: Sequence[int], device: torch.device) -> None:
        self.length = length
        self.limits = torch.tensor(limits, device=device)
        self.done = torch.zeros(len(limits), dtype=torch.bool, device=device)

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.done |= ids.shape[1] - self.length >= self.limits
        for row, token in enumerate(ids[:, -1].tolist()):
            if not self.done[row] and self._may_close(token):
                text = self.codec.decode(ids[row, self.length :].tolist())
                self.done[row] = parse_action(text) is not None
        return self.done

    def _may_close(self, token: int) -> bool:
        if token not in self.closing:
            self.closing[token] = ">" in self.codec.decode([token])
        return self.closing[token]


class Generate:
    """transformers: one left-padded `generate` a turn."""

    def __init__(self, folder: str, codec: HFCodec, dtype: torch.dtype, temperature: float) -> None:
        from transformers import AutoModelForCausalLM, StoppingCriteriaList

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True).eval()
        self.model.to(choose_device("auto"))
        self.stops, self.read_tokens = Stops(codec), 0
        self.pad = codec.tokenizer.pad_token_id or 0
        eos = sorted(codec.eos_ids)
        self.options: dict[str, Any] = {
            "do_sample": temperature > 0, "pad_token_id": self.pad, "eos_token_id": eos,
            "stopping_criteria": StoppingCriteriaList([self.stops]),
        }  # fmt: skip
        if temperature > 0:
            self.options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}

    def turn(self, rows: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        length = max(map(len, rows))
        device = self.model.device
        ids = torch.tensor([[self.pad] * (length - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
        self.read_tokens += ids.numel()
        self.stops.begin(length, limits, device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max(limits), **self.options
            )
        return [row[length:] for row in out.tolist()]


class TRL:
    """TRL's GRPOTrainer: its own generation of one turn, which is what its tool loop calls every turn."""

    def __init__(self, folder: str, codec: HFCodec, dtype: torch.dtype, temperature: float) -> None:
        import tempfile

        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.device = choose_device("auto")
        settings = GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=self.device.type == "cpu", bf16=False, report_to="none",
            temperature=temperature, top_k=0, top_p=1.0, num_generations=4,
            per_device_train_batch_size=4, beta=0.0, gradient_checkpointing=False,
        )  # fmt: skip
        self.trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "a"}] * 4),
            processing_class=tokenizer,
        )
        self.stops, self.read_tokens = Stops(codec), 0
        self.trainer.generation_config.eos_token_id = sorted(codec.eos_ids)
        generate = model.generate
        # The trainer has no way to name stops that are not one token.
        model.generate = lambda **given: generate(**given, stopping_criteria=[self.stops])

    def turn(self, rows: Sequence[list[int]], limits: Sequence[int]) -> list[list[int]]:
        length = max(map(len, rows))
        self.read_tokens += length * len(rows)
        self.stops.begin(length, limits, self.device)
        self.trainer.generation_config.max_new_tokens = max(limits)
        completions, _ = self.trainer._generate_single_turn(rows, None, {}, 1)
        return [list(row) for row in completions]

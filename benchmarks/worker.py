"""One engine in a process of its own, asked for rollouts over a pipe; `rollout.py` starts it.

    PYTHON benchmarks/worker.py ENGINE JSON      # ENGINE: local, transformers, trl, vllm

Standard input takes one JSON object a line, {"rollouts", "first", "seed"}; each gets one line back. Between
requests the process waits without computing, so that rounds of several engines can be interleaved.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch

from common import DTYPES, Work, grouped, questions_and_retriever
from rexrag.agent.codec import load_codec
from rexrag.agent.episode import Episode, State
from rexrag.config.schema import Config
from rexrag.retrieval.base import Retriever
from turns import TRL, Generate, append_forced, drive, encode_again, search, take


class Engine(Protocol):
    def run(self, episodes: Sequence[Episode], retriever: Retriever, seed: int) -> None: ...


class Local:
    """This project's sampler."""

    def __init__(self, folder: str, config: Config) -> None:
        from rexrag.engine.loading import load_policy

        self.policy = load_policy(config.policy)
        self.temperature = config.agent.temperature

    def run(self, episodes: Sequence[Episode], retriever: Retriever, seed: int) -> None:
        session = self.policy.session()
        session.run(episodes, retriever, self.temperature, seed)
        session.close()


class ByTurn:
    """transformers or TRL, all rows one turn at a time."""

    def __init__(self, make: type[Generate] | type[TRL], folder: str, config: Config) -> None:
        self.codec = load_codec(folder)
        self.engine = make(folder, self.codec, DTYPES[config.policy.precision], config.agent.temperature)

    def run(self, episodes: Sequence[Episode], retriever: Retriever, seed: int) -> None:
        torch.manual_seed(seed)
        drive(episodes, retriever, self.engine, self.codec)


class VLLM:
    """vLLM with prefix caching: each row asks for its next turn as soon as its last one is done."""

    def __init__(self, folder: str, config: Config) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }  # fmt: skip
        from vllm import LLM, SamplingParams

        self.codec, self.temperature, self.params = (
            load_codec(folder),
            config.agent.temperature,
            SamplingParams,
        )
        self.engine = LLM(
            folder, dtype=config.policy.precision, enable_prefix_caching=True, max_num_seqs=256,
            seed=config.seed, disable_log_stats=True,
            max_model_len=config.agent.total_tokens + config.agent.turn_tokens,
        ).llm_engine  # fmt: skip

    def run(self, episodes: Sequence[Episode], retriever: Retriever, seed: int) -> None:
        self.engine.reset_prefix_cache()
        running: dict[str, Episode] = {}
        turns = 0
        append_forced(episodes)
        ready = list(episodes)
        while ready or running:
            for episode in ready:
                turns += 1
                running[str(turns)] = episode
                self._ask(str(turns), episode)
            outputs = [output for output in self.engine.step() if output.finished]
            ended = [running.pop(output.request_id.split("-")[0]) for output in outputs]
            for episode, output in zip(ended, outputs, strict=True):
                take(episode, output.outputs[0].token_ids)
            search([episode for episode in ended if episode.state is State.SEARCH], retriever)
            append_forced(ended)
            ready = [episode for episode in ended if episode.state is not State.DONE]

    def _ask(self, name: str, episode: Episode) -> None:
        params = self.params(
            temperature=self.temperature, max_tokens=episode.tokens_left, logprobs=0,
            skip_special_tokens=False, stop=["</search>", "</answer>"], include_stop_str_in_output=True,
            stop_token_ids=sorted(self.codec.eos_ids),
        )  # fmt: skip
        self.engine.add_request(name, {"prompt_token_ids": encode_again(self.codec, episode)}, params)


def make_engine(name: str, folder: str, config: Config) -> Engine:
    if name == "local":
        return Local(folder, config)
    if name == "vllm":
        return VLLM(folder, config)
    return ByTurn({"transformers": Generate, "trl": TRL}[name], folder, config)


def rollouts(
    engine: Engine, codec: Any, config: Config, asked: dict[str, int], data: tuple[Any, Retriever]
) -> dict[str, Any]:
    questions, retriever = data
    chosen = grouped(questions, asked["rollouts"], asked["group"], asked["first"])
    begin = time.perf_counter()
    episodes = [Episode(question, codec, config.agent, config.retriever.topk) for question in chosen]
    engine.run(episodes, retriever, asked["seed"])
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, **asdict(Work.of([episode.rollout() for episode in episodes]))}


def main() -> None:
    name, given = sys.argv[1], json.loads(sys.argv[2])
    config = Config.model_validate(given["config"])
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    # Libraries print to standard output; the pipe is for answers only.
    pipe, sys.stdout = sys.stdout, sys.stderr
    engine = make_engine(name, given["folder"], config)
    codec, data = load_codec(given["folder"]), questions_and_retriever(config)
    print(json.dumps({"ready": name}), file=pipe, flush=True)
    for line in sys.stdin:
        answer = rollouts(engine, codec, config, json.loads(line), data)
        print(json.dumps(answer), file=pipe, flush=True)


if __name__ == "__main__":
    main()

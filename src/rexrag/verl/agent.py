"""An episode as verl's agent loop, and a probe as a session of its own.

verl shares one reward among the outputs of one session, so a probe of session k of n is session n + k of the
same prompt: it joins the prompt's group with a reward of its own. It starts from its parent's token ids.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from pydantic import Field
from verl.experimental.agent_loop.agent_loop import (
    AgentLoopBase,
    AgentLoopMetrics,
    AgentLoopOutput,
    register,
)
from verl.trainer.ppo.v1 import AgentLoopManagerTQ, AgentLoopWorkerTQ

from rexrag.agent.episode import Episode, State
from rexrag.agent.protocols import protocol_of
from rexrag.config.algorithms import Probing
from rexrag.engine.turn_driver import drive
from rexrag.method.probing import adaptive_probability, plan, update_probe_success
from rexrag.training.step import fork_probe
from rexrag.training.validation import numbers, scored_rollout
from rexrag.types import Origin, Rollout, RolloutGroup
from rexrag.verl.records import AGENT, question_of, rollout_record
from rexrag.verl.worker_context import worker_context

STOP_PARAMETERS: dict[str, dict[str, Any]] = {
    "vllm": {"include_stop_str_in_output": True},
    "sglang": {"no_stop_trim": True},
}
"""How each rollout engine is told to stop at an action. Another one goes on; the rest is dropped."""

_Worker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class  # verl exports it wrapped by Ray only


class EpisodeOutput(AgentLoopOutput):  # type: ignore[misc]
    """verl's output with the episode behind it, which does not travel."""

    episode: Any = Field(default=None, exclude=True)


@register(AGENT)
class RexragLoop(AgentLoopBase):  # type: ignore[misc]
    """One episode. `fork` is a probe, ready to go on."""

    async def run(
        self, sampling_params: dict[str, Any], *, extra_info: Any, fork: Episode | None = None, **rest: Any
    ) -> EpisodeOutput:
        """See `AgentLoopBase.run`."""
        parts = worker_context(self.config.rexrag.config)
        config = parts.config
        start = time.perf_counter()
        stop = STOP_PARAMETERS.get(self.rollout_config.name, STOP_PARAMETERS["vllm"])
        stop = {**stop, "stop": list(protocol_of(config.agent.protocol).stop_strings)}
        request = uuid.uuid4().hex
        seen: dict[str, Any] = {}

        async def generate(ids: list[int], limit: int) -> tuple[Sequence[int], Sequence[float]]:
            parameters = {**sampling_params, **stop, "max_tokens": limit, "logprobs": True}
            said = await self.server_manager.generate(request, prompt_ids=ids, sampling_params=parameters)
            first = seen.get("min_global_steps", said.extra_fields.get("min_global_steps"))
            seen.update(said.extra_fields, min_global_steps=first)
            return said.token_ids, said.log_probs

        episode = fork or Episode(question_of(extra_info), parts.codec, config.agent, config.retriever.topk)
        searching = await drive(episode, generate, parts.search.one)
        rollout = episode.rollout()
        # `acc` is the name under which verl reports accuracy; `place` brings evaluations back into order.
        scores = {**numbers(scored_rollout(rollout)), "acc": rollout.em, "place": float(extra_info["index"])}
        return EpisodeOutput(
            prompt_ids=list(rollout.prompt),
            response_ids=list(rollout.tokens),
            response_mask=[int(origin == Origin.POLICY) for origin in rollout.origins],
            response_logprobs=list(rollout.logps),
            reward_score=rollout.reward,
            num_turns=len(rollout.turns),
            metrics=AgentLoopMetrics(
                generate_sequences=time.perf_counter() - start - searching, tool_calls=searching
            ),
            extra_fields={**seen, AGENT: rollout_record(rollout, episode), "reward_extra_info": scores},
            episode=episode,
        )


@dataclass(slots=True)
class _Siblings:
    """The finished base rollouts of a prompt, by session."""

    left: int
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    complete: asyncio.Event = field(default_factory=asyncio.Event)


class RexragWorker(_Worker):  # type: ignore[misc]
    """verl's worker, which also runs a session's probe.

    Each worker follows the success of its own probes (`probe_target`), from its start on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._siblings: dict[str, _Siblings] = {}
        self._probe_success = 1.0

    async def _agent_loop_postprocess(
        self, output: EpisodeOutput, validate: bool, *, fork: Episode | None = None, **kwargs: Any
    ) -> EpisodeOutput:
        await super()._agent_loop_postprocess(output, validate, **kwargs)
        return output

    async def _run_agent_loop(
        self, sampling_params: dict[str, Any], trajectory: dict[str, Any], *, session_id: int, **kwargs: Any
    ) -> None:
        run = super()._run_agent_loop
        if trajectory["validate"]:
            await run(sampling_params, trajectory, session_id=session_id, **kwargs)
            return
        count = int(self.config.actor_rollout_ref.rollout.n)
        siblings = self._siblings.setdefault(kwargs["uid"], _Siblings(count))
        try:
            output = await run(sampling_params, trajectory, session_id=session_id, **kwargs)
            siblings.rollouts[session_id] = output.episode.rollout()
        finally:
            siblings.left -= 1
            if not siblings.left:
                self._siblings.pop(kwargs["uid"], None)
                siblings.complete.set()
        fork = await self._fork(output.episode, session_id, siblings, trajectory["step"])
        if fork is not None:
            probe = await run(sampling_params, trajectory, session_id=count + session_id, fork=fork, **kwargs)
            right = int(probe.episode.rollout().correct)
            self._probe_success = update_probe_success(self._probe_success, right, 1)

    async def _fork(
        self, episode: Episode, session_id: int, siblings: _Siblings, step: int
    ) -> Episode | None:
        """The probe of this session, where it is to have one."""
        context = worker_context(self.config.rexrag.config)
        algorithm, seed = context.config.algorithm, context.config.seed
        if not isinstance(algorithm, Probing):
            return None
        p = adaptive_probability(algorithm.probe_probability, self._probe_success, algorithm.probe_target)
        algorithm = algorithm.model_copy(update={"probe_probability": p})
        own = [session_id]
        if algorithm.probe_groups == "all-wrong":  # needs the verdict on all of them
            await siblings.complete.wait()
            own = sorted(siblings.rollouts)
        name = f"{seed}/{step}/{episode.question.group}/{own[0]}"
        digest = hashlib.sha256(name.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        group = RolloutGroup(episode.question, tuple(siblings.rollouts[session] for session in own))
        pool_size = None if context.trie is None else len(context.trie)
        for planned in plan([group], algorithm, pool_size, generator, context.judge):
            if planned.parent is siblings.rollouts[session_id]:
                fork = fork_probe(episode, planned, context.trie)
                return None if fork.state is State.DONE else fork
        return None


class RexragManager(AgentLoopManagerTQ):  # type: ignore[misc]
    """verl's manager with `RexragWorker`s."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(RexragWorker)

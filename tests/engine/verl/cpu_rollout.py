"""A rollout engine for verl on a transformers model (tests only): `rollout.name = "replica"`.

Requests that wait are decoded together, one padded batch after another, and stop at a stop string. The n-th
request for the same tokens under the same weights draws the same numbers, in whatever order requests come.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections import Counter

import ray
import torch
import verl.workers.rollout.base as rollout_base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "replica"


@ray.remote(num_cpus=1)
class Server:
    def __init__(self, path, window):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.window, self.step, self.waiting, self.worker = window, None, [], None
        self.asked = Counter()

    async def ping(self):
        return True

    async def nothing(self, *_, **__):
        return None

    wake_up = sleep = abort_all_requests = resume_generation = nothing
    clear_kv_cache = release_kv_cache = resume_kv_cache = nothing

    async def update_weights(self, state, step):
        report = self.model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        self.step = step
        self.asked.clear()
        assert not report.unexpected_keys, report.unexpected_keys
        assert set(report.missing_keys) <= {"lm_head.weight"}, report.missing_keys

    async def generate(self, request_id, prompt_ids, sampling_params, **_):
        answer = asyncio.get_running_loop().create_future()
        prompt = tuple(prompt_ids)
        self.asked[prompt] += 1
        seed = zlib.crc32(repr((prompt, self.asked[prompt], self.step)).encode())
        self.waiting.append((prompt, sampling_params, torch.Generator().manual_seed(seed), answer))
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self._work())
        return await answer

    async def _work(self):
        while self.waiting:
            await asyncio.sleep(0.01)  # those that come now are decoded along
            batch, self.waiting = self.waiting, []
            said = await asyncio.to_thread(self._decode, batch)
            for (*_, answer), (ids, logps) in zip(batch, said, strict=True):
                extra = {"global_steps": self.step}
                answer.set_result(TokenOutput(token_ids=ids, log_probs=logps, extra_fields=extra))

    @torch.no_grad()
    def _decode(self, batch):
        widest = max(len(ids) for ids, *_ in batch)
        ids = torch.zeros(len(batch), widest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (prompt, *_) in enumerate(batch):
            ids[i, widest - len(prompt) :] = torch.tensor(prompt)
            mask[i, widest - len(prompt) :] = 1
        said = [([], []) for _ in batch]
        open_rows, past, current = set(range(len(batch))), None, ids
        while open_rows:
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -current.shape[1] :]
            out = self.model(
                current, attention_mask=mask, position_ids=places, past_key_values=past, use_cache=True
            )
            past, chosen = out.past_key_values, []
            for i, (prompt, parameters, generator, _) in enumerate(batch):
                temperature = parameters.get("temperature", 1.0)
                logps = (out.logits[i, -1] / (temperature or 1.0)).log_softmax(-1)
                drawn = (
                    torch.multinomial(logps.exp(), 1, generator=generator) if temperature else logps.argmax()
                )
                token = int(drawn)
                chosen.append(token)
                if i in open_rows:
                    said[i][0].append(token)
                    said[i][1].append(float(logps[token]))
                    limit = min(parameters["max_tokens"], self.window - len(prompt))
                    text = self.tokenizer.decode(said[i][0])
                    stops = any(text.endswith(stop) for stop in parameters.get("stop", ()))
                    if stops or token == self.tokenizer.eos_token_id or len(said[i][0]) >= limit:
                        open_rows.discard(i)
            current = torch.tensor(chosen)[:, None]
            mask = torch.cat([mask, torch.ones(len(batch), 1, dtype=torch.long)], dim=1)
        return said


class Replica(RolloutReplica):
    async def launch_servers(self):
        name = f"replica_{self.replica_rank}"
        server = Server.options(name=name, max_concurrency=256).remote(
            self.model_config.path, self.config.max_model_len
        )
        await server.ping.remote()
        self.servers, self._server_handle, self._server_address = [server], server, name


class Adapter(BaseRollout):
    def __init__(self, config, model_config, device_mesh):
        super().__init__(config, model_config, device_mesh)
        ranks = self.config.tensor_model_parallel_size
        self.replica_rank, self.rollout_rank = divmod(int(os.environ["RANK"]), ranks)

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    @torch.no_grad()
    async def update_weights(self, weights, global_steps=None, **_):
        # Gathering a weight is collective: every rank has to go through all of them.
        state = {name: weight.detach().cpu().clone() for name, weight in weights}
        if self.rollout_rank == 0:
            await ray.get_actor(f"replica_{self.replica_rank}").update_weights.remote(state, global_steps)


RolloutReplicaRegistry.register(NAME, lambda: Replica)
rollout_base._ROLLOUT_REGISTRY[(NAME, "async")] = f"{__name__}.Adapter"

"""The server behind `cpu_rollout.py` (tests only). No verl here, so that its process starts sooner.

Requests that wait are decoded together, one padded batch after another, and stop at a stop string. The n-th
request for the same tokens under the same weights draws the same numbers, in whatever order requests come.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import ray
import torch


@dataclass
class Output:
    """What verl reads of a `TokenOutput`."""

    token_ids: list[int]
    log_probs: list[float]
    extra_fields: dict[str, Any] = field(default_factory=dict)
    stop_reason: str = "completed"
    num_preempted: int = 0
    routed_experts: None = None


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
                answer.set_result(Output(ids, logps, extra))

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

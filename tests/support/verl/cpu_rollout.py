"""A rollout engine for verl on a transformers model (tests only): `rollout.name = "replica"`.

The server itself is in `cpu_server.py`.
"""

from __future__ import annotations

import os

import ray
import torch
import verl.workers.rollout.base as rollout_base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from tests.support.verl.cpu_server import Server

NAME = "replica"


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

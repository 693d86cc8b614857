"""What verl needs to train on gloo, and a trainer that keeps what it updated with (tests only)."""

from __future__ import annotations

import os
from pathlib import Path

import ray
import torch
import transfer_queue as tq
from safetensors.torch import save_file
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker

from rexrag.verl.trainer import RexragTrainer

NAME = "rexrag_cpu"
STREAMS = ("prompts", "responses", "response_mask", "old_log_probs", "advantages", "ref_log_prob")


class CpuWorker(ActorRolloutRefWorker):
    def __init__(self, *args, **kwargs):
        torch.set_num_threads(1)
        # verl would ask for the backend "cpu:gloo,cpu:gloo", which torch refuses.
        if not torch.distributed.is_initialized():
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
        super().__init__(*args, **kwargs)


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
class CpuEngine(FSDPEngineWithLMHead):
    def _build_fsdp_module(self, module):
        # A forward-only model is offloaded with pinned memory, which needs an accelerator.
        forward_only = self.engine_config.forward_only
        object.__setattr__(self.engine_config, "forward_only", False)
        try:
            return super()._build_fsdp_module(module)
        finally:
            object.__setattr__(self.engine_config, "forward_only", forward_only)


class CpuTrainer(RexragTrainer):
    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        self.role_worker_mapping = dict.fromkeys(self.role_worker_mapping, ray.remote(CpuWorker))

    def _update_actor(self, batch, metrics):
        """Keep the streams that verl trains on, for the comparison with the local learner."""
        held = getattr(self.context.config.algorithm, "suffix_weight", "") == "unclipped"
        names = [*STREAMS, *(["rollout_is_weights"] if held else [])]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        rows = {
            f"{i}/{name}": value.contiguous().clone()
            for name in names
            for i, value in enumerate(data[name].unbind())
        }
        file = Path(self.folder) / "updates" / f"step-{self.global_steps}.safetensors"
        file.parent.mkdir(exist_ok=True)
        save_file(rows, file)
        return super()._update_actor(batch, metrics)


register_trainer(NAME)(CpuTrainer)

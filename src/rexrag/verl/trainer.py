"""verl's synchronous trainer with the correction of REX-RAG between scoring and updating.

    sample → score (verl) → filter, correct (`training.step.correct_groups`) → write back → reference,
    advantage, update (verl)

The behaviour densities take the place of `old_log_probs`, masks that of `response_mask`, and a weight, where
a variant has one, that of `rollout_is_weights`; verl's own policy loss and advantages do the rest. Rejected
probes leave the batch. A step makes `learner.minibatches` updates however many probes there were.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.metric import reduce_metrics
from verl.utils.py_functional import rename_dict
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from rexrag.errors import CheckpointError, RetrievalError
from rexrag.io import write_json
from rexrag.method.probing import with_probes
from rexrag.method.rows import Row
from rexrag.training.loop import Progress, account, log_step, position, step_seed
from rexrag.training.run_folder import LOGS, append, truncate_logs
from rexrag.training.step import Score, correct_groups
from rexrag.training.validation import figures_of
from rexrag.types import Origin, Probe, Rollout, RolloutGroup, Sample, StepBatch
from rexrag.verl.records import AGENT, STATE_FILE, probe_of, rollout_of
from rexrag.verl.splicing import tag_of, token_fields
from rexrag.verl.worker_context import worker_context

LEARNED = {
    "loss": "actor/loss",
    "grad_norm": "actor/grad_norm",
    "kl": "actor/kl_loss",
    "clip/all": "actor/pg_clipfrac",
    "lr": "actor/lr",
}
"""Our name of a learner's figure → verl's."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The rollouts of a verl batch. place, learned: position in it and the learner's log-probs, by id."""

    groups: tuple[RolloutGroup, ...]
    place: dict[int, int]
    learned: dict[int, Tensor]
    padding: list[int]
    """Positions that hold no rollout."""


def nested(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths as the jagged tensor that verl's queue holds."""
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)


class RexragTrainer(PPOTrainerSync):  # type: ignore[misc]
    """See the module. `config.rexrag` holds our configuration as TOML, and the run folder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.context = worker_context(config.rexrag.config)
        self.folder = Path(config.rexrag.folder)
        self.digests = dict(config.rexrag.digests)
        self.progress = Progress(digests=dict(self.digests))
        self._started = time.perf_counter()
        self._batch: StepBatch | None = None

    def _build_replay_buffer(self) -> Any:
        self.trainer_mode = "sync"  # verl gives any other name the asynchronous buffer
        return super()._build_replay_buffer()

    def _get_required_batch_multiple(self, dp_size: int) -> int:
        return dp_size * int(self.context.config.learner.minibatches)

    # -- score, filter, correct ----------------------------------------------------------------------------

    def on_step_begin(self) -> None:
        self._started = time.perf_counter()

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(batch, metrics)
        config, drawn = self.context.config, self._drawn(batch)
        generator = torch.Generator().manual_seed(step_seed(config.seed, self.global_steps, "filter"))
        corrected = correct_groups(
            drawn.groups,
            config,
            self.context.trie,
            generator,
            self._scorer(batch, drawn),
            lambda rows, temperature: [drawn.learned[id(row.source)] for row in rows],
        )
        self._batch = with_tokens(corrected)
        return self._write_back(batch, drawn, corrected)

    def _drawn(self, batch: KVBatchMeta) -> Drawn:
        """The batch's rollouts by question, with the learner's log-probs."""
        names = ["uid", "prompts", "responses", "old_log_probs", "rollout_log_probs", "extra_fields"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        columns = {name: list(data[name].unbind()) for name in names[1:5]}
        records = [getattr(value, "data", value) for value in data["extra_fields"]]
        count = int(self.config.actor_rollout_ref.rollout.n)
        padding = [i for i, tag in enumerate(batch.tags) if tag.get("is_padding", False)]
        # uid_session_output: sessions from n on are probes of session − n.
        session_of = [(key.rsplit("_", 2)[0], int(key.rsplit("_", 2)[1])) for key in batch.keys]
        order = [i for i in range(len(session_of)) if i not in set(padding)]
        self._require_all(sum(session_of[i][1] < count for i in order), count)
        place: dict[int, int] = {}
        learned: dict[int, Tensor] = {}
        base: dict[str, dict[int, Rollout]] = {}
        probes: list[Probe] = []
        for is_probe in (False, True):
            for i in order:
                uid, session = session_of[i]
                if (session >= count) is not is_probe:
                    continue
                record, logps = records[i][AGENT], columns["old_log_probs"][i].float()
                sampled = self._sampled(record, logps, columns["rollout_log_probs"][i].float())
                prompt, tokens = columns["prompts"][i].tolist(), columns["responses"][i].tolist()
                rollout = rollout_of(record, prompt, tokens, sampled.tolist())
                place[id(rollout)], learned[id(rollout)] = i, logps
                if is_probe:
                    probes.append(probe_of(record, rollout, base[uid][session - count]))
                else:
                    base.setdefault(uid, {})[session] = rollout
        groups = [
            RolloutGroup(rollouts[0].question, rollouts)
            for rollouts in (tuple(found.values()) for found in base.values())
        ]
        return Drawn(with_probes(groups, probes), place, learned, padding)

    def _sampled(self, record: dict[str, Any], learned: Tensor, sampled: Tensor) -> Tensor:
        """log π_old of a rollout: the sampler's where that is corrected; it never scored the cues."""
        if not self.context.config.algorithm.mismatch_cap:
            return learned
        cue = torch.tensor(record["origins"]) == int(Origin.CUE)
        return torch.where(cue, learned, sampled)

    def _require_all(self, found: int, count: int) -> None:
        expected = count * int(self.config.data.train_batch_size)
        if found != expected:
            raise RetrievalError(
                f"step {self.global_steps}: {expected - found} of {expected} rollouts were lost; "
                "the agent workers' log says why, and the run can be resumed from its last checkpoint"
            )

    def _scorer(self, batch: KVBatchMeta, drawn: Drawn) -> Score:
        """Scores rows without their cue: each takes its probe's place in the queue and stays there."""

        def score(rows: Sequence[Row], temperature: float) -> list[Tensor]:
            places = [drawn.place[id(row.source)] for row in rows]
            self._replace(batch, places, rows)
            logps = self._log_probs(batch, places)
            drawn.learned.update(zip((id(row.source) for row in rows), logps, strict=True))
            return logps

        return score

    def _replace(self, batch: KVBatchMeta, places: Sequence[int], rows: Sequence[Row]) -> None:
        keys = [batch.keys[i] for i in places]
        sampled = bool(self.config.actor_rollout_ref.rollout.calculate_log_probs)
        names = ["rm_scores", *(["rollout_log_probs"] if sampled else [])]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=names)
        written = token_fields(rows, {name: list(data[name].unbind()) for name in names})
        tags = [tag_of(batch.tags[i], row) for i, row in zip(places, rows, strict=True)]
        fields = tu.get_tensordict({name: nested(column) for name, column in written.items()})
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=fields, tags=tags)
        for i, tag in zip(places, tags, strict=True):
            batch.tags[i] = tag

    def _log_probs(self, batch: KVBatchMeta, places: Sequence[int]) -> list[Tensor]:
        """log π_old of the rows at these places, computed again; a few others fill the last share of work."""
        others = [i for i in range(len(batch.keys)) if i not in set(places)]
        chosen = [*places, *others[: -len(places) % self._dp_size()]]
        again = batch.select_keys([batch.keys[i] for i in chosen])
        super()._compute_old_log_prob(again, {})
        keys = [batch.keys[i] for i in places]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["old_log_probs"])
        return [logp.float() for logp in data["old_log_probs"].unbind()]

    def _write_back(self, batch: KVBatchMeta, drawn: Drawn, corrected: StepBatch) -> KVBatchMeta:
        """Streams into the queue; the batch without rejected probes, but for those it needs as padding."""
        places = [drawn.place[id(sample.source)] for sample in corrected.samples]
        rejected = [drawn.place[id(p.rollout)] for p in corrected.probes if not p.kept]
        weights = [signed_weight(sample) for sample in corrected.samples]
        weighted = any(bool((weight != 1).any()) for weight in weights)
        masks = [torch.tensor(sample.mask).long() for sample in corrected.samples]
        written = {
            "old_log_probs": nested([torch.tensor(sample.behaviour_logp) for sample in corrected.samples]),
            "response_mask": nested(masks),
            # verl counts a mini-batch's tokens in `loss_mask`, and masks its loss with `response_mask`.
            "loss_mask": nested([mask.clone() for mask in masks]),
        }
        if weighted:
            written["rollout_is_weights"] = nested(weights)
        keys = batch.keys
        tq.kv_batch_put(
            keys=[keys[i] for i in places],
            partition_id=batch.partition_id,
            fields=tu.get_tensordict(written),
        )
        multiple = self._get_required_batch_multiple(self._dp_size())
        spare = [*drawn.padding, *rejected]
        padding, gone = spare[: -len(places) % multiple], spare[-len(places) % multiple :]
        self._silence(batch, padding, weighted)
        if gone:
            tq.kv_clear(keys=[keys[i] for i in gone], partition_id=batch.partition_id)
        return self._balanced(batch, [*places, *padding])

    def _silence(self, batch: KVBatchMeta, places: Sequence[int], weighted: bool) -> None:
        """Rows that stay as padding train nothing and stand in no group."""
        if not places:
            return
        keys = [batch.keys[i] for i in places]
        data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=["response_mask"])
        zeros = [torch.zeros_like(mask) for mask in data["response_mask"].unbind()]
        written: dict[str, Any] = {"response_mask": nested(zeros), "uid": [f"padding {key}" for key in keys]}
        written["loss_mask"] = nested([zero.clone() for zero in zeros])
        if weighted:
            written["rollout_is_weights"] = nested([zero.float() for zero in zeros])
        tags = [{**batch.tags[i], "is_padding": True} for i in places]
        fields = tu.get_tensordict(written)
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=fields, tags=tags)
        for i, tag in zip(places, tags, strict=True):
            batch.tags[i] = tag

    def _balanced(self, batch: KVBatchMeta, places: Sequence[int]) -> KVBatchMeta:
        """These rows, dealt to the ranks so that each has about the same work."""
        chosen = KVBatchMeta(
            partition_id=batch.partition_id,
            keys=[batch.keys[i] for i in places],
            tags=[batch.tags[i] for i in places],
            fields=batch.fields,
            extra_info=batch.extra_info,
        )
        work = calculate_workload(torch.tensor([tag["seq_len"] for tag in chosen.tags], dtype=torch.int64))
        parts = get_seqlen_balanced_partitions(work, k_partitions=self._dp_size(), equal_size=True)
        chosen.reorder([i for part in parts for i in part])
        return chosen

    def _dp_size(self) -> int:
        return int(max(self.actor_rollout_wg._dispatch_info["actor"])) + 1

    # -- update --------------------------------------------------------------------------------------------

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """verl's update, with a number of mini-batches instead of a size."""
        actor, minibatches = self.config.actor_rollout_ref.actor, self.context.config.learner.minibatches
        trained = sum(not tag.get("is_padding", False) for tag in batch.tags)
        batch.extra_info.update(
            calculate_entropy=bool(actor.calculate_entropy or actor.entropy_coeff != 0.0),
            distillation_use_topk=False,
            distillation_only=False,
            global_batch_size=trained / minibatches,
            num_mini_batch=minibatches,
            epochs=actor.ppo_epochs,
            seed=actor.data_loader_seed,
            dataloader_kwargs={"shuffle": actor.shuffle},
            temperature=self.config.actor_rollout_ref.rollout.temperature,
        )
        output = rename_dict(self.actor_rollout_wg.update_actor(batch)["metrics"], "actor/")
        output["perf/mfu/actor"] = output.pop("actor/mfu")
        metrics.update(reduce_metrics(output))
        self._account(metrics)
        return batch

    def _account(self, metrics: dict[str, Any]) -> None:
        """The step's row in the run folder; verl's own loggers get the same figures under `rexrag/`."""
        assert self._batch is not None
        config = self.context.config
        learned = {ours: float(metrics[theirs]) for ours, theirs in LEARNED.items() if theirs in metrics}
        learned["updates"] = float(config.learner.minibatches)
        row = account(self.progress, self._batch, learned, time.perf_counter() - self._started)
        log_step(config, self.context.codec, self.folder, row, self._batch)
        metrics.update({f"rexrag/{name}": v for name, v in row.items() if isinstance(v, int | float)})

    # -- evaluate, save, resume ----------------------------------------------------------------------------

    def _val_metrics_update(
        self, data_sources: Any, sample_uids: Any, infos: dict[str, list[Any]], *rest: Any, **more: Any
    ) -> Any:
        names = [name for name in infos if name not in ("reward", "acc")]  # verl's own; the rest is ours
        scores = [dict(zip(names, row, strict=True)) for row in zip(*(infos[n] for n in names), strict=True)]
        scores.sort(key=lambda score: score["place"])
        if len(scores) != len(self.val_dataset):
            raise RetrievalError(f"{len(self.val_dataset) - len(scores)} rollouts of an evaluation were lost")
        append(
            self.folder / "eval.jsonl",
            [position(self.progress) | {"set": "held-out", **figures_of(scores), "eval_seconds": 0.0}],
        )
        return super()._val_metrics_update(data_sources, sample_uids, infos, *rest, **more)

    def _checkpoint(self, step: int) -> Path:
        return Path(self.config.trainer.default_local_dir) / f"global_step_{step}" / STATE_FILE

    def _save_checkpoint(self) -> None:
        """Ours first: verl names a checkpoint the latest once its own part is written."""
        sizes = {log: (self.folder / log).stat().st_size for log in LOGS if (self.folder / log).exists()}
        write_json(self._checkpoint(self.global_steps), {**asdict(self.progress), "logs": sizes})
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if not self.global_steps:
            return
        file = self._checkpoint(self.global_steps)
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not readable: {error}") from None
        self.progress = Progress(**{f.name: state[f.name] for f in fields(Progress)})
        # verl evaluates a step after it has saved it: that evaluation belongs to the checkpoint.
        kept = evaluations_until(self.folder / "eval.jsonl", self.global_steps)
        truncate_logs(self.folder, state["logs"] | {"eval.jsonl": kept})


def evaluations_until(file: Path, step: int) -> int:
    """Bytes of the evaluations up to a step, which stand first in their log."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    return sum(len(line) for line in lines if json.loads(line)["step"] <= step)


def signed_weight(sample: Sample) -> Tensor:
    """The weight of each token, negative where its ratio is held constant (see `loss`): float [T]."""
    weight = torch.tensor(sample.weight) if sample.weight else torch.ones(len(sample.tokens))
    return torch.where(torch.tensor(sample.truncated), -weight, weight) if sample.truncated else weight


def with_tokens(batch: StepBatch) -> StepBatch:
    """The step with counts of its tokens. With a prefix cache, a prompt is read once a question."""
    written = [(rollout, 0) for rollout in batch.rollouts]
    written += [(probe.rollout, probe.cut) for probe in batch.probes]

    def count(rollout: Rollout, start: int, *origins: Origin) -> int:
        return sum(origin in origins for origin in rollout.origins[start:])

    inserted = Origin.CUE, Origin.EVIDENCE, Origin.NOTICE
    read = sum(len(prompt) for prompt in {rollout.prompt for rollout in batch.rollouts})
    read += sum(count(rollout, start, *inserted) for rollout, start in written)
    statistics = replace(
        batch.statistics,
        generated_tokens=sum(count(rollout, start, Origin.POLICY) for rollout, start in written),
        prefilled_tokens=read + batch.statistics.scored_tokens,
    )
    return replace(batch, statistics=statistics)


register_trainer(AGENT)(RexragTrainer)

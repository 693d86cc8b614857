"""The local learner: optimizer updates from `Sample`s. The loss is `rexrag.method.objective`'s.

Rows are packed without padding, shared prefixes once per micro-batch (`packing.py`). The losses of
micro-batches add up to the loss of their mini-batch: all are divided by the mini-batch's normaliser.

Shape suffixes: B rows of a micro-batch, T response tokens.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rexrag.config.algorithms import Shared
from rexrag.config.schema import LearnerConfig
from rexrag.engine.learning.checkpoint import LearnerProgress, load_checkpoint, save_checkpoint
from rexrag.engine.learning.packing import Pack, TokenRow, pack_rows
from rexrag.errors import ConfigError
from rexrag.method.objective import (
    aggregation_normalizer,
    clipped_surrogate,
    kl_penalty,
    ratio_by_label,
)
from rexrag.types import Sample, Segment


@dataclass(slots=True)
class Tally:
    """Sums over the mini-batches of an update. segments: `ratio_by_label`, float64 [segments, 3]."""

    totals: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    segments: Tensor = field(default_factory=lambda: torch.zeros(len(Segment), 3, dtype=torch.float64))


class LocalLearner:
    """See `engine.base.Learner`. Trains those parameters of `model` that require a gradient.

    model: a Hugging Face causal language model with packed attention, in float32 (the master weights).
    autocast: run forward and backward in bfloat16.
    reference: keep a copy of the current weights for the KL term; frozen parameters are shared, not copied.
    mirror: a copy of the model in the sampler's precision, updated after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LearnerConfig,
        *,
        seed: int = 0,
        autocast: bool = False,
        reference: bool = False,
        mirror: nn.Module | None = None,
    ) -> None:
        self.model = model.eval()  # a policy has no dropout: it would change the ratio
        self.config, self.autocast, self.mirror = config, autocast, mirror
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.reference = _frozen_copy(model) if reference else None
        # Norms and biases do not decay.
        matrices = [p for p in self.trained.values() if p.dim() > 1]
        vectors = [p for p in self.trained.values() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.progress = LearnerProgress(torch.Generator().manual_seed(seed))

    def update(self, samples: Sequence[Sample], algorithm: Shared, temperature: float) -> dict[str, float]:
        """See `engine.base.Learner.update`.

        The learning rate warms up linearly over the first `warmup_steps` calls. Rows with advantage 0 count
        in the normaliser but are not run, unless there is a KL term. A mini-batch without a row to run, or
        with a gradient that is not finite, makes no update. Raises ConfigError where `kl` has no reference.
        """
        if algorithm.kl > 0 and self.reference is None:
            raise ConfigError(
                f"algorithm.kl = {algorithm.kl}: the learner was built without a reference model"
            )
        rate = self.config.lr * min(1.0, (self.progress.steps + 1) / max(1, self.config.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tally = Tally()
        order = torch.randperm(len(samples), generator=self.progress.generator)
        for indices in order.tensor_split(self.config.minibatches):
            self._minibatch([samples[i] for i in indices.tolist()], algorithm, temperature, tally)
        self.progress.steps += 1
        if tally.totals["updates"] and self.mirror is not None:
            refresh(self.mirror, self.trained)
        return {"lr": rate, **_metrics(tally, algorithm)}

    def save(self, folder: Path) -> None:
        """See `engine.base.Learner.save`. The weights load as a Hugging Face model unless they are a LoRA."""
        save_checkpoint(folder, self.model, self.trained, self.optimizer, self.progress)

    def load(self, folder: Path) -> None:
        """Continue bit for bit where `save` stopped. Raises CheckpointError."""
        load_checkpoint(folder, self.model, self.trained, self.optimizer, self.progress)
        if self.mirror is not None:
            refresh(self.mirror, self.trained)

    def gradient_norms(
        self, samples: Sequence[Sample], algorithm: Shared, temperature: float
    ) -> dict[str, float]:
        """See `engine.base.Learner.gradient_norms`. One backward pass for each segment in the samples."""
        masks = [torch.tensor([sample.mask]) for sample in samples]
        normalizer = sum(aggregation_normalizer(mask, algorithm.aggregation) for mask in masks)
        policy_only = algorithm.model_copy(update={"kl": 0.0})
        norms = {}
        for segment in Segment:
            only = [restricted(sample, segment) for sample in samples]
            run = [i for i, sample in enumerate(only) if any(sample.mask) and sample.advantage != 0.0]
            if not run:
                continue
            self.optimizer.zero_grad(set_to_none=True)
            rows: list[TokenRow] = [(sample.prompt, sample.tokens) for sample in only]
            for pack in pack_rows(rows, run, self.config.micro_tokens):
                loss = self._loss(pack, only, policy_only, temperature, normalizer, Tally())
                loss.backward()  # type: ignore[no-untyped-call]
            norms[segment.name.lower()] = float(
                nn.utils.get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
            )
        self.optimizer.zero_grad(set_to_none=True)
        return norms

    # -- one optimizer update ------------------------------------------------------------------------------

    def _minibatch(
        self,
        samples: Sequence[Sample],
        algorithm: Shared,
        temperature: float,
        tally: Tally,
    ) -> None:
        masks = [torch.tensor([sample.mask]) for sample in samples]
        normalizer = sum(aggregation_normalizer(mask, algorithm.aggregation) for mask in masks)
        run = [i for i, s in enumerate(samples) if any(s.mask) and (s.advantage != 0.0 or algorithm.kl > 0)]
        tally.totals["rows"] += len(samples)
        tally.totals["rows_skipped"] += len(samples) - len(run)
        tally.totals["trained_tokens"] += sum(int(mask.sum()) for mask in masks)
        if not run:
            tally.totals["updates_skipped"] += 1
            return
        rows: list[TokenRow] = [(sample.prompt, sample.tokens) for sample in samples]
        self.optimizer.zero_grad(set_to_none=True)
        for pack in pack_rows(rows, run, self.config.micro_tokens):
            loss = self._loss(pack, samples, algorithm, temperature, normalizer, tally)
            loss.backward()  # type: ignore[no-untyped-call]
            tally.totals["micro_batches"] += 1
            tally.totals["loss"] += float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(self.trained.values(), self.config.grad_clip))
        if math.isfinite(norm):
            self.optimizer.step()
            self.progress.updates += 1
            tally.totals["updates"] += 1
            tally.totals["grad_norm"] += norm
        else:
            self.progress.nonfinite_updates += 1
            tally.totals["nonfinite_updates"] += 1
        self.optimizer.zero_grad(set_to_none=True)

    def _loss(
        self,
        pack: Pack,
        samples: Sequence[Sample],
        algorithm: Shared,
        temperature: float,
        normalizer: float,
        tally: Tally,
    ) -> Tensor:
        """The part of the mini-batch's loss that this micro-batch contributes."""
        device = next(self.model.parameters()).device
        rows = [samples[i] for i in pack.rows]
        lengths = torch.tensor([len(row.tokens) for row in rows], device=device)
        there = torch.arange(int(lengths.max()), device=device) < lengths[:, None]

        def stream(values: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> Tensor:
            flat = torch.tensor([v for row in values for v in row], dtype=dtype, device=device)
            return torch.zeros(there.shape, dtype=dtype, device=device).masked_scatter(there, flat)

        def logps(model: nn.Module) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                flat = pack.logps(model, temperature)
            return flat.new_zeros(there.shape).masked_scatter(there, flat)

        logp = logps(self.model)
        behaviour = stream([row.behaviour_logp for row in rows])
        advantages = torch.tensor([row.advantage for row in rows], device=device)
        mask = stream([row.mask for row in rows], torch.bool)
        clip = algorithm.clip_low, algorithm.clip_high
        truncated = None
        if any(row.truncated for row in rows):
            truncated = stream([r.truncated or (False,) * len(r.tokens) for r in rows], torch.bool)
        loss, stats = clipped_surrogate(
            logp, behaviour, advantages, mask, *clip,
            weight=stream([r.weight or (1.0,) * len(r.tokens) for r in rows])
            if any(r.weight for r in rows) else None,
            truncated=truncated,
            aggregation=algorithm.aggregation, normalizer=normalizer,
        )  # fmt: skip
        tally.totals["nonfinite_tokens"] += int(stats["nonfinite_tokens"])
        if algorithm.kl > 0:
            assert self.reference is not None
            with torch.no_grad():
                ref_logp = logps(self.reference)
            tally.totals["reference_tokens"] += len(pack.ids)
            kl, dropped = kl_penalty(logp, ref_logp, mask, algorithm.aggregation, normalizer)
            tally.totals["nonfinite_kl_tokens"] += dropped
            loss = loss + algorithm.kl * kl
            tally.totals["kl"] += float(kl.detach())
        label = stream([r.segment or (Segment.BASE,) * len(r.tokens) for r in rows], torch.long)
        tally.segments += ratio_by_label(
            logp.detach(), behaviour, advantages, mask, label, clip, truncated
        ).cpu()
        return loss


def restricted(sample: Sample, segment: Segment) -> Sample:
    """The sample with only the tokens of one segment trained; without labels all are BASE."""
    labels = sample.segment or (int(Segment.BASE),) * len(sample.tokens)
    mask = tuple(m and label == segment for m, label in zip(sample.mask, labels, strict=True))
    return replace(sample, mask=mask)


def _metrics(tally: Tally, algorithm: Shared) -> dict[str, float]:
    """Means over updates of loss, KL and gradient norm; counts; ratio and clip share, also by segment."""
    totals, segments = tally.totals, tally.segments
    counts = ("updates", "updates_skipped", "nonfinite_updates", "rows", "rows_skipped", "micro_batches",
              "trained_tokens", "nonfinite_tokens")  # fmt: skip
    metrics = {name: totals[name] for name in counts}
    attempts = max(1, totals["updates"] + totals["nonfinite_updates"])
    metrics["loss"] = totals["loss"] / attempts
    metrics["grad_norm"] = totals["grad_norm"] / max(1, totals["updates"])
    if algorithm.kl > 0:
        metrics["kl"] = totals["kl"] / attempts
        metrics["reference_tokens"] = totals["reference_tokens"]
        metrics["nonfinite_kl_tokens"] = totals["nonfinite_kl_tokens"]
    named = [("all", segments.sum(dim=0)), *((s.name.lower(), segments[s]) for s in Segment)]
    for name, (tokens, ratio, clipped) in ((name, sums.tolist()) for name, sums in named):
        if tokens:
            metrics[f"ratio/{name}"] = ratio / tokens
            metrics[f"clip/{name}"] = clipped / tokens
    return metrics


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy with the current weights. Parameters that are not trained are shared, not copied."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


@torch.no_grad()
def refresh(mirror: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    """Copy trained weights into the sampler's model, in its precision."""
    there = dict(mirror.named_parameters())
    for name, parameter in trained.items():
        there[name].copy_(parameter)

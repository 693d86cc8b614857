"""Seconds that a model and its optimizer take, whoever calls them: the rest of a step is its overhead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from rexrag.engine.sampling.cuda_graphs import CudaGraphs
from rexrag.engine.sampling.decoder import FusedDecoder


class ModelClock:
    """Adds up the time inside a model's decoder and head, backward passes and optimizer steps (CPU)."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth, self._began = 0, 0.0

    def enter(self, *_: Any) -> None:
        if self._depth == 0:
            self._began = time.perf_counter()
        self._depth += 1

    def leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._began

    def timed(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter()
            try:
                return work(*args, **kwargs)
            finally:
                self.leave()

        return run


@contextmanager
def model_clock(model: Any, optimizer: torch.optim.Optimizer | None = None) -> Iterator[ModelClock]:
    """Watch a model: its decoder (the sampler's merged one too), its head, and what trains it."""
    clock = ModelClock()
    parts: list[nn.Module] = [model.base_model, model.get_output_embeddings()]
    hooks = [part.register_forward_pre_hook(clock.enter) for part in parts]
    hooks += [part.register_forward_hook(clock.leave) for part in parts]
    timed: list[tuple[Any, str]] = [
        (torch.Tensor, "backward"),
        (FusedDecoder, "__call__"),
        (CudaGraphs, "__call__"),
    ]
    timed += [] if optimizer is None else [(optimizer, "step")]
    try:
        with ExitStack() as stack:
            for owner, name in timed:
                stack.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name))))
            yield clock
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def counted_forwards(*models: Any) -> Iterator[list[int]]:
    """A list that grows by one with each forward of these models' decoders, merged or recorded ones too."""
    forwards: list[int] = []

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            forwards.append(1)
            return work(*args)

        return run

    hooks = [m.base_model.register_forward_hook(lambda *_: forwards.append(1)) for m in models]
    try:
        with (
            patch.object(FusedDecoder, "__call__", counted(FusedDecoder.__call__)),
            patch.object(CudaGraphs, "_step", counted(CudaGraphs._step)),
        ):
            yield forwards
    finally:
        for hook in hooks:
            hook.remove()

"""Weights in the layout that the CPU's matrix kernels read fastest, for as long as they do not change.

A product of few rows with a weight spends much of its time on bringing the weight into that layout. A session
multiplies by the same weights thousands of times, so it keeps copies that are there already: in the kernels'
own layout, or, where a weight is so small that calling those kernels is what takes time, transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

REPACKED_BYTES = 4 << 30
"""Copies that a session may hold; a larger model goes without."""
SMALL = 1 << 18
"""Values of a weight below which the kernels' own layout costs more per product than it saves."""


class Repacked:
    """Copies of a model's float32 linear layers on the CPU. Stale once the weights change."""

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _fits(layer.weight)]
        if sum(layer.weight.nbytes for layer in layers) > REPACKED_BYTES:
            layers = []
        self._forwards = [(layer, _copied(layer)) for layer in layers]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, these layers multiply by the copies."""
        for layer, forward in self._forwards:
            layer.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                del layer.forward

    def clear(self) -> None:
        """Free the copies."""
        self._forwards = []


def _fits(weight: Tensor) -> bool:
    has_kernels: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_kernels and weight.device.type == "cpu" and weight.dtype == torch.float32


def _copied(layer: nn.Linear) -> partial[Tensor]:
    """The layer's forward on a copy of its weight."""
    if layer.weight.numel() < SMALL:
        return partial(_product, layer.weight.detach().t().contiguous(), layer.bias)
    return partial(_linear, torch.ops.mkldnn._reorder_linear_weight(layer.weight, None), layer.bias)


def _product(transposed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out = torch.matmul(x, transposed)
    return out if bias is None else out + bias


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out

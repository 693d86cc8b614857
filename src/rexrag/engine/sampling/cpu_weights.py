"""Copies of CPU weights in the layout that the matrix kernels read fastest.

A product of few rows spends much of its time on reordering the weight. A session multiplies by the same
weights thousands of times, so it keeps reordered copies: in oneDNN's own blocked layout, or transposed for a
weight so small that the call of a oneDNN kernel would dominate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

COPIED_BYTES = 4 << 30
"""Most memory for copies; a larger model runs on its own weights."""
SMALL = 1 << 18
"""A weight with fewer values is transposed; the blocked layout would cost more than it saves."""

Product = Callable[..., Tensor]
"""(x [N, in], plus [N, out] or None) -> x · weightᵀ + bias + plus [N, out]."""


class CpuWeights:
    """Copies of the weights of a module's float32 linear layers. Not valid after the weights change."""

    def __init__(self, module: nn.Module) -> None:
        layers = [
            layer for layer in module.modules() if type(layer) is nn.Linear and _has_layout(layer.weight)
        ]
        if sum(layer.weight.nbytes for layer in layers) > COPIED_BYTES:
            layers = []
        self._forwards = [(layer, product(layer.weight, layer.bias)) for layer in layers]

    @contextmanager
    def used(self) -> Iterator[None]:
        """Context in which the linear layers multiply by the copies."""
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


def product(weight: Tensor, bias: Tensor | None) -> Product:
    """A product with weight [out, in], on a copy of it where another layout is faster."""
    weight = weight.detach()
    if not _has_layout(weight):
        return partial(_plain, weight, bias)
    if weight.numel() < SMALL:
        return partial(_transposed, weight.t().contiguous(), bias)
    return partial(_blocked, torch.ops.mkldnn._reorder_linear_weight(weight, None), bias)


def _has_layout(weight: Tensor) -> bool:
    has_kernels: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_kernels and weight.device.type == "cpu" and weight.dtype == torch.float32


def _plain(weight: Tensor, bias: Tensor | None, x: Tensor, plus: Tensor | None = None) -> Tensor:
    out = nn.functional.linear(x, weight, bias)
    return out if plus is None else out.add_(plus)


def _transposed(weight: Tensor, bias: Tensor | None, x: Tensor, plus: Tensor | None = None) -> Tensor:
    out = torch.matmul(x, weight) if plus is None else torch.addmm(plus, x, weight)
    return out if bias is None else out.add_(bias)


def _blocked(weight: Tensor, bias: Tensor | None, x: Tensor, plus: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out if plus is None else out.add_(plus)

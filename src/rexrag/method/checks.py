"""Argument checks shared by the formulas: each error names the argument, its value and what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rexrag.errors import AlphaError, FailureRateError, NonFiniteError, ShapeError


def require_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")


def require_finite(name: str, tensor: Tensor, *, allow_minus_infinity: bool = False) -> None:
    bad = torch.isnan(tensor) | torch.isposinf(tensor) if allow_minus_infinity else ~torch.isfinite(tensor)
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        allowed = "a finite number or -inf" if allow_minus_infinity else "a finite number"
        raise NonFiniteError(f"{name}{list(where)} = {float(tensor[where])}, expected {allowed}")


def require_alpha(alpha: float | Tensor) -> None:
    values = torch.as_tensor(alpha, dtype=torch.float64)
    inside = (values >= 0.0) & (values < 1.0)
    if not bool(inside.all()):
        bad = float(values[~inside].flatten()[0])
        raise AlphaError(f"alpha = {bad}, expected 0 <= alpha < 1")


def require_failure_rate(failure_rate: float | Tensor, at_most: float = 1.0) -> None:
    values = torch.as_tensor(failure_rate, dtype=torch.float64)
    inside = (values > 0.0) & (values <= at_most) & torch.isfinite(values)
    if not bool(inside.all()):
        bad = float(values[~inside].flatten()[0])
        shown = "NaN" if math.isnan(bad) else f"{bad}"
        raise FailureRateError(f"failure_rate = {shown}, expected 0 < z <= {at_most:g}")

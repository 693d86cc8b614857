"""What the speed benchmarks compare must be the same work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rexrag.engine.attention import use_packed_attention
from rexrag.engine.learning.packing import pack_rows
from tests.support.scripted import MAKERS, prompts

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in ("clock", "common", "learn", "step", "turns"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("max_tokens", [40, 10_000])
def test_padded_rows_and_rows_by_themselves_have_the_packed_log_probs(max_tokens):
    from learn import pack_apart, pad_rows

    model = MAKERS["llama"]()
    use_packed_attention(model)
    rows = [(prompt, list(range(2, 5 + i))) for i, prompt in enumerate(prompts(4)) for _ in range(2)]

    def logps(packer) -> list[torch.Tensor]:
        found: list[torch.Tensor] = [torch.zeros(0)] * len(rows)
        for pack in packer(rows, range(len(rows)), max_tokens):
            parts = pack.logps(model, 1.0).split([len(rows[i][1]) for i in pack.rows])
            for index, part in zip(pack.rows, parts, strict=True):
                found[index] = part
        return found

    with torch.no_grad():
        packed = logps(pack_rows)
        for packer in (pack_apart, pad_rows):
            for ours, theirs in zip(packed, logps(packer), strict=True):
                assert torch.allclose(ours, theirs, atol=1e-5)


def test_growth_is_fitted_and_the_roofline_takes_the_slower_limit():
    from common import Size, roofline
    from step import exponent

    assert exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    size = Size(body=80, head=20, pair=0, kv_bytes=0, bytes_each=4)
    # One row reads 400 bytes and computes 200 operations a step; ten rows compute 2,000.
    assert roofline(size, 1, 10.0, 0.0, bandwidth=400.0, flops=400.0) == pytest.approx(1.0)
    assert roofline(size, 10, 10.0, 0.0, bandwidth=400.0, flops=400.0) == pytest.approx(2.0)
    # A prefilled token computes 160 operations for each generated one.
    assert roofline(size, 10, 10.0, 1.0, bandwidth=400.0, flops=400.0) == pytest.approx(10 / 9)

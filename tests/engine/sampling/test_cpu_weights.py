"""Copies of CPU weights change nothing."""

from __future__ import annotations

import torch

from rexrag.engine.sampling import cpu_weights
from rexrag.engine.sampling.cpu_weights import CpuWeights
from tests.support.scripted import qwen2


def test_cpu_weights_change_no_logit_and_are_removed_after_use(model, monkeypatch):
    ids = torch.arange(1, 12)[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        copies = CpuWeights(model)
        with copies.used():
            assert torch.allclose(model(ids, use_cache=False).logits, expected, atol=1e-5)
    assert not any("forward" in vars(layer) for layer in model.modules())
    monkeypatch.setattr(cpu_weights, "COPIED_BYTES", 100)
    assert not CpuWeights(model)._forwards
    assert not CpuWeights(qwen2().to(torch.bfloat16))._forwards

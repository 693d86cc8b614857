"""Decode steps that would be captured, on a CPU: which memory they write.

`test_cuda.py` has the same sampler with real CUDA graphs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from rexrag.engine.attention import use_packed_attention
from rexrag.engine.sampling import cache, cuda_graphs, sampler
from rexrag.engine.sampling.cache import CacheShape
from rexrag.engine.sampling.decoder import layer_attention
from rexrag.engine.sampling.sampler import LocalSession
from tests.engine.sampling.test_sampler import CUE, largest_error, last_sampled, rollouts, run
from tests.support.scripted import MAKERS, Echo, qwen2


def packed(name: str):
    made = MAKERS[name]()
    use_packed_attention(made)
    return made


def graph_session(made, own: bool = False) -> LocalSession:
    shape = replace(CacheShape.of(made), cuda_graphs=True)
    return LocalSession(made, shape, None if own else layer_attention(made))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("grain", [8, 256])
def test_rollouts_and_probes_are_those_of_the_plain_sampler(model, monkeypatch, grain, own):
    """With few rows at once, banks that rows outgrow, searches that wait, and banks that empty and fill."""
    monkeypatch.setattr(cache, "GRAPH_CAPACITY_STEP", grain)
    monkeypatch.setattr(sampler, "MAX_ROWS", 11)
    episodes, expected = rollouts(8, 3, turns=4), rollouts(8, 3, turns=4)
    opened, plain = graph_session(model, own), run(model, expected, seed=4)
    opened.run(episodes, Echo(), 1.0, 4)
    assert [e.tokens for e in episodes] == [e.tokens for e in expected]
    assert largest_error(model, episodes) < 1e-4
    sets = [[e.fork(CUE, max(1, last_sampled(e) // 2)) for e in done] for done in (episodes, expected)]
    opened.run(sets[0], Echo(), 1.0, 9)
    plain.run(sets[1], Echo(), 1.0, 9)
    for probe, other in zip(*sets, strict=True):
        assert probe.tokens == other.tokens
        assert np.allclose(probe.logps, other.logps, atol=1e-4)
    assert (opened.generated_tokens, opened.prefilled_tokens) == (
        plain.generated_tokens,
        plain.prefilled_tokens,
    )


def test_a_step_is_captured_once_for_a_power_of_two_of_rows(monkeypatch):
    made = packed("llama")
    steps = []
    prepare = cuda_graphs.CudaGraphs._prepare_step

    def watched(self, bank, ids, positions):
        steps.append((bank.capacity, bank.room, len(ids)))
        return prepare(self, bank, ids, positions)

    monkeypatch.setattr(cuda_graphs.CudaGraphs, "_prepare_step", watched)
    opened = graph_session(made)
    for seed in range(3):
        opened.run(rollouts(7, 3), Echo(), 1.0, seed)
    assert len(set(steps)) == len(steps) > 1
    assert {rows for _, _, rows in steps} <= {8, 16, 21} and {capacity for capacity, _, _ in steps} == {512}
    opened.close()
    assert not opened._cache.banks


def test_a_bank_that_grew_is_captured_anew(monkeypatch):
    made = packed("llama")
    opened = graph_session(made)
    opened.run(rollouts(2, 1), Echo(), 1.0, 0)  # room for a few
    episodes = rollouts(8, 3, turns=4)
    opened.run(episodes, Echo(), 1.0, 0)
    (bank,) = opened._cache.banks.values()
    assert bank.room > 8 and {room for room, _ in opened._forward._steps[bank]} == {bank.room}
    assert largest_error(made, episodes) < 1e-4


def test_windows_hide_the_same_tokens(monkeypatch):
    monkeypatch.setattr(cache, "GRAPH_CAPACITY_STEP", 8)
    made = qwen2(num_key_value_heads=1, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    use_packed_attention(made)
    assert {layer.window for layer in layer_attention(made)} == {None, 16}
    episodes, expected = rollouts(6, 2, turns=4), rollouts(6, 2, turns=4)
    graph_session(made).run(episodes, Echo(), 1.0, 2)
    run(made, expected, seed=2)
    assert [e.tokens for e in episodes] == [e.tokens for e in expected]


def test_a_step_that_cannot_be_captured_runs_without_a_graph(monkeypatch, caplog):
    """From the step on in which it fails, which has already written its keys."""
    made, calls = packed("llama"), []
    prepare = cuda_graphs.CudaGraphs._prepare_step

    def second_fails(self, bank, ids, positions):
        calls.append(len(ids))
        step = prepare(self, bank, ids, positions)
        if len(calls) == 2:
            step()
            raise cuda_graphs.CaptureError("not permitted")
        return step

    monkeypatch.setattr(cuda_graphs.CudaGraphs, "_prepare_step", second_fails)
    opened, expected = graph_session(made), rollouts(8, 3, turns=4)
    episodes = rollouts(8, 3, turns=4)
    opened.run(episodes, Echo(), 1.0, 4)
    run(made, expected, seed=4)
    assert [e.tokens for e in episodes] == [e.tokens for e in expected]
    assert len(calls) == 2 and not opened._forward._steps
    assert caplog.text.count("without CUDA graphs") == 1


def test_a_large_bank_goes_with_its_last_row(monkeypatch):
    opened = graph_session(packed("llama"))
    opened.run(rollouts(3, 2), Echo(), 1.0, 0)
    assert list(opened._cache.banks) == [512]
    monkeypatch.setattr(cache, "KEPT_BYTES", 100)
    opened.run(rollouts(3, 2), Echo(), 1.0, 0)
    assert not opened._cache.banks


def test_a_row_that_waits_keeps_its_cache(monkeypatch):
    """Its slot takes part in every step: its cache stays as it is, also when full."""
    monkeypatch.setattr(cache, "GRAPH_CAPACITY_STEP", 4)
    monkeypatch.setattr(sampler, "SEARCH_PATIENCE", 1000)
    monkeypatch.setattr(sampler, "SEARCH_SHARE", 1)
    made = packed("qwen2")
    ends = []
    step = cuda_graphs.CudaGraphs._step

    def watched(self, group, ids):
        ends.extend(group.bank.capacity - row.length for row in group.bank.rows if row.waiting)
        before = [group.bank.view(row).clone() for row in group.bank.rows]
        hidden = step(self, group, ids)
        for row, kv in zip(group.bank.rows, before, strict=True):
            assert torch.equal(group.bank.view(row), kv)
        return hidden

    monkeypatch.setattr(cuda_graphs.CudaGraphs, "_step", watched)
    episodes = rollouts(6, 4, turns=4)
    graph_session(made).run(episodes, Echo(), 1.0, 0)
    assert ends and min(ends) == 1
    assert largest_error(made, episodes) < 1e-4

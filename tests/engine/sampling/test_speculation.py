"""Speculative tokens: they save forwards and change no sampled token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rexrag.engine.sampling import sampler, speculation
from rexrag.types import Origin
from tests.engine.sampling.test_sampler import CUE, counted, last_sampled, rollouts, session
from tests.support.scripted import Echo, Script


@pytest.mark.parametrize("temperature", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("predictable", [False, True])
def test_speculation_saves_forwards_and_changes_no_token(model, predictable, temperature, monkeypatch):
    if predictable:  # what comes next depends on the last token alone
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()

    def drawn(least_bytes: int, length: int = speculation.LENGTH) -> tuple[list[Script], int, int]:
        monkeypatch.setattr(sampler, "SPECULATION_BYTES", least_bytes)
        monkeypatch.setattr(speculation, "LENGTH", length)
        episodes = rollouts(5, 8, turns=4)
        opened = session(model)
        sizes = counted(opened)
        opened.run(episodes, Echo(), temperature, 3)
        probes = [e.fork(CUE, cut=max(1, last_sampled(e) // 2)) for e in episodes]
        opened.run(probes, Echo(), temperature, 4)
        assert opened.generated_tokens == sum(
            e.origins[e.cut or 0 :].count(int(Origin.POLICY)) for e in episodes + probes
        )
        return episodes + probes, len(sizes), opened.prefilled_tokens

    plain, steps, read = drawn(1 << 60)
    for length in (1, 4, 30):
        speculative, fewer, same = drawn(0, length)
        assert [e.tokens for e in speculative] == [e.tokens for e in plain]
        close = 1e-5 / (temperature or 1.0)
        assert all(np.allclose(x.logps, y.logps, atol=close) for x, y in zip(speculative, plain, strict=True))
        assert same == read
        if predictable and temperature < 1.0:
            assert fewer < (0.8 if length == 1 else 0.7) * steps


def test_the_proposed_token_is_the_most_frequent_one_after_the_longest_known_context():
    table = speculation.NGrams()
    assert table.propose([1, 2, 3], 4) == []
    table.learn([], [1, 2, 3, 4, 5])
    assert table.propose([1, 2, 3], 4) == [4]  # seen once: a second would be too bold
    for _ in range(9):
        table.learn([], [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert table.propose([1, 2, 3], 9) == [4, 5, 6, 7, 8, 9]
    assert table.propose([1, 2, 3], 2) == [4, 5]
    assert table.propose([1, 2, 3], 0) == table.propose([1, 2, 3], -1) == table.propose([], 4) == []
    assert table.propose([8, 8, 3], 1) == [4]  # no such triple or pair: by the last token
    table.learn([8, 8, 3], [7])
    assert table.propose([8, 8, 3], 1) == [7]
    for token in range(20, 30):
        table.learn([3, 3], [token])
    assert table.propose([3, 3], 1) == []  # anything may follow

"""Token draws follow the distribution; random numbers are even and independent."""

from __future__ import annotations

import math

import numpy as np
import torch

from rexrag.engine.sampling.token_draw import draw_tokens, find, invert, streams, uniforms


def test_drawing_follows_the_distribution():
    head = torch.nn.Linear(4, 5)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.0, -math.inf, 1.0, 2.0, -1.0]))
        head.weight.zero_()
    n = 40_000
    uniform = torch.tensor(uniforms(streams(11, [0] * n), [3] * n))
    for temperature in (1.0, 2.0):
        tokens, logps = draw_tokens(head, torch.zeros(n, 4), temperature, uniform)
        expected = (head.bias / temperature).softmax(-1)
        shares = torch.bincount(tokens, minlength=5) / n
        assert torch.allclose(shares, expected, atol=0.01)
        assert torch.allclose(logps.exp(), expected[tokens], atol=1e-6)
    for vocabulary in (5, 256, 257, 1000):
        probs = (torch.randn(300, vocabulary) * 4).softmax(-1) * (torch.rand(300, vocabulary) < 0.5)
        point = torch.rand(300, 1, dtype=torch.float64)
        reached = probs.cumsum(-1, dtype=torch.float64)
        expected = torch.searchsorted(reached, point * reached[:, -1:], right=True)
        some = reached[:, -1] > 0
        assert torch.equal(invert(probs, point, torch.arange(300))[some], expected[some])
    counts = [3, 1, 0, 2]
    wide, hidden = torch.nn.Linear(4, 1000), torch.randn(4, 4)
    apart = hidden.repeat_interleave(torch.tensor(counts), dim=0)
    for temperature in (0.0, 0.5):
        shared = draw_tokens(wide, hidden, temperature, uniform[:6], counts)
        one_each = draw_tokens(wide, apart, temperature, uniform[:6])
        assert torch.equal(shared[0], one_each[0]) and torch.allclose(shared[1], one_each[1], atol=1e-6)
    # Outcomes without mass at either end, and in the blocks there, are never found.
    probs = torch.zeros(2, 1000)
    probs[:, 400], probs[:, 700] = 0.25, 0.5
    ends = torch.tensor([[0.0], [1.0 - 2.0**-53]], dtype=torch.float64)
    assert invert(probs, ends, torch.arange(2)).tolist() == [[400], [700]]
    index, before = find(torch.tensor([[0.0, 1.0]]), torch.tensor([[-1e-17]]))  # a difference of rounded sums
    assert (index.item(), before.item()) == (1, 0.0)
    edges = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    tokens, logps = draw_tokens(head, torch.zeros(2, 4), 1.0, edges)
    assert tokens.tolist() == [0, 4] and logps.isfinite().all()


def test_random_numbers_are_even_and_apart():
    keys = streams(0, [0] * 200)
    numbers = np.array([uniforms(keys, [position] * 200) for position in range(200)])
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    assert np.abs(counts / 800 - 1).max() < 0.2
    for a, b in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02
    assert len(set(streams(0, [0, 1, 2]) + streams(1, [0, 1, 2]) + streams(0, [1, 1, 1]))) == 8

"""Every way in which probing could have written a rollout, and the weight that follows from it."""

import math

import pytest
import torch

from rexrag.errors import NonFiniteError, ShapeError
from rexrag.method import CueTrie
from rexrag.method.weights import trajectory_weights
from rexrag.theory.explanations import explanation_log_ratios
from tests.support.rollouts import C, E, P


def test_explanations_are_found_where_a_cue_stands_word_for_word():
    trie = CueTrie([[5, 6], [5, 7], [5, 7]])
    tokens = torch.tensor([[1, 5, 6, 2, 5, 7], [5, 6, 0, 0, 0, 0], [1, 2, 3, 5, 2, 6]])
    origin = torch.tensor([[P, C, C, P, P, P], [E, E, P, -1, -1, -1], [P] * 6])
    logp = torch.full((3, 6), -1.0)
    z = torch.full((3,), 0.5, dtype=torch.float64)
    anywhere = torch.full((3,), 99)
    tokens = torch.nn.functional.pad(tokens, (0, 1), value=3)
    origin = torch.cat([origin, torch.tensor([[P], [-1], [P]])], dim=1)
    logp = torch.nn.functional.pad(logp, (0, 1), value=-1.0)
    got = explanation_log_ratios(tokens, logp, origin, trie.cues, trie.table(), z, anywhere)
    both = (1 / 3 + 2 / 3) * math.exp(2.0) / 0.5
    assert got.tolist() == pytest.approx([math.log(both), -math.inf, -math.inf])


def explained(last_cut, length=6, logp=None):
    """log r of one rollout `1 5 6 2 5 7 …` of `length` tokens, with z = 1 and two cues."""
    trie = CueTrie([[5, 6], [5, 7]])
    tokens = torch.tensor([[1, 5, 6, 2, 5, 7, 3]])
    origin = torch.where(torch.arange(7) < length, P, -1)[None]
    logp = torch.full((1, 7), -1.0) if logp is None else logp
    one = torch.ones(1, dtype=torch.float64)
    where = torch.tensor([last_cut])
    return float(explanation_log_ratios(tokens, logp, origin, trie.cues, trie.table(), one, where)[0])


def test_words_behind_the_last_possible_cut_explain_nothing():
    each = 2.0 + math.log(1 / 2)
    both = each + math.log(2)
    assert explained(99, length=7) == pytest.approx(both)
    assert explained(4, length=7) == pytest.approx(both)
    assert explained(3, length=7) == explained(1, length=7) == pytest.approx(each)
    assert explained(0, length=7) == explained(-1, length=7) == -math.inf
    # A probe goes on after its cue: one that ends with it was not given it.
    assert explained(99, length=6) == pytest.approx(each)
    assert explained(99, length=3) == -math.inf


def test_a_log_prob_that_is_not_finite_is_named_and_evidence_is_not_looked_at():
    broken = torch.full((1, 7), -1.0)
    broken[0, 0] = -math.inf
    with pytest.raises(NonFiniteError, match=r"policy_logp\[0, 0\] = -inf"):
        explained(99, length=7, logp=broken)
    trie = CueTrie([[5, 6]])
    tokens, origin = torch.tensor([[9, 5, 6, 2]]), torch.tensor([[E, P, P, P]])
    logp = torch.tensor([[math.nan, -1.0, -1.0, -1.0]])
    one = torch.ones(1, dtype=torch.float64)
    got = explanation_log_ratios(tokens, logp, origin, trie.cues, trie.table(), one, torch.tensor([3]))
    assert float(got[0]) == pytest.approx(2.0)


def test_a_spoken_cue_weighs_what_an_inserted_one_does():
    """Multiple importance sampling asks what could have written a rollout, not what did."""
    trie = CueTrie([[20, 21], [20, 22, 23], [20, 22, 24]])
    tokens = torch.tensor([[9, 20, 21, 9], [9, 20, 21, 9], [9, 8, 21, 9]])
    origin = torch.tensor([[P, P, P, P], [P, C, C, P], [P, P, P, P]])
    logp = torch.tensor([[-1.0, -2.0, -3.0, -1.0]] * 3)
    z = torch.full((3,), 5 / 6, dtype=torch.float64)
    log_r = explanation_log_ratios(tokens, logp, origin, trie.cues, trie.table(), z, torch.full((3,), 2))
    weight = trajectory_weights(log_r, 1 / 7)
    r = math.exp(math.log(1 / 3) + 5.0) / (5 / 6)
    assert weight.tolist() == pytest.approx([1 / (6 / 7 + r / 7)] * 2 + [7 / 6])


def test_shapes_that_do_not_agree_are_named():
    trie, one = CueTrie([[5]]), torch.ones(1, dtype=torch.float64)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ShapeError, match="last_cut has shape"):
        explanation_log_ratios(
            tokens, torch.zeros(1, 3), tokens, trie.cues, trie.table(), one, torch.zeros(2)
        )

"""The trie: shares sum to one at every node, products are shares of the pool, duplicates add mass."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rexrag.errors import CueError
from rexrag.method import CueTrie

pools = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=12)


def test_worked_example():
    trie = CueTrie([[7, 1, 2], [7, 1, 3], [7, 4, 5]])
    assert trie.log_prob([7, 1, 2]).exp().tolist() == pytest.approx([1.0, 2 / 3, 1 / 2])
    assert trie.log_prob([7, 4, 5]).exp().tolist() == pytest.approx([1.0, 1 / 3, 1.0])
    assert trie.log_prob([7, 4, 5]).dtype == torch.float64
    assert trie.opening == 1
    assert CueTrie([[7, 8, 1], [7, 8, 2]]).opening == 2
    assert CueTrie([[7, 8, 1]]).opening == CueTrie([[7, 8, 1], [7, 8, 1]]).opening == 1


@given(pools)
def test_a_cue_s_product_is_its_share_of_the_pool(pool):
    trie = CueTrie(pool)
    for cue in pool:
        assert float(trie.log_prob(cue).sum().exp()) == pytest.approx(pool.count(cue) / len(pool))


@given(pools)
def test_the_pool_s_probabilities_sum_to_one(pool):
    trie = CueTrie(pool)
    distinct = {tuple(cue) for cue in pool}
    assert sum(math.exp(float(trie.log_prob(cue).sum())) for cue in distinct) == pytest.approx(1.0)


@given(pools)
def test_shares_sum_to_one_at_every_node(pool):
    trie = CueTrie(pool)
    for cue in pool:
        for depth in range(len(cue) + 1):
            assert sum(trie.shares(cue[:depth]).values()) == pytest.approx(1.0)


@given(pools)
def test_shares_are_the_pool_counted_by_hand(pool):
    trie = CueTrie(pool)
    for cue in pool:
        for depth in range(len(cue)):
            same = [c for c in pool if c[:depth] == cue[:depth]]
            share = sum(len(c) > depth and c[depth] == cue[depth] for c in same) / len(same)
            assert trie.shares(cue[:depth])[cue[depth]] == pytest.approx(share)


def test_duplicates_add_mass():
    once, twice = CueTrie([[1, 2], [1, 3]]), CueTrie([[1, 2], [1, 2], [1, 3]])
    assert float(once.log_prob([1, 2]).sum().exp()) == pytest.approx(1 / 2)
    assert float(twice.log_prob([1, 2]).sum().exp()) == pytest.approx(2 / 3)


def test_a_cue_that_begins_another_keeps_its_own_share():
    trie = CueTrie([[1], [1, 2]])
    assert trie.log_prob([1]).exp().tolist() == pytest.approx([0.5])
    assert trie.log_prob([1, 2]).exp().tolist() == pytest.approx([1.0, 0.5])


def test_table_pads_with_zero():
    table = CueTrie([[1, 2, 3], [1, 4]]).table()
    assert table.shape == (2, 3)
    assert table[1, 2] == 0.0


def test_digest_follows_the_pool_and_its_order():
    assert CueTrie([[1], [2]]).digest == CueTrie([(1,), (2,)]).digest
    assert CueTrie([[1], [2]]).digest != CueTrie([[2], [1]]).digest


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: CueTrie([]), "cues is empty"),
        (lambda: CueTrie([[1], []]), r"cues\[1\] is empty"),
        (lambda: CueTrie([[1]]).log_prob([2]), r"cue = \[2\] is not one of"),
        (lambda: CueTrie([[1, 2]]).log_prob([1]), r"cue = \[1\] is not one of"),
        (lambda: CueTrie([[1, 2]]).shares([5]), r"prefix = \[5\]"),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises(CueError, match=says) as caught:
        make()
    assert isinstance(caught.value, LookupError)

"""The sampler against transformers itself, and what batching must never change."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch

from rexrag.agent.episode import State
from rexrag.engine.attention import use_packed_attention
from rexrag.engine.sampling import batch, sampler
from rexrag.engine.sampling.cache import CacheShape, capacity_for
from rexrag.engine.sampling.decoder import layer_attention
from rexrag.engine.sampling.sampler import LocalSession
from rexrag.errors import DataError, ModelError, RetrievalError
from rexrag.types import Origin
from tests.support.scripted import MAKERS, Echo, Script, prompts, qwen2

CUE = [7, 8, 9]


@pytest.fixture(autouse=True, params=["speculation", "plain"])
def speculates(request, monkeypatch) -> bool:
    """With and without speculation, which is off for models of this size."""
    on: bool = request.param == "speculation"
    monkeypatch.setattr(sampler, "SPECULATION_BYTES", 0 if on else 1 << 60)
    return on


def session(model, **options) -> LocalSession:
    return LocalSession(model, CacheShape.of(model), layer_attention(model), **options)


def rollouts(n: int = 8, each: int = 3, **options) -> list[Script]:
    return [Script(prompt, **options) for prompt in prompts(n) for _ in range(each)]


def run(model, episodes, temperature=1.0, seed=0, retriever=None) -> LocalSession:
    opened = session(model)
    opened.run(episodes, retriever or Echo(), temperature, seed)
    return opened


def full_logps(model, episode: Script, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the response by one forward of the model's own over the whole row."""
    row = torch.tensor([[*episode.prompt, *episode.tokens]])
    with torch.no_grad():
        logp = (model(row, use_cache=False).logits[0].float() / temperature).log_softmax(-1)
    start = len(episode.prompt)
    return logp[start - 1 : -1].gather(1, row[0, start:, None])[:, 0]


def largest_error(model, episodes, temperature: float = 1.0) -> float:
    errors = []
    for episode in episodes:
        kept = torch.tensor(episode.origins) <= int(Origin.CUE)
        difference = full_logps(model, episode, temperature) - torch.tensor(episode.logps)
        errors.append(difference[kept].abs().max().item())
        assert all(logp == 0.0 for logp, keep in zip(episode.logps, kept.tolist(), strict=True) if not keep)
    return max(errors)


def last_sampled(episode: Script) -> int:
    return max(i for i, origin in enumerate(episode.origins) if origin == Origin.POLICY)


def generate_turns(model, episode: Script, retriever: Echo) -> Script:
    """The same episode driven by transformers' own `generate`, each turn on the full context anew."""
    while episode.state is not State.DONE:
        if episode.state is State.SEARCH:
            episode.found(retriever.search([episode.query], episode.topk)[0])
        elif episode.state is State.FORCED:
            episode.take_forced([0.0] * len(episode.forced))
        else:
            row = torch.tensor([[*episode.prompt, *episode.tokens]])
            out = model.generate(row, max_new_tokens=episode.turn_tokens, do_sample=False)
            for token in out[0, row.shape[1] :].tolist():
                episode.sampled(token, 0.0)
                if episode.state is not State.SAMPLE:
                    break
    return episode


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_greedy_is_generate_token_for_token_over_turns(name, attention):
    model, reference = MAKERS[name](seed=3), MAKERS[name](seed=3)
    use_packed_attention(model)
    reference.set_attn_implementation(attention)
    episodes = rollouts(10, 1, turns=4)
    run(model, episodes, temperature=0.0)
    expected = [generate_turns(reference, Script(e.prompt, turns=4), Echo()) for e in episodes]
    assert [e.tokens for e in episodes] == [e.tokens for e in expected]
    assert [e.origins for e in episodes] == [e.origins for e in expected]
    assert {Origin.POLICY, Origin.EVIDENCE, Origin.NOTICE} <= {o for e in episodes for o in e.origins}


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_a_full_forward(model, temperature):
    episodes = rollouts()
    run(model, episodes, temperature)
    assert largest_error(model, episodes, temperature or 1.0) < 1e-5


def test_log_probs_in_bfloat16_are_near_a_full_forward_in_bfloat16():
    model = qwen2(dtype="bfloat16").to(torch.bfloat16)
    use_packed_attention(model)
    episodes = rollouts()
    run(model, episodes)
    errors = []
    for episode in episodes:
        kept = torch.tensor(episode.origins) == int(Origin.POLICY)
        errors.append((full_logps(model, episode) - torch.tensor(episode.logps))[kept].abs())
    errors = torch.cat(errors)
    # Rounding of bfloat16 activations, which depends on the shape of a matrix product. The logits here span
    # about 20, where a bfloat16 step is 0.06–0.125.
    assert errors.mean() < 0.03 and errors.max() < 0.5


def test_grouped_windowed_and_tied_variants_agree_with_a_full_forward():
    variants = [
        qwen2(num_key_value_heads=4),
        qwen2(num_key_value_heads=1),
        qwen2(use_sliding_window=True, sliding_window=16, max_window_layers=1),
        qwen2(tie_word_embeddings=False),
    ]
    for model in variants:
        use_packed_attention(model)
        episodes = rollouts(4, 2)
        opened = run(model, episodes)
        probes = [e.fork(CUE, cut=len(e.tokens) // 2) for e in episodes]
        opened.run(probes, Echo(), 1.0, 1)
        assert largest_error(model, episodes + probes) < 2e-5


def test_a_row_does_not_depend_on_its_neighbours(model):
    together = rollouts(6, 3)
    run(model, together, seed=5)
    for place, episode in enumerate(together):
        # Its place decides its random numbers, so the others stand there but are already done.
        alone = [Script(e.prompt) for e in together]
        for other in alone[:place] + alone[place + 1 :]:
            other.state = State.DONE
        run(model, alone, seed=5)
        assert alone[place].tokens == episode.tokens
        assert np.allclose(alone[place].logps, episode.logps, atol=1e-5)


def test_the_seed_and_the_place_decide(model):
    def tokens(seed: int) -> list[list[int]]:
        episodes = [Script([5, 6, 7]) for _ in range(6)]
        run(model, episodes, seed=seed)
        return [episode.tokens for episode in episodes]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert len({tuple(t) for t in tokens(1)}) == 6


def counted(opened: LocalSession) -> list[int]:
    """A list that grows by the number of tokens of each forward."""
    sizes, forward = [], opened._forward

    def watched(ids, positions, plan):
        sizes.append(len(ids))
        return forward(ids, positions, plan)

    opened._forward = watched
    return sizes


def run_prefixes(episodes: list[Script]) -> set[tuple[int, ...]]:
    """Every beginning of a row that the model had to run, once. Nothing follows the last sampled token."""
    rows = [(*e.prompt, *e.tokens[: last_sampled(e)]) for e in episodes]
    return {row[:end] for row in rows for end in range(1, len(row) + 1)}


@pytest.mark.parametrize("temperature", [0.0, 0.15, 1.0])
def test_prefixes_that_rollouts_share_are_run_once(model, temperature, speculates):
    episodes = rollouts(4, 12, turns=4)
    opened = session(model)
    sizes = counted(opened)
    opened.run(episodes, Echo(), temperature, 5)
    assert sum(sizes) == len(run_prefixes(episodes)) or (
        speculates and sum(sizes) > len(run_prefixes(episodes))
    )
    tokens = sum(last_sampled(e) for e in episodes)
    assert temperature == 1.0 or speculates or sum(sizes) < (0.3 if temperature == 0.0 else 0.8) * tokens
    assert opened.generated_tokens == sum(e.origins.count(int(Origin.POLICY)) for e in episodes)
    for place in (0, 13, 47):  # each is what it would have been alone
        alone = [Script(e.prompt, turns=4) for e in episodes]
        for other in alone[:place] + alone[place + 1 :]:
            other.state = State.DONE
        run(model, alone, temperature, seed=5)
        assert alone[place].tokens == episodes[place].tokens
        assert np.allclose(alone[place].logps, episodes[place].logps, atol=1e-5)
    assert largest_error(model, episodes, temperature or 1.0) < 1e-5 / (temperature or 1.0)
    opened.close()


def test_episodes_with_equal_tokens_get_rows_of_their_own_where_their_share_key_differs(model):
    options = [{}, {"turn_tokens": 5}, {"turns": 2}, {"evidence": 4}, {}]
    episodes = [Script(prompt, **chosen) for prompt in prompts(6) for chosen in options]
    asking_less = episodes[4::5]
    for episode in asking_less:
        episode.topk = 1
    run(model, episodes, temperature=0.0)
    for place, episode in enumerate(episodes):
        alone = Script(episode.prompt, **options[place % 5])
        alone.topk = episode.topk
        run(model, [alone], temperature=0.0)
        assert alone.tokens == episode.tokens
    assert any(x.tokens != y.tokens for x, y in zip(episodes[::5], episodes[1::5], strict=True))
    assert any(x.tokens != y.tokens for x, y in zip(episodes[::5], asking_less, strict=True))


def test_probes_with_the_same_past_and_cue_start_as_one(model):
    parents = rollouts(3, 4)
    opened = run(model, parents, temperature=0.0)
    cut = 1 + min(last_sampled(parent) for parent in parents)
    probes = [p.fork(cue, cut) for p, cue in zip(parents, 3 * [CUE, CUE, CUE[:2], CUE], strict=True)]
    before, sizes = opened.prefilled_tokens, counted(opened)
    opened.run(probes, Echo(), 1.0, 7)
    assert sizes[0] == 3 * (1 + len(CUE)) + 3 * (1 + len(CUE[:2]))
    fresh = session(model)
    again = [p.fork(cue, cut) for p, cue in zip(parents, 3 * [CUE, CUE, CUE[:2], CUE], strict=True)]
    fresh.run(again, Echo(), 1.0, 7)
    assert [probe.tokens for probe in probes] == [probe.tokens for probe in again]
    assert len({tuple(probe.tokens) for probe in probes}) > 6
    assert largest_error(model, probes) < 1e-5
    assert opened.prefilled_tokens > before


def test_finished_rollouts_that_are_the_same_keep_one_cache(model):
    parents = rollouts(3, 5)
    opened = run(model, parents, temperature=0.0)
    assert len(opened._saved) == 3 and not opened._cache.banks
    probes = [parent.fork(CUE, cut=1 + last_sampled(parent)) for parent in parents]
    sizes = counted(opened)
    opened.run(probes, Echo(), 1.0, 1)
    assert sizes[0] == 3 * (1 + len(CUE))
    assert largest_error(model, probes) < 1e-5


def test_a_prompt_is_prefilled_once_for_all_its_rollouts(model):
    for each in (1, 7):
        # One turn of one token: what a search or a notice appends ends the episode and is never run.
        episodes = rollouts(5, each, turns=1, turn_tokens=1)
        opened = run(model, episodes)
        assert opened.prefilled_tokens == sum(map(len, prompts(5)))
        assert opened.generated_tokens == 5 * each


def test_every_evidence_token_is_prefilled_once(model):
    episodes = rollouts(6, 2, turns=4)
    opened = run(model, episodes)
    appended = 0
    for episode in episodes:
        # What was appended after the last sampled token was never run: nothing follows it.
        appended += sum(o != Origin.POLICY for o in episode.origins[: last_sampled(episode)])
    assert opened.prefilled_tokens == sum(map(len, prompts(6))) + appended
    assert opened.generated_tokens == sum(e.origins.count(int(Origin.POLICY)) for e in episodes)


@pytest.mark.parametrize("cue", [CUE, []])
def test_a_probe_equals_prefilling_its_prefix_anew(model, cue):
    parents = rollouts(5, 2)
    opened = run(model, parents)
    before = opened.prefilled_tokens
    # Up to the last sampled token: what was appended after it was never run.
    cuts = [max(1, (1 + last_sampled(p)) * (i % 5) // 4) for i, p in enumerate(parents)]
    probes = [p.fork(cue, cut) for p, cut in zip(parents, cuts, strict=True)]
    again = [p.fork(cue, cut) for p, cut in zip(parents, cuts, strict=True)]
    opened.run(probes, Echo(), 1.0, 3)
    fresh = session(model)
    fresh.run(again, Echo(), 1.0, 3)
    for probe, other, parent, cut in zip(probes, again, parents, cuts, strict=True):
        assert probe.tokens[:cut] == parent.tokens[:cut]
        assert probe.tokens == other.tokens
        assert np.allclose(probe.logps, other.logps, atol=1e-5)
    assert largest_error(model, probes) < 1e-5
    assert all(p.origins.count(int(Origin.CUE)) == len(cue) for p in probes)
    # A probe costs its cue and the one token before it; anew, it costs its prefix, but for a shared prompt.
    saved = fresh.prefilled_tokens - (opened.prefilled_tokens - before)
    assert saved == sum(map(len, prompts(5))) + sum(cuts) - len(probes)


def test_a_probe_with_the_same_seed_and_place_is_no_copy_of_its_parent(model):
    parents = [Script(prompt) for prompt in prompts(6)]
    opened = run(model, parents, seed=4)
    probes = [parent.fork([], cut=1) for parent in parents]
    opened.run(probes, Echo(), 1.0, 4)
    assert any(probe.tokens[1:4] != parent.tokens[1:4] for probe, parent in zip(probes, parents, strict=True))


def test_a_cache_that_had_to_go_is_prefilled_anew(model):
    def probe(saved_bytes: int) -> tuple[list[Script], int]:
        parents = rollouts(3, 2)
        opened = session(model, saved_bytes=saved_bytes)
        opened.run(parents, Echo(), 1.0, 0)
        before = opened.prefilled_tokens
        probes = [parent.fork(CUE, cut=1 + last_sampled(parent)) for parent in parents]
        opened.run(probes, Echo(), 1.0, 1)
        return probes, opened.prefilled_tokens - before

    (kept, cheap), (dropped, dear) = probe(1 << 30), probe(0)
    assert [p.tokens for p in kept] == [p.tokens for p in dropped]
    prefixes = sum(map(len, prompts(3))) + sum(p.cut for p in dropped)
    assert dear - cheap == prefixes - len(dropped)


def test_finished_rows_leave_at_once_and_long_ones_do_not_hold_them(model):
    class Watched(Script):
        def sampled(self, token: int, logp: float) -> None:
            super().sampled(1, logp)
            self.state = State.DONE if len(self.tokens) == self.total else State.SAMPLE
            open_rows.append(opened._cache.row_count)

    opened = session(model)
    open_rows: list[int] = []
    lengths = [2, 2, 2, 2, 2, 2, 300, 4]
    episodes = [Watched(prompt, total=n) for prompt, n in zip(prompts(8), lengths, strict=True)]
    opened.run(episodes, Echo(), 1.0, 0)
    assert [len(e.tokens) for e in episodes] == lengths
    assert opened.generated_tokens == sum(lengths) == len(open_rows)
    assert Counter(open_rows)[1] >= 296
    assert not opened._cache.banks
    opened.close()


def test_rows_beyond_the_limit_wait_for_a_place(model, monkeypatch, speculates):
    free, limited = rollouts(6, 3), rollouts(6, 3)
    run(model, free, seed=2)
    monkeypatch.setattr(sampler, "MAX_ROWS", 4)
    monkeypatch.setattr(batch, "PREFILL_TOKENS", 24)
    monkeypatch.setattr(batch, "BLOCK_VALUES", 5000)  # blocks of two rows at most
    open_rows, blocks = [], []
    append = LocalSession._append

    def watched(self, rows, plan, temperature):
        blocks.append([group for group in plan.groups if group.copied])
        ready = append(self, rows, plan, temperature)
        open_rows.append(self._cache.row_count)
        return ready

    monkeypatch.setattr(LocalSession, "_append", watched)
    opened = run(model, limited, seed=2)
    assert 1 < max(open_rows) <= 4
    assert {len(group.slots) for several in blocks for group in several} == {1, 2}
    assert speculates or max(map(len, blocks)) > 1
    for several in blocks:
        rows, tokens = (
            sum(x) for x in zip((0, 0), *((len(g.slots), g.stop - g.start) for g in several), strict=True)
        )
        assert rows <= 1 or tokens <= 24
    assert [e.tokens for e in limited] == [e.tokens for e in free]
    # A prompt met again later costs its last token, not itself.
    assert opened.prefilled_tokens < sum(map(len, prompts(6))) + 18 + sum(
        sum(o != Origin.POLICY for o in e.origins) for e in limited
    )


def test_searches_wait_for_others_and_that_changes_no_token(model, monkeypatch):
    def calls(share: int, patience: int) -> tuple[list[list[int]], list[list[str]]]:
        monkeypatch.setattr(sampler, "SEARCH_SHARE", share)
        monkeypatch.setattr(sampler, "SEARCH_PATIENCE", patience)
        retriever, episodes = Echo(), rollouts(8, 4, turns=4)
        run(model, episodes, retriever=retriever)
        return [e.tokens for e in episodes], retriever.calls

    at_once = calls(1000, 1000)
    quarter = calls(4, 16)
    impatient = calls(1, 2)
    together = calls(1, 1000)
    assert at_once[0] == quarter[0] == impatient[0] == together[0]
    counts = [len(asked) for _, asked in (at_once, quarter, together)]
    assert counts[0] > counts[1] > counts[2]
    assert len(together[1]) < len(impatient[1]) < len(at_once[1])
    for _, asked in (quarter, impatient, together):
        assert sorted(query for batch in asked for query in batch) == sorted(
            query for batch in at_once[1] for query in batch
        )


def test_a_failed_search_closes_the_session(model):
    class Broken(Echo):
        def search(self, queries, topk):
            raise RetrievalError("no answer")

    opened = session(model)
    with pytest.raises(RetrievalError):
        opened.run(rollouts(), Broken(), 1.0, 0)
    assert not opened._cache.banks


def test_logits_that_are_not_finite_are_an_error():
    model = qwen2()
    use_packed_attention(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match="not finite"):
            run(model, rollouts(1, 1), temperature)


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(DataError, match="no tokens"):
        run(model, [Script([1]), Script([])])


def test_an_empty_run_does_nothing(model):
    opened = run(model, [])
    assert opened.generated_tokens == opened.prefilled_tokens == 0


def test_bank_capacities_grow_by_a_bounded_factor():
    for length in range(1, 5000):
        capacity = capacity_for(length)
        assert length <= capacity <= max(64, 1.5 * length)

"""The step with a scripted policy: who is probed, what is kept, what is trained."""

import math

import pytest
import torch

from rexrag.config.files import parse_config
from rexrag.errors import AlphaError
from rexrag.method import CueTrie
from rexrag.training.metrics import describe
from rexrag.training.rollout_log import trace_rows
from rexrag.training.step import collect
from rexrag.types import Origin, Question, Segment
from tests.support.fakes import CharCodec, FakeRetriever, ScriptedPolicy, document

CODEC = CharCodec()
CUES = ["<think> wait", "<think> hm ok"]
TRIE = CueTrie([CODEC.encode(cue) for cue in CUES])
QUESTIONS = [Question("easy", "Easy", ("yes",)), Question("hard", "Hard", ("Oslo",))]
ROLLOUTS = 4


def script(question, turn, attempt):
    """Easy: always right. Hard: base rollouts guess; a probe searches and finds Oslo."""
    if question.id == "easy":
        return "<think>sure</think><answer>yes</answer>"
    if attempt < ROLLOUTS:
        return "<think>a guess</think><answer>Rome</answer>"
    return "</think><search>hard</search>" if turn == 0 else "<think>so</think><answer>Oslo</answer>"


class Learner(ScriptedPolicy):
    """Half a nat below the sampler on every token."""

    def score(self, rows, temperature):
        return [logp - 0.5 for logp in super().score(rows, temperature)]


def run(*overrides, questions=QUESTIONS, seed=5, said=script, more=None, learner=None):
    defaults = [
        f"method.rollouts={ROLLOUTS}",
        "method.probe_probability=1.0",
        "method.filter=none",
        "method.allow_large_alpha=true",
        "agent.template=terse",
    ]
    config = parse_config({}, [*defaults, *overrides])
    policy = ScriptedPolicy(said)
    retriever = FakeRetriever({"hard": [document("Oslo", "the answer")]})
    trie = None if config.method.cues == "none" else TRIE
    ratio = config.method.keep_ratio
    return collect(questions, policy, retriever, trie, config, ratio, seed, learner, more), policy


def test_dead_ends_are_probed_and_right_answers_are_not():
    step, _ = run()
    assert len(step.base) == 8 and len(step.probes) == ROLLOUTS
    assert {step.base[p.parent].question.id for p in step.probes} == {"hard"}
    assert [p.parent for p in step.probes] == [4, 5, 6, 7]
    assert all(p.em == 1.0 for p in step.probes) and all(r.em == 0.0 for r in step.base[4:])


def test_a_probe_is_its_parent_s_prefix_then_a_cue_then_the_policy():
    step, _ = run()
    for probe in step.probes:
        parent = step.base[probe.parent]
        assert probe.tokens[: probe.cut] == parent.tokens[: probe.cut]
        assert probe.logps[: probe.cut] == parent.logps[: probe.cut]
        assert CODEC.decode(parent.tokens[: probe.cut]) == "<think>a guess</think>"
        cue = probe.tokens[probe.cut : probe.cut + probe.cue_length]
        assert CODEC.decode(cue) == CUES[probe.cue]
        assert set(probe.origins[probe.cut : probe.cut + probe.cue_length]) == {int(Origin.CUE)}
        assert probe.origins[probe.cut + probe.cue_length] == Origin.POLICY


def test_probes_join_their_parent_s_group_and_move_its_advantage():
    step, _ = run()
    assert step.groups == [0] * 4 + [1] * 4 + [1] * 4
    assert step.advantages[:4].tolist() == [0.0] * 4
    assert bool((step.advantages[4:8] < 0).all()) and bool((step.advantages[8:] > 0).all())
    alone, _ = run("method.probe=false")
    assert alone.probes == [] and alone.advantages.tolist() == [0.0] * 8


def test_without_probes_the_samples_are_plain_grpo_s():
    plain, _ = run("method.probe=false")
    for change in ("method.realignment=trajectory", "method.probe_probability=0.0"):
        other, _ = run("method.probe=false", change)
        assert other.samples == plain.samples
    never, _ = run("method.probe_probability=0.0")
    assert never.samples == plain.samples


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 2), (0.13, 1), (0.0, 0)])
def test_the_filter_keeps_the_floor_of_its_share(ratio, kept):
    step, _ = run("method.filter=cue-logp", "method.keep_floor=0.0", f"method.keep_ratio={ratio}")
    assert int(step.kept.sum()) == kept and len(step.rows) == 8 + kept


def test_the_right_filter_keeps_right_probes_alone_and_few_of_a_group():
    def half(question, turn, attempt):
        wrong_probe = question.id == "hard" and attempt >= ROLLOUTS and attempt % 2 == 0
        return "</think><answer>Rome</answer>" if wrong_probe else script(question, turn, attempt)

    step, _ = run("method.filter=right", "method.keep_ratio=1.0", said=half)
    assert [p.em for p in step.probes].count(0.0) == 2
    assert [p.em for p, k in zip(step.probes, step.kept.tolist(), strict=True) if k] == [1.0, 1.0]
    one, _ = run("method.filter=right", "method.keep_ratio=1.0", "method.keep_per_group=1", said=half)
    assert [p.em for p, k in zip(one.probes, one.kept.tolist(), strict=True) if k] == [1.0]


def test_an_unclipped_tail_is_that_of_weight_one_without_the_clip():
    one, _ = run("method.realignment=internalize")
    free, _ = run("method.realignment=internalize", "method.tail=unclipped")
    assert [s.behaviour_logp for s in free.samples] == [s.behaviour_logp for s in one.samples]
    for row, sample, plain in zip(free.rows, free.samples, one.samples, strict=True):
        assert plain.truncated == ()
        tail = [row.cut >= 0 and t >= row.cut for t in range(len(row.tokens))]
        assert list(sample.truncated) == tail
    assert any(any(sample.truncated) for sample in free.samples)


def test_internalized_rows_hold_no_cue_and_their_scoring_is_counted():
    step, _ = run("method.realignment=internalize")
    for row in step.rows[8:]:
        text = CODEC.decode(row.tokens)
        assert text.startswith("<think>a guess</think><search>hard</search>") and "wait" not in text
        assert int(Origin.CUE) not in row.origins
    paper, _ = run()
    scored = sum(len(row.prompt) + len(row.tokens) for row in step.rows[8:])
    assert step.prefilled_tokens - paper.prefilled_tokens == scored


def test_only_all_wrong_groups_can_be_asked_for():
    def mixed(question, turn, attempt):
        if question.id == "easy" and attempt == 0:
            return "<answer>no</answer>"
        return script(question, turn, attempt)

    everywhere, _ = run(said=mixed)
    hopeless, _ = run("method.probe_groups=all-wrong", said=mixed)
    assert {p.parent for p in everywhere.probes} == {0, 4, 5, 6, 7}
    assert {p.parent for p in hopeless.probes} == {4, 5, 6, 7}


def test_resampling_goes_on_without_a_cue():
    step, _ = run("method.cues=none")
    assert len(step.probes) == ROLLOUTS
    assert all(p.cue is None and p.cue_length == 0 for p in step.probes)
    assert all(int(Origin.CUE) not in p.origins for p in step.probes)


def test_the_guard_stops_a_run_before_it_trains():
    with pytest.raises(AlphaError, match="keep_ratio"):
        run("method.allow_large_alpha=false")


def test_the_same_seed_is_the_same_step_and_sessions_are_closed():
    (a, policy), (b, _) = run("method.probe_probability=0.5"), run("method.probe_probability=0.5")
    assert a.samples == b.samples and [p.cue for p in a.probes] == [p.cue for p in b.probes]
    assert all(session.closed for session in policy.sessions)


def test_figures_add_up():
    step, _ = run()
    figures = describe(step)
    assert figures["em/train"] == 0.5 and figures["dead_ends/rate"] == 0.5
    assert figures["groups/all_wrong_before"] == 0.5 and figures["groups/all_wrong_after"] == 0.0
    assert figures["probes/drawn"] == figures["probes/right"] == figures["probes/kept_right"] == 4.0
    assert figures["tokens/cue"] == sum(p.cue_length for p in step.probes)
    fresh = sum(len(p.tokens) - p.cut for p in step.probes)
    written = sum(len(r.tokens) for r in step.base) + fresh
    assert sum(figures[f"tokens/{o.name.lower()}"] for o in Origin) == written
    assert figures["tokens/policy"] == step.generated_tokens


def test_signal_is_counted_in_rewards_not_in_exact_matches():
    """Nobody is right, but half of the answers share a word with the gold one: F1 trains on that."""

    def near(question, turn, attempt):
        return f"<answer>{'Oslo fjord' if attempt % 2 else 'Rome'}</answer>"

    asked = QUESTIONS[1:]
    exact, _ = run("method.probe=false", questions=asked, said=near)
    f1, _ = run("method.probe=false", "agent.reward=f1", questions=asked, said=near)
    assert describe(exact)["groups/no_signal"] == 1.0 and describe(f1)["groups/no_signal"] == 0.0
    assert bool(f1.advantages.any())


def test_traces_show_probes_beside_their_parents_first():
    step, _ = run()
    rows = trace_rows(step, 3, CODEC, limit=4)
    assert [(r["kind"], r["index"]) for r in rows] == [("base", 4), ("probe", 0), ("base", 5), ("probe", 1)]
    probe = rows[1]
    assert [s["origin"] for s in probe["segments"]] == ["policy", "cue", "policy", "evidence", "policy"]
    assert "".join(s["text"] for s in probe["segments"]) == CODEC.decode(step.probes[0].tokens)
    assert probe["parent"] == 4 and probe["kept"] and probe["advantage"] > 0
    weights = torch.exp(
        torch.tensor(step.rows[8].policy_logp) - step.streams.behaviour_logp[8, : len(step.rows[8].tokens)]
    )[step.streams.mask[8, : len(step.rows[8].tokens)]]
    assert probe["weight"] == pytest.approx(float(weights.mean()), rel=1e-5)
    assert set(step.samples[8].segment) == {int(s) for s in (Segment.PREFIX, Segment.CUE, Segment.SUFFIX)}


@pytest.mark.parametrize("tail", ["one", "truncated", "unclipped"])
def test_traces_of_spliced_probes_have_weights_but_for_the_cue(tail):
    step, _ = run("method.realignment=internalize", f"method.tail={tail}")
    probe = trace_rows(step, 3, CODEC, limit=4)[1]
    assert step.rows[8].tokens != step.probes[0].tokens and probe["weight"] is not None
    weighed = [(s["origin"], s["weight"] is not None) for s in probe["segments"]]
    assert weighed == [
        ("policy", True),
        ("cue", False),
        ("policy", True),
        ("evidence", False),
        ("policy", True),
    ]
    n, row = len(step.rows[8].tokens), step.rows[8]
    ratio = torch.exp(torch.tensor(row.policy_logp) - step.streams.behaviour_logp[8, :n])
    last = ratio[n - len(CODEC.encode(probe["segments"][-1]["text"])) :]
    assert probe["segments"][-1]["weight"] == pytest.approx(float(last.mean()), abs=1e-4)


def test_a_cue_that_no_longer_fits_is_no_probe():
    """Its score would be 0, above every real one: the filter must never see it."""
    prompt, said = len("Question: Hard?"), len("<think>a guess</think><answer>Rome</answer>")
    step, _ = run(f"agent.total_tokens={prompt + said}", questions=QUESTIONS[1:])
    assert step.base[0].answer == "Rome"
    assert all(p.cue_length > 0 for p in step.probes) and len(step.probes) == ROLLOUTS
    tight, _ = run(
        f"agent.total_tokens={prompt + len('<answer>Rome</answer>')}",
        questions=QUESTIONS[1:],
        said=lambda q, turn, attempt: "<answer>Rome</answer>",
    )
    long_cue = CueTrie([CODEC.encode("<think> " + "no " * 20)])
    assert len(tight.probes) == ROLLOUTS
    config = parse_config(
        {},
        [
            "method.rollouts=2",
            "method.probe_probability=1.0",
            "agent.template=terse",
            f"agent.total_tokens={prompt + 30}",
        ],
    )
    policy = ScriptedPolicy(lambda q, turn, attempt: "<answer>Rome</answer>")
    assert collect(QUESTIONS[1:], policy, FakeRetriever(), long_cue, config, 1.0, 0).probes == []


def test_dynamic_sampling_asks_on_until_enough_groups_have_signal():
    """Hard questions alone have no signal; of the next batches one is mixed."""

    def mixed(question, turn, attempt):
        right = question.id.startswith("mixed") and attempt % 2
        return "<answer>yes</answer>" if right else "<answer>no</answer>"

    batches = iter(
        [[Question(f"{kind}-{i}", kind, ("yes",))] for i, kind in enumerate(["hard", "mixed", "mixed"])]
    )
    asked = [Question("hard", "hard", ("yes",))]
    change = ("method.probe=false", "method.dynamic_sampling=4")
    step, _ = run(*change, questions=asked, said=mixed, more=lambda: next(batches))
    assert [q.question.id for q in step.base[::ROLLOUTS]] == ["hard", "hard-0", "mixed-1"]
    assert {sample.group for sample in step.samples} == {2} and len(step.samples) == ROLLOUTS
    assert step.groups == [0] * 4 + [1] * 4 + [2] * 4
    limited, _ = run(
        *change[:1], "method.dynamic_sampling=1", questions=asked, said=mixed, more=lambda: asked
    )
    assert len(limited.base) == 2 * ROLLOUTS and limited.samples == []


def test_probes_of_later_draws_belong_to_their_own_questions():
    easy, hard = QUESTIONS
    step, _ = run("method.dynamic_sampling=1", questions=[easy], more=lambda: [hard])
    assert [p.parent for p in step.probes] == [4, 5, 6, 7] and step.groups[8:] == [1] * 4
    assert all(p.question.id == step.base[p.parent].question.id == "hard" for p in step.probes)
    assert {sample.group for sample in step.samples} == {1}


def test_dynamic_sampling_does_not_count_probes_that_the_filter_drops():
    hard = QUESTIONS[1]
    asked = []

    def more():
        asked.append(hard)
        return [hard]

    change = ("method.dynamic_sampling=3", "method.filter=cue-logp", "method.keep_floor=0.0")
    run(*change, "method.keep_ratio=0.0", questions=[hard], more=more)
    assert len(asked) == 3
    step, _ = run(*change, "method.keep_ratio=1.0", questions=[hard], more=more)
    assert len(asked) == 3 and len(step.samples) == 2 * ROLLOUTS


def test_the_learner_s_numerics_replace_the_sampler_s_and_weigh_what_it_drew():
    learner = Learner(script)
    step, _ = run("method.mismatch_cap=2.0", "method.realignment=none", learner=learner)
    origin = torch.tensor([row.origins[: step.rows[8].cut + 1] for row in step.rows[8:]])
    n = origin.shape[1]
    assert int(origin[0, -1]) == Origin.CUE
    assert step.streams.behaviour_logp[8, :n].unique().tolist() == [-1.5]
    assert step.streams.weight[8, : n - 1].tolist() == pytest.approx([math.exp(-0.5)] * (n - 1))
    assert float(step.streams.weight[8, n - 1]) == 1.0


def test_the_tail_of_an_internalized_row_is_held_against_its_own_density():
    class Doubtful(ScriptedPolicy):
        def score(self, rows, temperature):
            return [logp - 3.0 for logp in super().score(rows, temperature)]

    config = parse_config(
        {},
        [
            f"method.rollouts={ROLLOUTS}",
            "method.probe_probability=1.0",
            "method.filter=none",
            "method.allow_large_alpha=true",
            "agent.template=terse",
            "method.realignment=internalize",
        ],
    )
    step = collect(
        QUESTIONS, Doubtful(script), FakeRetriever({"hard": [document("Oslo")]}), TRIE, config, 1.0, 5
    )
    row = step.rows[8]
    own = [v for v, o in zip(row.policy_logp, row.origins, strict=True) if o == Origin.POLICY]
    assert set(row.policy_logp[: row.cut]) == {-1.0} and own[-1] == -4.0


def test_probes_are_drawn_from_a_seed_of_their_own():
    _, policy = run()
    (session,) = policy.sessions
    assert session.seeds == [5, 6]

"""The step with a scripted policy: who is probed, what is kept, what is trained."""

import math

import pytest
import torch

from rexrag.agent.dead_end_judge import JudgeContext, blinded
from rexrag.agent.scoring import Scoring
from rexrag.config.files import parse_config
from rexrag.errors import AlphaError, PluginError
from rexrag.method import CueTrie
from rexrag.plugins import give
from rexrag.training.components import dead_end_judge
from rexrag.training.metrics import describe
from rexrag.training.rollout_log import trace_rows
from rexrag.training.step import StepContext, collect
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


PROBING = {
    "probe_probability": "1.0",
    "probe_target": "0.0",
    "probe_groups": "all",
    "filter": "none",
    "keep_ratio": "1.0",
    "keep_per_group": "0",
}


def settings(algorithm, *overrides):
    table = {"rollouts": str(ROLLOUTS)}
    if algorithm.startswith("rex-rag"):
        table |= PROBING
    if algorithm == "rex-rag":
        table["allow_large_alpha"] = "true"
    named = [f"algorithm.name={algorithm}", *(f"algorithm.{key}={value}" for key, value in table.items())]
    return parse_config({}, [*named, "agent.template=terse", *overrides])


def run(
    *overrides,
    algorithm="rex-rag",
    questions=QUESTIONS,
    seed=5,
    said=script,
    more=None,
    policy=None,
    **context,
):
    """The batch of a step of a scripted policy, and the policy. context: of `StepContext`."""
    config = settings(algorithm, *overrides)
    policy = policy or ScriptedPolicy(said)
    retriever = FakeRetriever({"hard": [document("Oslo", "the answer")]})
    trie = None if config.agent.cues == "none" else TRIE
    return collect(questions, StepContext(policy, retriever, trie, **context), config, seed, more), policy


def parents(batch):
    """Which base rollouts were probed."""
    return [[r is probe.parent for r in batch.rollouts].index(True) for probe in batch.probes]


def advantages(batch):
    return [sample.advantage for sample in batch.samples]


def test_dead_ends_are_probed_and_right_answers_are_not():
    batch, _ = run()
    assert len(batch.rollouts) == 8 and len(batch.probes) == ROLLOUTS
    assert {probe.parent.question.id for probe in batch.probes} == {"hard"}
    assert parents(batch) == [4, 5, 6, 7]
    assert all(probe.rollout.correct for probe in batch.probes)
    assert not any(rollout.correct for rollout in batch.rollouts[4:])


def test_a_probe_is_its_parent_s_prefix_then_a_cue_then_the_policy():
    batch, _ = run()
    for probe in batch.probes:
        parent, rollout = probe.parent, probe.rollout
        assert rollout.tokens[: probe.cut] == parent.tokens[: probe.cut]
        assert rollout.logps[: probe.cut] == parent.logps[: probe.cut]
        assert CODEC.decode(parent.tokens[: probe.cut]) == "<think>a guess</think>"
        cue = rollout.tokens[probe.cut : probe.cut + probe.cue_length]
        assert CODEC.decode(cue) == CUES[probe.cue]
        assert set(rollout.origins[probe.cut : probe.cut + probe.cue_length]) == {int(Origin.CUE)}
        assert rollout.origins[probe.cut + probe.cue_length] == Origin.POLICY


def test_probes_join_their_parent_s_group_and_move_its_advantage():
    batch, _ = run()
    assert [len(group.rollouts) for group in batch.groups] == [4, 4]
    assert [len(group.kept) for group in batch.groups] == [0, 4]
    assert advantages(batch)[:4] == [0.0] * 4
    assert all(a < 0 for a in advantages(batch)[4:8]) and all(a > 0 for a in advantages(batch)[8:])
    alone, _ = run(algorithm="grpo")
    assert alone.probes == [] and advantages(alone) == [0.0] * 8


@pytest.mark.parametrize("algorithm", ["rex-rag", "rex-rag-distill"])
def test_a_row_names_the_rollout_that_it_was_made_of(algorithm):
    batch, _ = run("algorithm.filter=cue-logp", "algorithm.keep_ratio=0.25", algorithm=algorithm)
    kept = [probe.rollout for probe in batch.probes if probe.kept]
    assert len(kept) == 2
    for sample, rollout in zip(batch.samples, [*batch.rollouts, *kept], strict=True):
        assert sample.source is rollout and sample.prompt == rollout.prompt


def test_without_probes_the_samples_are_plain_grpo_s():
    plain, _ = run(algorithm="grpo")
    for algorithm, *change in (
        ("dapo", "algorithm.dynamic_sampling=0"),
        ("rex-rag", "algorithm.probe_probability=0.0"),
        ("rex-rag", "algorithm.probe_probability=0.0", "algorithm.correction=none"),
        ("rex-rag-distill", "algorithm.probe_probability=0.0"),
    ):
        other, _ = run(*change, algorithm=algorithm)
        assert other.samples == plain.samples, algorithm


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 2), (0.13, 1), (0.0, 0)])
def test_the_filter_keeps_the_floor_of_its_share(ratio, kept):
    batch, _ = run("algorithm.filter=cue-logp", f"algorithm.keep_ratio={ratio}")
    assert sum(probe.kept for probe in batch.probes) == kept and len(batch.samples) == 8 + kept


def test_the_right_filter_keeps_right_probes_alone_and_few_of_a_group():
    def half(question, turn, attempt):
        wrong_probe = question.id == "hard" and attempt >= ROLLOUTS and attempt % 2 == 0
        return "</think><answer>Rome</answer>" if wrong_probe else script(question, turn, attempt)

    batch, _ = run("algorithm.filter=right", said=half)
    assert [probe.rollout.em for probe in batch.probes].count(0.0) == 2
    assert [probe.rollout.em for probe in batch.probes if probe.kept] == [1.0, 1.0]
    one, _ = run("algorithm.filter=right", "algorithm.keep_per_group=1", said=half)
    assert [probe.rollout.em for probe in one.probes if probe.kept] == [1.0]


def test_an_unclipped_suffix_is_that_of_weight_one_without_the_clip():
    one, _ = run("algorithm.suffix_weight=clipped", algorithm="rex-rag-distill")
    free, _ = run("algorithm.suffix_weight=unclipped", algorithm="rex-rag-distill")
    assert [s.behaviour_logp for s in free.samples] == [s.behaviour_logp for s in one.samples]
    for sample, plain in zip(free.samples, one.samples, strict=True):
        assert plain.truncated == ()
        assert list(sample.truncated) == [part == Segment.SUFFIX for part in sample.segment]
    assert any(any(sample.truncated) for sample in free.samples)


def test_distilled_rows_hold_no_cue_and_their_scoring_is_counted():
    batch, _ = run(algorithm="rex-rag-distill")
    for sample in batch.samples[8:]:
        text = CODEC.decode(sample.tokens)
        assert text.startswith("<think>a guess</think><search>hard</search>") and "wait" not in text
        assert Segment.CUE not in sample.segment
    paper, _ = run()
    scored = sum(len(sample.prompt) + len(sample.tokens) for sample in batch.samples[8:])
    assert batch.statistics.scored_tokens == scored > 0 and paper.statistics.scored_tokens == 0
    assert batch.statistics.prefilled_tokens - paper.statistics.prefilled_tokens == scored


def test_only_all_wrong_groups_can_be_asked_for():
    def mixed(question, turn, attempt):
        if question.id == "easy" and attempt == 0:
            return "<answer>no</answer>"
        return script(question, turn, attempt)

    everywhere, _ = run(said=mixed)
    hopeless, _ = run("algorithm.probe_groups=all-wrong", said=mixed)
    assert parents(everywhere) == [0, 4, 5, 6, 7]
    assert parents(hopeless) == [4, 5, 6, 7]


def test_probing_without_a_cue_goes_on_from_the_cut():
    batch, _ = run("agent.cues=none")
    assert len(batch.probes) == ROLLOUTS
    assert all(probe.cue is None and probe.cue_length == 0 for probe in batch.probes)
    assert all(int(Origin.CUE) not in probe.rollout.origins for probe in batch.probes)


def test_the_guard_stops_a_run_before_it_trains():
    with pytest.raises(AlphaError, match="keep_ratio"):
        run("algorithm.allow_large_alpha=false")


def test_the_same_seed_is_the_same_step_and_sessions_are_closed():
    half = "algorithm.probe_probability=0.5"
    (a, policy), (b, _) = run(half), run(half)
    assert a.samples == b.samples and [p.cue for p in a.probes] == [p.cue for p in b.probes]
    assert all(session.closed for session in policy.sessions)


def test_figures_add_up():
    batch, _ = run()
    figures = describe(batch)
    assert figures["em/train"] == 0.5 and figures["dead_ends/rate"] == 0.5
    assert figures["groups/all_wrong_before"] == 0.5 and figures["groups/all_wrong_after"] == 0.0
    assert figures["probes/drawn"] == figures["probes/right"] == figures["probes/kept_right"] == 4.0
    assert figures["tokens/cue"] == sum(probe.cue_length for probe in batch.probes)
    fresh = sum(len(probe.rollout.tokens) - probe.cut for probe in batch.probes)
    written = sum(len(rollout.tokens) for rollout in batch.rollouts) + fresh
    assert sum(figures[f"tokens/{o.name.lower()}"] for o in Origin) == written
    assert figures["tokens/policy"] == batch.statistics.generated_tokens
    assert figures["rows"] == len(batch.samples) == 12.0


def test_signal_is_counted_in_rewards_not_in_exact_matches():
    """Nobody is right, but half of the answers share a word with the gold one: F1 trains on that."""

    def near(question, turn, attempt):
        return f"<answer>{'Oslo fjord' if attempt % 2 else 'Rome'}</answer>"

    asked = QUESTIONS[1:]
    exact, _ = run(algorithm="grpo", questions=asked, said=near)
    f1, _ = run("agent.reward=f1", algorithm="grpo", questions=asked, said=near)
    assert describe(exact)["groups/no_signal"] == 1.0 and describe(f1)["groups/no_signal"] == 0.0
    assert any(advantages(f1))


def test_traces_show_probes_beside_their_parents_first():
    batch, _ = run()
    rows = trace_rows(batch, 3, CODEC, limit=4)
    assert [(r["kind"], r["index"]) for r in rows] == [("base", 4), ("probe", 0), ("base", 5), ("probe", 1)]
    probe, sample = rows[1], batch.samples[8]
    assert [s["origin"] for s in probe["segments"]] == ["policy", "cue", "policy", "evidence", "policy"]
    assert "".join(s["text"] for s in probe["segments"]) == CODEC.decode(batch.probes[0].rollout.tokens)
    assert probe["parent"] == 4 and probe["kept"] and probe["advantage"] > 0
    assert probe["correct"] and not rows[0]["correct"] and probe["cue_text"] in CUES
    ratio = torch.exp(torch.tensor(sample.policy_logp) - torch.tensor(sample.behaviour_logp))
    weights = ratio[torch.tensor(sample.mask)]
    assert probe["weight"] == pytest.approx(float(weights.mean()), rel=1e-5)
    assert set(sample.segment) == {int(s) for s in (Segment.PREFIX, Segment.CUE, Segment.SUFFIX)}


@pytest.mark.parametrize("weight", ["clipped", "truncated-is", "unclipped"])
def test_traces_of_distilled_probes_have_weights_but_for_the_cue(weight):
    batch, _ = run(f"algorithm.suffix_weight={weight}", algorithm="rex-rag-distill")
    probe, sample = trace_rows(batch, 3, CODEC, limit=4)[1], batch.samples[8]
    assert sample.tokens != batch.probes[0].rollout.tokens and probe["weight"] is not None
    weighed = [(s["origin"], s["weight"] is not None) for s in probe["segments"]]
    assert weighed == [
        ("policy", True),
        ("cue", False),
        ("policy", True),
        ("evidence", False),
        ("policy", True),
    ]
    ratio = torch.exp(torch.tensor(sample.policy_logp) - torch.tensor(sample.behaviour_logp))
    last = ratio[-len(CODEC.encode(probe["segments"][-1]["text"])) :]
    assert probe["segments"][-1]["weight"] == pytest.approx(float(last.mean()), abs=1e-4)


def test_a_cue_that_no_longer_fits_is_no_probe():
    """Its score would be 0, above every real one: the filter must never see it."""
    prompt, said = len("Question: Hard?"), len("<think>a guess</think><answer>Rome</answer>")
    batch, _ = run(f"agent.total_tokens={prompt + said}", questions=QUESTIONS[1:])
    assert batch.rollouts[0].answer == "Rome"
    assert all(probe.cue_length > 0 for probe in batch.probes) and len(batch.probes) == ROLLOUTS

    def short(question, turn, attempt):
        return "<answer>Rome</answer>"

    tight = prompt + len("<answer>Rome</answer>")
    batch, _ = run(f"agent.total_tokens={tight}", questions=QUESTIONS[1:], said=short)
    assert len(batch.probes) == ROLLOUTS
    long_cue = CueTrie([CODEC.encode("<think> " + "no " * 20)])
    context = StepContext(ScriptedPolicy(short), FakeRetriever(), long_cue)
    config = settings("rex-rag", f"agent.total_tokens={prompt + 30}")
    assert collect(QUESTIONS[1:], context, config, 0).probes == []


def test_dynamic_sampling_asks_on_until_enough_groups_have_signal():
    """Hard questions alone have no signal; of the next batches one is mixed."""

    def mixed(question, turn, attempt):
        right = question.id.startswith("mixed") and attempt % 2
        return "<answer>yes</answer>" if right else "<answer>no</answer>"

    batches = iter(
        [[Question(f"{kind}-{i}", kind, ("yes",))] for i, kind in enumerate(["hard", "mixed", "mixed"])]
    )
    asked = [Question("hard", "hard", ("yes",))]
    batch, _ = run(
        "algorithm.dynamic_sampling=4",
        algorithm="dapo",
        questions=asked,
        said=mixed,
        more=lambda: next(batches),
    )
    assert [group.question.id for group in batch.groups] == ["hard", "hard-0", "mixed-1"]
    assert [sample.source for sample in batch.samples] == list(batch.groups[2].rollouts)
    limited, _ = run(
        "algorithm.dynamic_sampling=1", algorithm="dapo", questions=asked, said=mixed, more=lambda: asked
    )
    assert len(limited.rollouts) == 2 * ROLLOUTS and limited.samples == []


def test_dynamic_sampling_trains_no_more_groups_than_were_asked_for():
    def mixed(question, turn, attempt):
        return "<answer>yes</answer>" if attempt % 2 and question.id != "none" else "<answer>no</answer>"

    def question(name):
        return Question(name, name, ("yes",))

    asked, next_ones = [question("a"), question("none")], [question("b"), question("c")]
    batch, _ = run(algorithm="dapo", questions=asked, said=mixed, more=lambda: next_ones)
    assert [group.has_signal for group in batch.groups] == [True, False, True, True]
    assert [sample.source.question.id for sample in batch.samples] == ["a"] * 4 + ["b"] * 4
    assert len(trace_rows(batch, 1, CODEC, limit=99)) == 16, "what is not trained is still written down"


def test_probes_of_later_draws_belong_to_their_own_questions():
    easy, hard = QUESTIONS
    batch, _ = run("algorithm.dynamic_sampling=1", questions=[easy], more=lambda: [hard])
    assert parents(batch) == [4, 5, 6, 7] and len(batch.groups[1].probes) == 4
    assert all(p.rollout.question.id == p.parent.question.id == "hard" for p in batch.probes)
    assert {sample.source.question.id for sample in batch.samples} == {"hard"}
    assert [sample.source for sample in batch.samples] == list(batch.groups[1].trained)


def test_dynamic_sampling_does_not_count_probes_that_the_filter_drops():
    hard = QUESTIONS[1]
    asked = []

    def more():
        asked.append(hard)
        return [hard]

    change = ("algorithm.dynamic_sampling=3", "algorithm.filter=cue-logp")
    run(*change, "algorithm.keep_ratio=0.0", questions=[hard], more=more)
    assert len(asked) == 3
    batch, _ = run(*change, "algorithm.keep_ratio=1.0", questions=[hard], more=more)
    assert len(asked) == 3 and len(batch.samples) == 2 * ROLLOUTS


def test_the_learner_s_numerics_replace_the_sampler_s_and_weigh_what_it_drew():
    batch, _ = run("algorithm.mismatch_cap=2.0", "algorithm.correction=none", learner_policy=Learner(script))
    probe, sample = batch.probes[0], batch.samples[8]
    assert set(sample.behaviour_logp[: probe.cut + 1]) == {-1.5}
    assert sample.weight[: probe.cut] == pytest.approx([math.exp(-0.5)] * probe.cut)
    assert sample.segment[probe.cut] == Segment.CUE and sample.weight[probe.cut] == 1.0


def test_the_suffix_of_a_distilled_row_is_held_against_its_own_density():
    class Doubtful(ScriptedPolicy):
        def score(self, rows, temperature):
            return [logp - 3.0 for logp in super().score(rows, temperature)]

    batch, _ = run("algorithm.suffix_weight=clipped", algorithm="rex-rag-distill", policy=Doubtful(script))
    sample = batch.samples[8]
    parts = dict.fromkeys(zip(sample.segment, sample.mask, sample.policy_logp, strict=True))
    assert set(parts) == {
        (Segment.PREFIX, True, -1.0),
        (Segment.SUFFIX, True, -4.0),
        (Segment.SUFFIX, False, 0.0),
    }


def test_probes_are_drawn_from_a_seed_of_their_own():
    _, policy = run()
    (session,) = policy.sessions
    assert session.seeds == [5, 6]


# -- plug-ins ----------------------------------------------------------------------------------------------

JUDGED = ("algorithm.dead_ends=judge", "algorithm.dead_end_judge=tests.training.test_step:suspects_easy")


def suspects_easy(rollouts, context):
    """A judge that is wrong about everything: easy questions are dead ends, hard ones are not."""
    assert not any(hasattr(rollout, name) for rollout in rollouts for name in ("em", "reward", "correct"))
    return [0.9 if rollout.question_id == "easy" else 0.5 for rollout in rollouts]


def judged(judge):
    return blinded(judge, JudgeContext(), getattr(judge, "__name__", "judge"))


def test_a_judge_decides_who_is_probed_without_the_gold_answers():
    verdicts = dead_end_judge(settings("rex-rag", *JUDGED), None)
    batch, _ = run(*JUDGED, judge=verdicts)
    assert parents(batch) == [0, 1, 2, 3], "just one half is not more than one half"
    by_answers, _ = run(judge=None)
    assert parents(by_answers) == [4, 5, 6, 7]


def test_only_groups_that_the_judge_gives_up_are_probed():
    def but_for_one(rollouts, context):
        return [0.0 if i == 6 else 1.0 for i, _ in enumerate(rollouts)]

    everywhere, _ = run(*JUDGED, judge=judged(but_for_one))
    hopeless, _ = run(*JUDGED, "algorithm.probe_groups=all-wrong", judge=judged(but_for_one))
    assert parents(everywhere) == [0, 1, 2, 3, 4, 5, 7]
    assert parents(hopeless) == [0, 1, 2, 3], "one of the hard ones was not given up"


def test_a_judge_can_ask_the_policy_for_scores():
    asked = []

    def scoring(rollouts, context):
        asked.append(context.score([(r.prompt, r.tokens) for r in rollouts], 1.0))
        return [0.0] * len(rollouts)

    config = settings("rex-rag", *JUDGED, f"algorithm.dead_end_judge={give(scoring)}")
    batch, _ = run(*JUDGED, judge=dead_end_judge(config, ScriptedPolicy(script)))
    assert [len(logps) for logps in asked[0]] == [len(r.tokens) for r in batch.rollouts]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [1.0] * (n - 1), "returned 7 values for 8 rollouts"),
        (lambda n: [math.nan] * n, r"returned nan, expected a probability in \[0, 1\]"),
        (lambda n: [1.5] * n, r"returned 1.5, expected a probability in \[0, 1\]"),
        (lambda n: None, "returned None, expected probabilities"),
    ],
)
def test_what_is_no_verdict_is_one_line(returned, message):
    def broken(rollouts, context):
        return returned(len(rollouts))

    with pytest.raises(PluginError, match=f"dead-end judge broken: {message}") as caught:
        run(*JUDGED, judge=judged(broken))
    assert "\n" not in str(caught.value)


def by_length(rollout):
    """A reward that nobody ships: shorter is better."""
    return -float(len(rollout.tokens))


def any_city(answer, question):
    """A judge that takes every answer but one."""
    return answer != "yes"


@pytest.mark.parametrize("named", [True, False])
def test_a_reward_and_a_judge_of_answers_of_ones_own_reach_rollouts_and_figures(named):
    here = "tests.training.test_step"
    overrides = [f"agent.reward={here}:by_length", f"agent.answer_judge={here}:any_city"] if named else []
    config = settings("rex-rag", *overrides)
    scoring = Scoring.of(config.agent) if named else Scoring(by_length, any_city)
    batch, _ = run(*overrides, scoring=scoring)
    assert parents(batch) == [0, 1, 2, 3], "those that the judge calls wrong"
    everyone = [*batch.rollouts, *(probe.rollout for probe in batch.probes)]
    assert [rollout.reward for rollout in everyone] == [-len(rollout.tokens) for rollout in everyone]
    assert [rollout.correct for rollout in batch.rollouts] == [False] * 4 + [True] * 4
    assert [rollout.em for rollout in batch.rollouts] == [1.0] * 4 + [0.0] * 4
    figures = describe(batch)
    assert figures["em/train"] == figures["dead_ends/rate"] == figures["groups/all_wrong_before"] == 0.5
    assert figures["reward/mean"] == pytest.approx(sum(r.reward for r in batch.rollouts) / 8)
    assert figures["groups/no_signal"] == 0.5, "a probe is longer than the rollout it began as"


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "much"])
def test_a_reward_that_is_no_number_is_one_line(value):
    def odd(rollout):
        return value

    with pytest.raises(PluginError, match=f"reward odd: returned {value!r}, expected a finite number"):
        run(scoring=Scoring(odd, names=("odd", "em")))

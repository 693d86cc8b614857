"""The state machine of a rollout: tokens as sampled, turns, budgets, stop reasons, probes."""

from dataclasses import replace
from itertools import chain, repeat

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rexrag.agent.episode import Episode, State
from rexrag.agent.protocols.tags import NOTICE, extract_answer, parse_action
from rexrag.agent.scoring import Scoring
from rexrag.config.schema import AgentConfig
from rexrag.errors import ConfigError, DataError
from rexrag.method.dead_ends import cut_position
from rexrag.types import Document, Origin, Question, StopReason
from tests.support.codecs import CODECS, EOS, TAGS
from tests.support.fakes import CharCodec, FakeRetriever, ScriptedPolicy, document

QUESTION = Question("7", "who is the boss", ("al",))
CONFIG = AgentConfig(template="terse", search_turns=2, turn_tokens=80, evidence_tokens=60, total_tokens=600)
PARIS = document("Paris", "Capital of France.")
POLICY, CUE, EVIDENCE, NOTICED = (int(origin) for origin in Origin)


def drive(episode, stream, documents=(PARIS,)):
    """Run an episode on a stream of tokens, which must not end; returns what was sampled."""
    fed = []
    while episode.state is not State.DONE:
        if episode.state is State.SAMPLE:
            fed.append(next(stream))
            episode.sampled(fed[-1], -0.25)
        elif episode.state is State.SEARCH:
            episode.found(documents)
        else:
            episode.take_forced([-0.5] * len(episode.forced))
    return fed


def play(*turns, config=CONFIG, codec=CODECS["char"], documents=(PARIS,), question=QUESTION):
    """A finished episode in which the policy says these turns; a turn without an action ends with eos."""
    episode = Episode(question, codec, config)
    tokens = []
    for turn in turns:
        tokens += codec.encode(turn) + ([] if parse_action(turn) else [min(codec.eos_ids)])
    drive(episode, chain(tokens, repeat(min(codec.eos_ids))), documents)
    return episode


def segments(episode):
    """Consecutive tokens of one origin, as (origin, text)."""
    found = []
    for token, origin in zip(episode.tokens, episode.origins, strict=True):
        if not found or found[-1][0] != origin:
            found.append((origin, []))
        found[-1][1].append(token)
    return [(origin, episode.codec.decode(tokens)) for origin, tokens in found]


# -- one rollout -------------------------------------------------------------------------------------------


def test_search_then_answer():
    episode = play("<think>hm</think><search> paris </search>", "so <answer> al </answer>")
    rollout = episode.rollout()
    assert segments(episode) == [
        (POLICY, "<think>hm</think><search> paris </search>"),
        (EVIDENCE, '\n\n<information>Doc 1(Title: "Paris") Capital</information>\n\n'),
        (POLICY, "so <answer> al </answer>"),
    ]
    search, answer = rollout.turns
    assert (search.action, search.argument, search.documents) == ("search", "paris", ("Paris",))
    assert (search.start, search.action_start, search.thought_end) == (0, 17, 9)
    assert (answer.action, answer.argument, answer.thought_end) == ("answer", "al", None)
    assert (rollout.stop, rollout.answer, rollout.reward, rollout.em) == (StopReason.ANSWER, "al", 1.0, 1.0)
    assert rollout.answer_start == rollout.text.index("<answer>")
    assert not rollout.forced_last_turn
    assert rollout.correct
    assert rollout.prompt == tuple(CharCodec().encode("Question: who is the boss?"))


def test_log_probs_belong_to_sampled_tokens_only():
    rollout = play("<search>x</search>", "<answer>al</answer>").rollout()
    assert set(zip(rollout.origins, rollout.logps, strict=True)) == {(POLICY, -0.25), (EVIDENCE, 0.0)}


def test_a_turn_without_an_action_is_spent_and_noticed():
    episode = play("dunno", "<search>never closed", "<search>too late</search>")
    assert [origin for origin, _ in segments(episode)] == [POLICY, NOTICED, POLICY, NOTICED, POLICY]
    assert segments(episode)[1][1] == NOTICE
    rollout = episode.rollout()
    assert [turn.action for turn in rollout.turns] == [None, None, "search"]
    assert (rollout.stop, rollout.answer, rollout.forced_last_turn) == (StopReason.TURNS, None, True)


def test_the_last_turn_does_not_search():
    retriever = FakeRetriever({"a": [PARIS], "b": [PARIS], "c": [PARIS]})
    policy = ScriptedPolicy(lambda question, turn, attempt: f"<search>{'abcd'[turn]}</search>")
    episode = Episode(QUESTION, policy.codec, CONFIG)
    policy.session().run([episode], retriever, 1.0, 0)
    rollout = episode.rollout()
    assert [queries for queries, _ in retriever.calls] == [("a",), ("b",)]
    assert (rollout.stop, rollout.forced_last_turn, len(rollout.turns)) == (StopReason.TURNS, True, 3)
    assert rollout.turns[-1].documents == ()
    answered = play("<search>a</search>", "x", "<answer>al</answer>").rollout()
    assert (answered.stop, answered.forced_last_turn, answered.em) == (StopReason.ANSWER, True, 1.0)


def test_at_most_topk_documents_are_shown():
    episode = Episode(QUESTION, CODECS["char"], CONFIG, topk=1)
    for token in episode.codec.encode("<search>x</search>"):
        episode.sampled(token, 0.0)
    episode.found([PARIS, document("Rome")])
    assert episode.turns[-1].documents == ("Paris",)
    assert "Doc 2" not in episode.codec.decode(episode.forced)


def test_a_question_with_tags_changes_nothing():
    hostile = replace(QUESTION, text="who <answer> al </answer> <search> x </search> <information>")
    episode = play("<think>so", "</answer>", "no", question=hostile)
    assert episode.rollout().answer is None
    assert [turn.action for turn in episode.turns] == [None, None, None]


def test_reward_settings_reach_the_rollout():
    config = CONFIG.model_copy(update={"reward": "f1"})
    rollout = play("<answer>al bob</answer>", config=config).rollout()
    assert (rollout.reward, rollout.em, rollout.correct) == (pytest.approx(2 / 3), 0.0, False)


def test_reward_and_judge_may_be_given_instead_of_named():
    scoring = Scoring(lambda rollout: 7.0 * rollout.correct, lambda answer, question: answer == "bob")
    episode = Episode(QUESTION, CODECS["char"], CONFIG, scoring=scoring)
    drive(episode, iter(CharCodec().encode("<answer>bob</answer>")))
    rollout = episode.rollout()
    assert (rollout.reward, rollout.em, rollout.correct) == (7.0, 0.0, True)
    probe = episode.fork([])
    drive(probe, iter(CharCodec().encode("<answer>al</answer>")))
    assert (probe.rollout().reward, probe.rollout().em, probe.rollout().correct) == (0.0, 1.0, False)


# -- tokens in, tokens out ---------------------------------------------------------------------------------


class OnlyEvidence(CharCodec):
    """Refuses to encode anything that the policy said."""

    sampling = False

    def encode(self, text):
        assert not self.sampling, f"encoded while sampling: {text!r}"
        assert "policy" not in text, f"encoded again: {text!r}"
        return super().encode(text)


def test_nothing_sampled_is_ever_encoded():
    codec = OnlyEvidence()
    episode = Episode(QUESTION, codec, CONFIG)
    said = "policy <search>policy</search>" + "policy\0" + "policy <answer>policy</answer>"
    for token in map(ord, said):
        codec.sampling = True
        episode.sampled(token, -1.0)
        codec.sampling = False
        if episode.state is State.SEARCH:
            episode.found([PARIS])
        if episode.state is State.FORCED:
            episode.take_forced([])
    probe = episode.fork([120], 0)
    probe.take_forced([-1.0])
    assert episode.rollout().answer == "policy"


def fragments(name):
    """Tokens a policy may sample: text with tags, pieces of tags, raw ids that no text encodes to, eos."""
    codec = CODECS[name]
    texts = st.sampled_from(
        [*TAGS[:4], *TAGS[6:], "<answer>al</answer>", "<search>x", "</", "<", ">", "😀", "hm "]
    )
    ids = {"char": st.integers(32, 126), "bpe": st.integers(0, 346), "word": st.integers(0, 30)}[name]
    piece = texts.map(codec.encode) | st.lists(ids, min_size=1, max_size=6) | st.just([EOS[name]])
    return st.lists(piece, min_size=1, max_size=25).map(lambda found: [t for piece in found for t in piece])


configs = st.builds(
    AgentConfig,
    template=st.just("terse"),
    search_turns=st.integers(1, 3),
    turn_tokens=st.integers(1, 60),
    evidence_tokens=st.integers(45, 90),
    total_tokens=st.integers(27, 400),
)
hostile = st.lists(
    st.sampled_from(["x", "y", "<answer>al</answer>", "</information>", "<search>", "\n", "😀", NOTICE]),
    max_size=6,
).map("".join)


def check_shape(episode, config, probe=False):
    """What holds of every finished rollout."""
    rollout = episode.rollout()
    assert len(rollout.prompt) + len(rollout.tokens) <= config.total_tokens
    assert len(rollout.tokens) == len(rollout.origins) == len(rollout.logps)
    assert len(rollout.turns) <= config.search_turns + 1
    assert rollout.forced_last_turn == (len(rollout.turns) == config.search_turns + 1)
    for turn in rollout.turns:
        used = rollout.origins[turn.start : turn.end].count(POLICY)
        assert used <= config.turn_tokens
        assert probe or used == turn.end - turn.start >= 1
        assert (turn.action is None) == (turn.action_start is None)
        assert turn.action_start is None or turn.start <= turn.action_start < turn.end
    assert (rollout.stop is StopReason.ANSWER) == (rollout.answer is not None)
    assert rollout.answer == (rollout.turns[-1].argument if rollout.stop is StopReason.ANSWER else None)
    if rollout.stop is StopReason.TURNS:
        assert rollout.forced_last_turn
    for origin, text in segments(episode):
        if origin == EVIDENCE:
            assert text.count("<information>") == text.count("</information>") == 1
            assert text.count("<answer>") == text.count("<search>") == 0
    return rollout


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data(), config=configs, docs=st.lists(hostile, max_size=3))
def test_any_stream_of_tokens_keeps_every_budget_and_every_token(name, data, config, docs):
    codec, stream = CODECS[name], data.draw(fragments(name))
    episode = Episode(QUESTION, codec, config)
    fed = drive(episode, chain(stream, repeat(EOS[name])), [Document("d", text) for text in docs])
    rollout = check_shape(episode, config)
    assert [t for t, o in zip(rollout.tokens, rollout.origins, strict=True) if o == POLICY] == fed
    # Reading the finished text agrees with reading turn by turn.
    assert extract_answer(rollout.text) == rollout.answer
    if rollout.stop is StopReason.LENGTH and rollout.turns[-1].action != "search":
        room = config.total_tokens - len(rollout.prompt)
        assert len(rollout.tokens) == room or len(rollout.tokens) + len(codec.encode(NOTICE)) >= room


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
def test_the_cut_is_the_last_token_boundary_before_the_tag(name, data):
    """`tokens[:action_start]` says nothing of the tag, and one more token would."""
    codec, stream = CODECS[name], data.draw(fragments(name))
    config = CONFIG.model_copy(update={"turn_tokens": 400, "total_tokens": 2000})
    episode = Episode(QUESTION, codec, config)
    drive(episode, chain(stream, codec.encode(" </think> <answer>al</answer>"), repeat(EOS[name])))
    for turn in episode.turns:
        if turn.action is None:
            continue
        said = [codec.decode(episode.tokens[turn.start : end]) for end in range(turn.start, turn.end + 1)]
        action = parse_action(said[-1])
        assert (action.kind, action.argument) == (turn.action, turn.argument)
        before, after = (said[turn.action_start - turn.start + more] for more in (0, 1))
        assert len(before) <= action.start < len(after)
        assert said[-1].startswith(before.rstrip("\ufffd"))  # a character may be cut in the middle
        thought = said[-1].rfind("</think>", 0, action.start)
        assert (turn.thought_end is None) == (thought < 0)
        if thought >= 0:
            before, after = (said[turn.thought_end - turn.start + more] for more in (0, 1))
            assert len(before) <= thought < len(after)


def test_a_token_that_straddles_the_tag_falls_behind_the_cut():
    codec = CODECS["bpe"]
    tokens = codec.encode("hm.</think> <answer> bob.</answer>  ")
    assert any(codec.decode([t]) == " <answ" for t in tokens)  # the tag shares a token with a space
    episode = Episode(QUESTION, codec, CONFIG)
    for token in tokens[:-1]:
        episode.sampled(token, 0.0)
    assert episode.state is State.SAMPLE
    episode.sampled(tokens[-1], 0.0)
    turn = episode.rollout().turns[0]
    assert codec.decode(tokens[: turn.action_start]) == "hm.</think>"
    assert codec.decode(tokens[: turn.thought_end]) == "hm."[: len(codec.decode(tokens[: turn.thought_end]))]
    assert turn.argument == "bob."
    assert episode.tokens == tokens


# -- ends --------------------------------------------------------------------------------------------------


def test_evidence_that_does_not_fit_ends_the_rollout():
    prompt = len(Episode(QUESTION, CODECS["char"], CONFIG).prompt)
    said = len("<search>x</search>")
    for total in range(prompt + said, prompt + said + 62):
        rollout = play(
            "<search>x</search>", config=CONFIG.model_copy(update={"total_tokens": total})
        ).rollout()
        if total <= prompt + said + 60:  # no token would be left to sample
            assert (rollout.stop, rollout.count(Origin.EVIDENCE)) == (StopReason.LENGTH, 0)
            assert rollout.turns[0].action == "search"
        else:
            assert rollout.count(Origin.EVIDENCE) == 60


def test_a_notice_that_does_not_fit_ends_the_rollout():
    rollout = play("x", config=CONFIG.model_copy(update={"total_tokens": 60})).rollout()
    assert (rollout.stop, rollout.count(Origin.NOTICE)) == (StopReason.LENGTH, 0)


def test_an_answer_that_fills_the_window_counts():
    prompt = len(Episode(QUESTION, CODECS["char"], CONFIG).prompt)
    answer = "<answer>al</answer>"
    exact = CONFIG.model_copy(update={"total_tokens": prompt + len(answer)})
    assert play(answer, config=exact).rollout().stop is StopReason.ANSWER
    short = CONFIG.model_copy(update={"total_tokens": prompt + len(answer) - 1})
    assert play(answer, config=short).rollout().stop is StopReason.LENGTH


def test_a_prompt_that_does_not_fit_names_its_question():
    with pytest.raises(DataError, match=r"question 'local/train/7'.*26 tokens.*total_tokens = 26"):
        Episode(QUESTION, CODECS["char"], CONFIG.model_copy(update={"total_tokens": 26}))
    with pytest.raises(ConfigError, match="evidence_tokens = 10"):
        Episode(QUESTION, CODECS["char"], CONFIG.model_copy(update={"evidence_tokens": 10}))


def test_calls_out_of_turn_are_refused():
    episode = Episode(QUESTION, CODECS["char"], CONFIG)
    for call in (lambda: episode.take_forced([]), lambda: episode.found([]), episode.rollout):
        with pytest.raises(RuntimeError):
            call()
    with pytest.raises(RuntimeError):
        episode.fork([1], 0)
    done = play("<answer>al</answer>")
    with pytest.raises(RuntimeError):
        done.sampled(65, 0.0)
    probe = done.fork([1, 2], 0)
    with pytest.raises(ValueError, match="2 cue tokens"):
        probe.take_forced([0.0])


# -- probes ------------------------------------------------------------------------------------------------

HINT = CharCodec().encode("<think> hmm ")


def test_a_probe_goes_on_where_the_answer_began():
    parent = play("<search>x</search>", "<think>a</think> so <answer>bob</answer>")
    probe = parent.fork(HINT, 4)
    assert (probe.state, probe.forced, probe.forced_origin) == (State.FORCED, tuple(HINT), Origin.CUE)
    assert probe.parent is parent
    assert probe.cut == parent.rollout().answer_start
    said = "no</think><search>y</search>" + "<answer>al</answer>"
    drive(probe, iter(CharCodec().encode(said)))
    assert [origin for origin, _ in segments(probe)] == [
        POLICY, EVIDENCE, POLICY, CUE, POLICY, EVIDENCE, POLICY
    ]  # fmt: skip
    rollout = probe.rollout()
    base = parent.rollout()
    made = probe.probe(base)
    assert made.rollout == rollout and made.parent is base
    assert (made.cut, made.cue, made.cue_length, made.kept) == (base.answer_start, 4, len(HINT), False)
    assert [turn.action for turn in rollout.turns] == ["search", "search", "answer"]
    assert rollout.turns[1].start == parent.turns[1].start
    assert rollout.turns[1].thought_end is not None
    assert rollout.turns[1].thought_end > probe.cut + len(HINT)
    assert (rollout.em, rollout.forced_last_turn) == (1.0, True)
    assert parent.rollout().answer == "bob"  # the parent is untouched
    cue_logps = rollout.logps[made.cut : made.cut + made.cue_length]
    assert set(cue_logps) == {-0.5}


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data(), config=configs, cue=st.text("<think> hmsoanswer/", max_size=30))
@example(data=None, config=CONFIG, cue="")
def test_probes_share_their_parents_prefix_and_keep_every_budget(name, data, config, cue):
    codec = CODECS[name]
    first, second = (data.draw(fragments(name)) for _ in range(2)) if data else ([], [])
    parent = Episode(QUESTION, codec, config)
    drive(parent, chain(first, codec.encode("<answer>bob</answer>"), repeat(EOS[name])))
    base = parent.rollout()
    ids = codec.encode(cue)
    probes = [parent.fork(ids, 3), parent.fork(ids, 3)]
    cut = probes[0].cut
    assert cut == cut_position(base)
    for probe in probes:
        drive(probe, chain(second, repeat(EOS[name])))
        rollout = check_shape(probe, config, probe=True) if base.answer is not None else probe.rollout()
        assert len(rollout.prompt) + len(rollout.tokens) <= config.total_tokens
        assert rollout.prompt == base.prompt
        assert rollout.tokens[:cut] == base.tokens[:cut]
        assert rollout.origins[:cut] == base.origins[:cut]
        assert rollout.logps[:cut] == base.logps[:cut]
        assert rollout.turns[: len(base.turns) - 1] == base.turns[:-1]
        made = probe.probe(base)
        assert (made.rollout, made.cut) == (rollout, cut)
        assert rollout.origins[cut : cut + made.cue_length] == (CUE,) * made.cue_length
        assert rollout.count(Origin.CUE) == made.cue_length
        assert made.cue_length in (0, len(ids))
        assert (made.cue == 3) == (made.cue_length > 0)
        assert all(turn.action_start is None or turn.action_start >= cut + made.cue_length
                   for turn in rollout.turns[len(base.turns) - 1 :])  # fmt: skip
    assert probes[0].tokens == probes[1].tokens
    assert parent.rollout() == base


def test_the_turn_that_was_cut_keeps_what_it_used():
    parent = play("x" * 50 + "<answer>bob</answer>")
    probe = parent.fork(HINT, 0)
    fed = drive(probe, repeat(ord("y")))
    turn = probe.turns[0]
    assert (turn.start, turn.end) == (0, 80 + len(HINT))
    assert fed[:30] == [ord("y")] * 30
    assert len(probe.turns) == 3  # the cut turn, one more search turn, the forced last turn


def test_an_unanswered_rollout_can_be_probed():
    searched = play("x", "y", "ab<search>z</search>")
    probe = searched.fork(HINT, 0)
    drive(probe, iter(CharCodec().encode("</think><answer>al</answer>")))
    assert probe.tokens[: probe.cut] == searched.tokens[: probe.cut]
    assert (probe.rollout().em, len(probe.turns), probe.rollout().forced_last_turn) == (1.0, 3, True)
    # Its last turn had used all its tokens: the probe gets a turn's worth again.
    silent = Episode(QUESTION, CODECS["char"], CONFIG.model_copy(update={"total_tokens": 2000}))
    drive(silent, repeat(ord("x")))
    assert silent.rollout().stop is StopReason.TURNS
    probe = silent.fork(HINT, 0)
    assert len(drive(probe, repeat(ord("x")))) == CONFIG.turn_tokens


def test_a_cue_that_does_not_fit_is_not_given():
    prompt = len(Episode(QUESTION, CODECS["char"], CONFIG).prompt)
    answer = "<answer>bob</answer>"
    parent = play(answer, config=CONFIG.model_copy(update={"total_tokens": prompt + len(answer)}))
    made = parent.fork([65] * (len(answer)), 2).probe(parent.rollout())
    assert (made.rollout.stop, made.rollout.tokens) == (StopReason.LENGTH, ())
    assert (made.cut, made.cue, made.cue_length) == (0, None, 0)
    probe = parent.fork([65] * (len(answer) - 1), 2)
    assert probe.state is State.FORCED


def test_an_action_opened_before_the_cue_is_not_completed_after_it():
    parent = play("<search> half <answer>bob</answer>")
    probe = parent.fork(HINT, 0)
    drive(probe, chain(CharCodec().encode("</search>"), repeat(0)))
    assert probe.turns[0].action is None


def test_probing_without_a_cue_samples_at_once():
    parent = play("so <answer>bob</answer>")
    probe = parent.fork([])
    assert probe.state is State.SAMPLE
    drive(probe, iter(CharCodec().encode("<answer>al</answer>")))
    made = probe.probe(parent.rollout())
    assert (made.cut, made.cue, made.cue_length, made.rollout.em) == (3, None, 0, 1.0)
    assert made.rollout.text == "so <answer>al</answer>"


def test_a_base_rollout_is_no_probe():
    parent = play("<answer>al</answer>")
    with pytest.raises(RuntimeError, match="no fork"):
        parent.probe(parent.rollout())

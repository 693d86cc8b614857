"""Cells on disk: cached, resumed, failed rows asked again; figures, samples, audits, paired tests."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from rexrag.agent.reward import has_answer
from rexrag.config.schema import AgentConfig, Config, DataConfig, RetrieverConfig
from rexrag.errors import ConfigError, DataError, RetrievalError
from rexrag.evaluation.cells import Choices, plan_evaluation
from rexrag.evaluation.corpus_audit import audit
from rexrag.evaluation.paired_tests import compare, load_evaluation
from rexrag.evaluation.policies import PolicySource
from rexrag.evaluation.published import BUDGET, PUBLISHED, cell_differences, setup_differences
from rexrag.evaluation.records import read_records
from rexrag.evaluation.runner import MOST_FAILURES, Options, run
from rexrag.evaluation.strategies import STRATEGIES
from rexrag.types import Document, Question
from tests.support.fakes import ScriptedPolicy

AGENT = AgentConfig(template="terse", search_turns=2, turn_tokens=100, evidence_tokens=120, total_tokens=3000)
N = 12


@pytest.fixture
def files(tmp_path):
    rows = [{"id": str(i), "question": f"q{i}", "answers": [f"a{i}"], "source": "s"} for i in range(N)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [{"id": str(i), "contents": f'"T{i}"\nq{i} is a{i}'} for i in range(0, N, 2)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    return tmp_path


class Counting:
    """A policy that is right on some questions and counts what it is asked."""

    def __init__(self, right=lambda i: i % 2 == 0, failing=()):
        self.asked, self.loads, self.right, self.failing = [], 0, right, set(failing)

    def load(self):
        self.loads += 1
        policy = ScriptedPolicy(self._say)
        make = policy.session

        def session():
            made = make()
            drive = made._drive

            def guarded(episode, retriever, attempt):
                if episode.question.id in self.failing:
                    return episode.give_up("time-out")
                drive(episode, retriever, attempt)

            made._drive = guarded
            return made

        policy.session = session
        return policy

    def _say(self, question, turn, attempt):
        self.asked.append(question.id)
        if turn == 0:
            return f"<search> {question.text} </search>"
        return f"<answer> {question.answers[0] if self.right(int(question.id)) else 'no'} </answer>"


def plan(files, policy, out="out", digest="p", config=None, **choices):
    data = DataConfig(corpus=str(files / "corpus.jsonl"))
    config = config or Config(agent=AGENT, data=data, retriever=RetrieverConfig(topk=1))
    choices = Choices(**({"data": [str(files / "q.jsonl")]} | choices))
    return plan_evaluation(PolicySource("fake", digest, policy.load), config, choices, files / out)


def test_a_second_run_asks_nothing_and_gives_the_same(files):
    policy = Counting()
    first = run(plan(files, policy), Options())
    assert len(policy.asked) == 2 * N and policy.loads == 1
    assert json.loads((files / "out" / "eval.json").read_text()) == first
    assert run(plan(files, policy), Options()) == first
    assert len(policy.asked) == 2 * N and policy.loads == 1
    run(plan(files, policy), Options(fresh=True))
    assert len(policy.asked) == 4 * N


def test_the_figures(files):
    (cell,) = run(plan(files, Counting()), Options())["cells"]
    assert (
        cell["em"]["value"] == 0.5 and cell["em"]["n"] == N and cell["em"]["low"] < 0.5 < cell["em"]["high"]
    )
    assert (
        cell["searches"] == 1.0 and cell["unanswered"] == 0.0 and cell["invalid"] == 0.0 and cell["se"] == 0.0
    )
    assert cell["in_evidence"]["value"] == 0.5  # the corpus holds every other answer
    assert cell["corpus"] == {"ceiling": 0.5, "answerable": 6, "unanswerable": 6, "unjudged": 0}
    assert cell["seconds"]["p95"] >= cell["seconds"]["p50"] > 0


@pytest.mark.parametrize(
    "changed", [{"digest": "other"}, {"strategies": ["direct"]}, {"temperature": 0.5}, {"votes": 2}]
)
def test_the_key_is_policy_data_and_settings(files, changed):
    base = plan(files, Counting())
    assert plan(files, Counting()).cells[0].key == base.cells[0].key
    assert plan(files, Counting(), **changed).cells[0].key != base.cells[0].key
    rows = (files / "q.jsonl").read_text()
    (files / "q.jsonl").write_text(rows.replace("a3", "b3"))
    assert plan(files, Counting()).cells[0].key != base.cells[0].key
    agent = AGENT.model_copy(update={"turn_tokens": 99})
    other = base.config.model_copy(update={"agent": agent})
    assert plan(files, Counting(), config=other).cells[0].key != base.cells[0].key
    (files / "q.jsonl").write_text(rows)
    rewarded = base.config.model_copy(update={"agent": AGENT.model_copy(update={"reward": "f1"})})
    assert plan(files, Counting(), config=rewarded).cells[0].key == base.cells[0].key


def test_a_killed_run_goes_on_where_it_stood(files):
    whole = run(plan(files, Counting(), "whole"), Options(batch=4))

    class Killed(Exception):
        pass

    class Killer:
        def started(self, total, cached): ...

        def auditing(self): ...

        def answered(self, cell, row):
            self.rows = getattr(self, "rows", 0) + 1
            if self.rows == 6:
                raise Killed

    with pytest.raises(Killed):
        run(plan(files, Counting()), Options(batch=4), Killer())
    folder = next((files / "out" / "cells").iterdir())
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b'{"group": "s/q/9", "quest')  # a line cut in half by the kill
    policy = Counting()
    again = run(plan(files, policy), Options(batch=4))
    assert len(policy.asked) == 2 * (N - 6)  # every row that was finished is kept, also within a batch

    def timeless(result):
        return [{k: v for k, v in cell.items() if k != "seconds"} for cell in result["cells"]]

    assert timeless(again) == timeless(whole)
    assert len((folder / "records.jsonl").read_bytes().splitlines()) == N


def test_a_damaged_record_is_named(files):
    made = plan(files, Counting())
    run(made, Options())
    folder = next((files / "out" / "cells").iterdir())
    lines = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "records.jsonl").write_bytes(b"".join([*lines[:2], b"nonsense\n", *lines[2:]]))
    with pytest.raises(DataError, match=r"records\.jsonl, row 3"):
        run(made, Options())


def test_failed_rows_are_kept_apart_and_asked_again(files):
    policy = Counting(failing={"3", "4"})
    result = run(plan(files, policy), Options())
    (cell,) = result["cells"]
    assert cell["failed"] == 2 and cell["em"]["n"] == N - 2 and cell["asked"] == N
    assert result["failures"]["failed"] == 2 and result["failures"]["share"] == pytest.approx(2 / N)
    assert result["failures"]["reasons"] == {"time-out": 2} and result["failures"]["stopped"] == ""
    policy = Counting()
    (cell,) = run(plan(files, policy), Options())["cells"]
    assert sorted(set(policy.asked)) == ["3", "4"] and cell["failed"] == 0 and cell["em"]["value"] == 0.5


def test_an_endpoint_that_is_gone_is_not_asked_for_every_question(files):
    rows = [{"id": str(i), "question": f"q{i}", "answers": ["a"]} for i in range(MOST_FAILURES + 20)]
    (files / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(plan(files, Counting(failing={row["id"] for row in rows})), Options(batch=8))
    failures = result["failures"]
    assert failures["failed"] == MOST_FAILURES and failures["unasked"] == 20 and failures["share"] == 1.0
    assert "32 failures in a row, the last: time-out" in failures["stopped"]


def test_a_failed_search_fails_its_batch_and_not_the_evaluation(files):
    made = plan(files, Counting())

    class Unwell:
        digest = made.retriever.digest
        calls = 0

        def search(self, queries, topk):
            Unwell.calls += 1
            if Unwell.calls == 1:
                raise RetrievalError("no retriever there")
            return made.retriever.search(queries, topk)

    result = run(replace(made, retriever=Unwell()), Options(batch=4, audit=False))
    assert (
        result["failures"]["reasons"] == {"no retriever there": 4} and result["cells"][0]["em"]["n"] == N - 4
    )


def test_a_query_that_the_retriever_refuses_fails_its_question_alone(files):
    made = plan(files, Counting())

    class Picky:
        digest = made.retriever.digest

        def search(self, queries, topk):
            if "q3" in queries:
                raise RetrievalError("status 422", refused=True)
            return made.retriever.search(queries, topk)

    result = run(replace(made, retriever=Picky()), Options(audit=False))
    assert result["failures"]["reasons"] == {"status 422": 1}
    (cell,) = result["cells"]
    assert (
        cell["em"]["n"] == N - 1
        and f"{N - 1} of {N} questions answered so far" in cell["not_comparable_because"]
    )


def test_a_question_that_does_not_fit_fails_alone(files):
    rows = (files / "q.jsonl").read_text().replace('"q5"', json.dumps("word " * 1000))
    (files / "q.jsonl").write_text(rows)
    policy = Counting()
    result = run(plan(files, policy), Options(audit=False))
    ((reason, count),) = result["failures"]["reasons"].items()
    assert "its prompt has 5" in reason and "agent.total_tokens = 3000" in reason and count == 1
    assert "5" not in policy.asked and result["cells"][0]["em"]["n"] == N - 1


def test_rows_are_written_and_told_one_by_one(files):
    made = plan(files, Counting())
    (cell,) = made.cells
    written = []

    class Watching:
        def started(self, total, cached): ...

        def auditing(self): ...

        def answered(self, cell, row):
            file = made.out / "cells" / cell.name / "records.jsonl"
            written.append((row["group"], len(file.read_bytes().splitlines())))

    run(made, Options(batch=64, audit=False), Watching())
    assert written == [(q.group, i) for i, q in enumerate(cell.questions.questions, 1)]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("votes", [1, 3])
def test_a_sampled_row_does_not_depend_on_what_is_asked_beside_it(files, strategy, votes):
    """So that an evaluation that was killed and went on is the one that was not."""

    def seeds(**options):
        policy, used = Counting(), {}
        load = policy.load

        def watched():
            made = load()
            session = made.session

            def watching():
                opened = session()
                drive = opened.run

                def note(episodes, retriever, temperature, seed):
                    for episode, one in zip(episodes, seed, strict=True):
                        used.setdefault(episode.question.group, []).append(one)
                    drive(episodes, retriever, temperature, seed)

                opened.run = note
                return opened

            made.session = watching
            return made

        policy.load = watched
        made = plan(
            files, policy, f"out{len(options)}{options}", strategies=[strategy], votes=votes, temperature=1.0
        )
        run(made, Options(audit=False, **options))
        return {group: sorted(found) for group, found in used.items()}

    whole = seeds()
    assert whole == seeds(batch=5) and len({one for found in whole.values() for one in found}) >= N * votes


def test_a_corpus_that_is_not_there_is_known_before_anything_is_asked(files):
    policy = Counting()
    made = plan(files, policy)
    config = made.config.model_copy(update={"data": DataConfig(corpus=str(files / "no.jsonl"))})
    with pytest.raises(DataError, match=r"no\.jsonl: No such file"):
        run(replace(made, config=config), Options())
    assert not policy.asked


def test_looking_at_an_evaluation_changes_nothing(files):
    run(plan(files, Counting()), Options(audit=False))
    (records,) = (files / "out" / "cells").glob("*/records.jsonl")
    whole = records.read_bytes()
    records.write_bytes(whole + b'{"group": "half')
    assert len(next(iter(load_evaluation(files / "out")[1].values()))) == N
    assert records.read_bytes() != whole
    run(plan(files, Counting()), Options(audit=False))
    assert records.read_bytes() == whole, "who goes on writing removes the half line"


def test_rows_that_ask_something_else_are_not_paired(files):
    run(plan(files, Counting()), Options(audit=False))
    rows = (files / "q.jsonl").read_text().replace('"q7"', '"something else"')
    (files / "q.jsonl").write_text(rows)
    with pytest.raises(ConfigError, match="another one there"):
        run(plan(files, Counting(), out="again"), Options(audit=False, against=(files / "out",)))


def test_a_larger_sample_reuses_a_smaller_one(files):
    policy = Counting()
    small = run(plan(files, policy, limit=5), Options())
    assert len(set(policy.asked)) == 5 and small["cells"][0]["se"] > 0
    facts = next(iter(small["sets"].values()))
    assert (facts["questions"], facts["whole"]) == (5, N)
    run(plan(files, policy, limit=9), Options())
    assert len(policy.asked) == 2 * 9
    assert run(plan(files, policy, limit=5), Options())["cells"][0]["em"]["n"] == 5


def test_a_shown_evaluation_pairs_the_questions_it_reports(files):
    run(plan(files, Counting(), "b", digest="b"), Options())
    run(plan(files, Counting(), "a"), Options())
    run(plan(files, Counting(), "a", limit=4), Options())
    _, ours = load_evaluation(files / "a")
    _, theirs = load_evaluation(files / "b")
    assert compare(ours, theirs, "b")[0]["em"]["n"] == 4


def test_where_every_row_failed_the_reasons_are_told(files):
    broken = Counting(failing=map(str, range(N)))
    run(plan(files, Counting(), "a"), Options())
    result = run(plan(files, broken, "b", digest="b", strategies=["agent", "direct"]),
                 Options(against=(files / "a",)))  # fmt: skip
    assert result["failures"]["reasons"] and all(row["system"] != "agent" for row in result["paired"])


def test_paired_differences(files):
    base = run(plan(files, Counting(), "a"), Options())
    better = Counting(right=lambda i: i != 1)
    result = run(plan(files, better, "b", digest="b"), Options(against=(files / "a",)))
    (row,) = result["paired"]
    assert row["em"]["value"] == pytest.approx(5 / N) and (row["em"]["better"], row["em"]["worse"]) == (5, 0)
    assert row["em"]["n"] == N and row["em"]["low"] > 0 and row["em"]["p"] == pytest.approx(2 * 0.5**5)
    assert row["against"] == str(files / "a") and base["paired"] == []
    _, ours = load_evaluation(files / "b")
    _, theirs = load_evaluation(files / "a")
    assert compare(ours, theirs, "a")[0]["em"] == row["em"]
    (files / "q.jsonl").write_text(json.dumps({"id": "z", "question": "z", "answers": ["z"]}) + "\n")
    with pytest.raises(ConfigError, match="holds none of the sets q"):
        run(plan(files, Counting(right=lambda i: True), "c", strategies=["direct"], digest="c"),
            Options(against=(files / "a",)))  # fmt: skip


def test_a_vote_is_compared_with_the_same_strategy_and_other_sets_are_refused_at_once(files):
    run(plan(files, Counting(), "a", strategies=["direct", "agent"]), Options())
    result = run(plan(files, Counting(), "b", votes=3), Options(against=(files / "a",)))
    assert [(row["system"], row["other"]) for row in result["paired"]] == [("agent ×3", "agent")]
    (files / "r.jsonl").write_text(json.dumps({"question": "z", "answers": ["z"]}) + "\n")
    policy = Counting()
    with pytest.raises(ConfigError, match="holds none of the sets r"):
        run(plan(files, policy, "c", data=[str(files / "r.jsonl")]), Options(against=(files / "a",)))
    assert policy.loads == 0


def test_every_system_is_compared_with_the_first(files):
    result = run(plan(files, Counting(), strategies=["agent", "direct", "rag"]), Options())
    assert [(row["system"], row["against"]) for row in result["paired"]] == [
        ("direct", "agent"),
        ("rag", "agent"),
    ]
    assert set(result["macro"]) == {"agent", "direct", "rag"}


def test_an_evaluation_of_an_older_version_is_read(files):
    run(plan(files, Counting(), "a", strategies=["agent", "direct"]), Options())
    file = files / "a" / "eval.json"
    file.write_text(file.read_text().replace('"system":', '"way":'))
    result, rows = load_evaluation(files / "a")
    assert {cell["system"] for cell in result["cells"]} == {"agent", "direct"} and len(rows) == 2
    again = run(plan(files, Counting(), "b", digest="b"), Options(against=(files / "a",)))
    assert [row["other"] for row in again["paired"]] == ["agent"]


def test_a_macro_average_weighs_sets_not_questions(files):
    rows = [
        {"id": str(i), "question": f"q{i}", "answers": [f"a{i}"], "source": "nq" if i else "popqa"}
        for i in range(4)
    ]
    (files / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(plan(files, Counting(right=lambda i: i == 0)), Options())
    assert [cell["set"] for cell in result["cells"]] == ["nq", "popqa"]
    assert result["macro"]["agent"]["em"]["value"] == 0.5
    assert list(PUBLISHED["REX-RAG 3B"])[:3] == ["nq", "triviaqa", "popqa"]


def test_what_is_refused_before_anything_runs(files):
    policy = Counting()
    with pytest.raises(ConfigError, match="--strategy react: expected some of agent"):
        plan(files, policy, strategies=["react"])
    with pytest.raises(ConfigError, match=r"no corpus to search.*--corpus"):
        plan(files, policy, config=Config(agent=AGENT))
    assert plan(files, policy, config=Config(agent=AGENT), strategies=["direct"]).retriever.digest == "none"
    with pytest.raises(ConfigError, match="votes on equal answers"):
        plan(files, policy, votes=3, temperature=0.0)
    with pytest.raises(ConfigError, match="given twice"):
        plan(files, policy, data=[str(files / "q.jsonl")] * 2)
    with pytest.raises(ConfigError, match="no evaluation here"):
        run(plan(files, policy), Options(against=(files,)))
    assert policy.loads == 0


# -- audit ---------------------------------------------------------------------------------------------------


def asked(name, *answers):
    return Question(name, "q", answers)


def test_the_audit_agrees_with_looking_into_every_passage(shared):
    """On real questions and passages, against the plain definition."""
    from rexrag.data.questions import load_questions
    from rexrag.retrieval.corpus import read_corpus

    questions = load_questions(shared / "data" / "2wiki" / "dev.jsonl")[:40]
    documents = list(read_corpus(shared / "data" / "2wiki" / "corpus.jsonl"))[:300]
    found, count = audit({"s": questions}, documents)
    plain = {q.group for q in questions if any(has_answer(d.contents, q.answers) for d in documents)}
    assert count == 300 and set(found["s"].answerable) == plain
    assert 0 < len(plain) < len(questions)


def test_answers_are_whole_words_and_verdicts_are_not_judged():
    documents = [Document("1", '"Rome"\nThe City of London, U.S.'), Document("2", '"x"\nFrance')]
    questions = [
        asked("a", "ran"),
        asked("b", "the city of london"),
        asked("c", "US"),
        asked("d", "Yes"),
        asked("e", "no", "France"),
    ]
    found, _ = audit({"s": questions, "t": [asked("f", "yes")]}, documents)
    assert found["s"].answerable == tuple(asked(n).group for n in "bce")
    assert found["s"].unanswerable == (asked("a").group,) and found["s"].unjudged == (asked("d").group,)
    assert found["s"].ceiling == 0.8 and found["t"].ceiling == 1.0


# -- published numbers ---------------------------------------------------------------------------------------


class Wikipedia:
    digest = "w"
    documents = range(21_015_324)


def test_the_paper_s_set_up_is_comparable():
    remote = RetrieverConfig(kind="remote", url="http://x")
    config = Config(retriever=remote)
    assert {name: getattr(config.agent, name) for name in BUDGET} == BUDGET
    assert setup_differences(config, Wikipedia(), "wiki18-e5") == []
    assert "cannot be seen" in setup_differences(config, Wikipedia())[0]
    other = ["retriever bm25, not exact search with E5-base-v2"]
    assert setup_differences(Config(), Wikipedia()) == other
    named = Config(retriever=RetrieverConfig(kind="bm25", encoder="intfloat/e5-base-v2"))
    assert setup_differences(named, Wikipedia()) == other, "a name in the settings is no encoder"
    for ann, expected in (("flat", []), ("hnsw", other)):
        e5 = Wikipedia()
        e5.ranker = SimpleNamespace(
            options=SimpleNamespace(ann=ann),
            encoder=SimpleNamespace(card=SimpleNamespace(model="intfloat/e5-base-v2")),
        )
        assert setup_differences(Config(), e5) == expected
    few = Config(retriever=RetrieverConfig(topk=5), agent=AgentConfig(search_turns=2))
    assert any(
        "search_turns 2 instead of 5, top-k 5 instead of 3" in reason
        for reason in setup_differences(few, Wikipedia())
    )


def test_a_set_is_comparable_where_all_of_it_was_asked():
    from rexrag.data.qa_sets import sample, whole_set

    questions = [Question(str(i), "q", ("a",), "bamboogle", "test") for i in range(125)]
    whole = whole_set("bamboogle", questions, "")
    assert cell_differences(whole, "agent", 1, 0.0) == []
    assert cell_differences(sample(whole, 20), "agent", 1, 0.0) == ["20 of 125 questions"]
    assert len(cell_differences(whole, "rag", 1, 1.0)) == 2
    assert cell_differences(whole_set("mine", questions, ""), "agent", 1, 0.0)


def test_rows_of_records_are_read_back(files):
    run(plan(files, Counting()), Options())
    folder = next((files / "out" / "cells").iterdir())
    rows = read_records(folder)
    assert len(rows) == N and all(row["trace"] and row["stop"] == "answer" for row in rows.values())
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["policy_name"] == "fake" and settings["agent"]["search_turns"] == 2


def test_reflection_does_not_depend_on_the_batch(files):
    """Cues are drawn by the question, so a resumed evaluation is the one that was not stopped."""

    def traces(out, batch):
        made = plan(files, Counting(), out, strategies=["reflect"])
        run(made, Options(batch=batch, audit=False))
        rows = read_records(made.out / "cells" / made.cells[0].name)
        return {group: row["trace"] for group, row in rows.items()}

    one, other = traces("one", 12), traces("other", 5)
    assert one == other and len({text[1] for text in one.values()}) > 1

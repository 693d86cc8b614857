"""The command line: what a user's mistake prints, what the tools print, exit codes."""

import json
import sys

import pytest
import torch

import rexrag
from rexrag.cli import main
from rexrag.config.files import dump_toml
from rexrag.data.world.generator import World
from rexrag.errors import RunFolderError

QUESTION = {"id": "q1", "question": "Who?", "answers": ["x"]}
PASSAGE = {"id": "1", "contents": '"Oslo"\nOslo is a city in Norway.'}


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["rexrag", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def files(tmp_path):
    """A user's own folder: corpus and questions, all good."""

    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    write("corpus.jsonl", PASSAGE, {"id": "2", "title": "Rome", "text": "Rome is a city in Italy."})
    write("train.jsonl", *({**QUESTION, "id": f"q{i}"} for i in range(4)))
    return tmp_path, write


def own(folder, *more):
    paths = [
        f"data.train={folder}/train.jsonl",
        f"data.corpus={folder}/corpus.jsonl",
        "train.questions=2",
        *more,
    ]
    return [word for path in paths for word in ("--set", path)]


def refused(result, *words):
    code, _, err = result
    assert code == 2 and err.startswith("rexrag: ") and len(err.splitlines()) == 1, result
    assert all(word in err for word in words), err


def test_missing_corpus(run, files):
    folder, _ = files
    out = folder / "run"
    refused(run("train", *own(folder, "data.corpus=/no/corpus.jsonl"), "--out", out), "/no/corpus.jsonl")
    refused(run("train", *own(folder, "data.corpus="), "--out", out), "data.corpus")
    assert not out.exists()


def test_malformed_row(run, files):
    folder, write = files
    write("train.jsonl", QUESTION, {"id": "q2", "question": "Where?"})
    refused(run("train", *own(folder), "--out", folder / "run"), "train.jsonl", "row 2", "answers")
    write("train.jsonl", QUESTION, {"id": "q2", "question": "Where?", "answers": []})
    refused(run("train", *own(folder), "--out", folder / "run"), "train.jsonl", "row 2", "answers")
    write("train.jsonl", QUESTION)
    write("corpus.jsonl", PASSAGE, {"id": "2"})
    refused(run("train", *own(folder), "--out", folder / "run"), "corpus.jsonl", "row 2", "contents")
    (folder / "train.jsonl").write_text('{"id": 1,')
    refused(run("data", "check", folder / "train.jsonl"), "train.jsonl", "row 1", "JSON")
    assert not (folder / "run").exists()


def test_a_prompt_longer_than_the_window(run, files):
    folder, write = files
    write("train.jsonl", QUESTION, {"id": "long", "question": "why " * 600, "answers": ["x"]})
    refused(run("train", *own(folder), "--out", folder / "run"), "long", "agent.total_tokens")
    assert not (folder / "run").exists()


def test_a_model_folder_without_a_tokenizer(run, files):
    folder, _ = files
    (folder / "model").mkdir()
    refused(run("train", *own(folder, f"policy.path={folder}/model"), "--out", folder / "run"), "model")
    refused(run("ask", "Who?", "--policy", folder / "nothing"), "nothing", "no such model folder")


def test_an_index_of_another_corpus(run, files):
    folder, write = files
    assert run("index", "build", folder / "corpus.jsonl", "--out", folder / "index")[0] == 0
    write("corpus.jsonl", PASSAGE)
    result = run("train", *own(folder, f"retriever.index={folder}/index"), "--out", folder / "run")
    refused(result, "index")


def test_an_out_folder_that_cannot_be_used(run, files):
    folder, _ = files
    (folder / "full").mkdir()
    (folder / "full" / "x").write_text("mine")
    refused(run("train", *own(folder), "--out", folder / "full"), "full", "not empty")
    refused(run("train", *own(folder), "--out", folder / "train.jsonl" / "run"), "train.jsonl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["train", "--set", "algorithm.keep_ration=1"],
            ["algorithm.keep_ration", "did you mean 'algorithm.keep_ratio'"],
        ),
        (["train", "nothing.toml"], ["nothing.toml", "no such config"]),
        (["train", "--arm", "grop"], ["did you mean 'grpo'"]),
        (["compare", "--arms", "grpo,rex"], ["algorithm 'rex'", "did you mean 'rex-rag'"]),
        (["compare", "--seeds", "0"], ["at least one seed"]),
        (["compare", "--budget", "money"], ["--budget money", "tokens"]),
        (["train", "quickstart", "--resume", "--out", "r"], ["r/config.toml", "not quickstart", "--set"]),
        (["train", "--set", "retriever.url=http://127.0.0.1:1"], ["retriever.url", "kind = 'remote'"]),
        (["eval", "--index", "a", "--retriever", "http://127.0.0.1:1"], ["--index and --retriever"]),
        (
            ["eval", "--policy", "tiny-hard", "--assume-retriever", "wiki18-e5"],
            ["--assume-retriever", "remote retriever only"],
        ),
        (["ask", "x", "--model", "m"], ["--model", "endpoint"]),
        (["score", "nothing.jsonl"], ["nothing.jsonl"]),
        (["retrieve", "x"], ["exactly one of --index"]),
        (["serve", "nothing"], ["nothing", "no index here"]),
        (["index", "build", "nothing.jsonl", "--out", "i"], ["nothing.jsonl", "no such file"]),
        (["index", "build", "c", "--out", "i", "--kind", "bm26"], ["--kind bm26", "bm25-disk", "hybrid"]),
        (["index", "build", "c", "--out", "i", "--kind", "dense"], ["--kind dense needs --encoder"]),
        (["report", "nothing"], ["nothing"]),
        (["data", "world", "w", "--people", "12", "--train", "99999"], ["12 people", "asked for"]),
    ],
)
def test_a_mistake_is_one_line(run, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(run(*arguments), *words)


def test_the_control_is_laid_over_the_base_and_survives_a_kill(run, tmp_path, monkeypatch):
    seen = []

    def pretended(config, folder, resume, restart, observer):
        seen.append(
            (config.label, config.algorithm.clip_high, config.algorithm.dynamic_sampling, config.seed, resume)
        )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(dump_toml(config))
        observer.started(config, folder)
        if config.label == "grpo" and len(seen) == 2:
            raise RunFolderError("killed")
        summary = {"steps": 1, "generated_tokens": 0, "seconds": 1.0}
        (folder / "summary.json").write_text(json.dumps(summary))
        return summary

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rexrag.training.loop.train", pretended)
    monkeypatch.setattr("rexrag.report.write_report", lambda *arguments: "page")
    refused(run("train", "--arm", "dapo", "--seed", "3", "--out", "r"), "killed")
    assert run("train", "--resume", "--out", "r", "--json")[0] == 0
    control = ("grpo", 0.2, 0, 3, False)
    assert seen == [("dapo", 0.28, 3, 3, False), control, control]


def test_an_index_brings_its_kind_and_silences_a_remote_retriever(run, files, tmp_path):
    folder, _ = files
    kept = ["--corpus", folder / "corpus.jsonl", "--index", folder / "index"]
    build = ["index", "build", folder / "corpus.jsonl", "--out", folder / "index", "--kind", "bm25-disk"]
    assert run(*build)[0] == 0
    (folder / "c.toml").write_text(
        '[retriever]\nkind = "remote"\nurl = "http://127.0.0.1:1"\n[agent]\ntotal_tokens = 1024\n'
    )
    words = ["--data", folder / "train.jsonl", "--limit", "1", "--strategy", "rag", "--out", tmp_path / "o"]
    code, out, err = run("eval", folder / "c.toml", "--policy", "tiny-hard", *kept, *words, "--json")
    assert code == 0, err
    assert json.loads(out)["retriever"]["kind"] == "bm25-disk"


def test_the_version_is_an_option_and_completion_can_be_installed(run):
    assert run("--version") == (0, f"rexrag {rexrag.__version__}\n", "")
    code, out, _ = run("--help")
    assert code == 0 and "--install-completion" in out and "--version" in out


def test_debug_shows_where(run):
    code, _, err = run("score", "nothing.jsonl", "--debug")
    assert code == 2 and "Traceback" in err and "DataError" in err


def test_an_evaluation_of_a_run_uses_its_own_settings_and_gives_its_own_number(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    small = ["data.world_people=24", "data.world_questions=8", "data.dev_limit=6", "train.questions=2"]
    small += [
        "train.steps=1",
        "train.max_tokens=0",
        "train.control=",
        "train.threads=1",
        "algorithm.rollouts=2",
    ]
    code, out, err = run(
        "train",
        "--out",
        "r",
        "--json",
        *(w for s in small for w in ("--set", s)),
    )
    assert code == 0, err
    trained = json.loads(out)["rex-rag-distill"]["em_after"]
    code, out, err = run("eval", "--policy", "r", "--strategy", "agent,direct", "--json")
    torch.set_num_threads(threads)
    assert code == 0, err
    result = json.loads(out)
    assert result["cells"][0]["em"] == trained and result["cells"][0]["corpus"]["ceiling"] == 1.0
    digest = result["policy"]["digest"][:8]
    assert result["out"] == f"runs/eval/r-checkpoints-step-1-{digest}", "a later checkpoint is another policy"
    code, out, _ = run("eval", "--show", result["out"])
    assert code == 0 and out.count("minus agent") == out.count("scores in percent") == 1
    assert max(map(len, out.splitlines()[:-1])) <= 80


@pytest.fixture
def served(files, monkeypatch):
    """An endpoint that plays the embedded model's part; its requests and faults."""
    from rexrag.agent.codec import load_codec
    from rexrag.engine.endpoint import client
    from rexrag.engine.loading import resolve
    from tests.support.completions_server import CompletionsServer, scripted
    from tests.support.live_service import running

    monkeypatch.setattr(client, "pause", lambda *arguments: 0.0)
    tokenizer = resolve("tiny-hard")
    codec = load_codec(tokenizer)
    model = scripted(lambda prompt: "<answer> again </answer>", codec.decode, codec.encode)
    server = CompletionsServer(model, codec.decode)
    folder, write = files
    write("train.jsonl", *({"id": i, "question": "Who?", "answers": ["again"]} for i in range(4)))
    with running(server.app) as url:
        words = [
            "eval",
            "quickstart",
            "--policy",
            f"{url}/v1",
            "--tokenizer",
            tokenizer,
            "--out",
            folder / "out",
        ]
        words += ["--data", folder / "train.jsonl", "--corpus", folder / "corpus.jsonl", "--retries", "1"]
        yield server, [*words, "--concurrency", "1"]


def test_an_endpoint_is_evaluated(run, served):
    server, words = served
    code, out, err = run(*words, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["cells"][0]["em"]["value"] == 1.0 and result["failures"]["failed"] == 0
    assert "the-model at http://127.0.0.1" in result["policy"]["name"] and len(server.requests) == 4


def test_an_endpoint_is_asked(run, served, files):
    _, words = served
    url, tokenizer = words[3], words[5]
    folder, _ = files
    ask = ["ask", "Who?", "--config", "quickstart", "--policy", url, "--tokenizer", tokenizer]
    ask += ["--set", f"data.corpus={folder}/corpus.jsonl"]
    code, out, err = run(*ask, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer == {
        "answer": "again",
        "trace": answer["trace"],
        "searches": 0,
        "tokens": answer["tokens"],
        "confidence": None,
    }
    assert "<answer>" in answer["trace"] and answer["tokens"] > 2
    code, out, _ = run(*ask)
    assert code == 0 and f"answer: again  (0 searches, {answer['tokens']} tokens)" in out


@pytest.mark.parametrize(("dialect", "votes", "turns"), [("vllm", 1, 0), ("text", 1, 4), ("text", 2, 8)])
def test_turns_that_an_endpoint_gives_as_text_are_counted(run, served, dialect, votes, turns):
    server, words = served
    server.dialect = dialect
    code, out, err = run(*words, "--votes", str(votes))
    assert code == 0, err
    assert (f"{turns} turns came as text and were encoded anew" in " ".join(out.split())) == (turns > 0)
    (cell,) = json.loads((words[words.index("--out") + 1] / "eval.json").read_text())["cells"]
    assert cell["encoded_anew"] == turns
    rows = (words[words.index("--out") + 1] / cell["folder"] / "records.jsonl").read_text().splitlines()
    assert [json.loads(row)["encoded_anew"] for row in rows] == [votes if turns else 0] * 4


def test_rows_that_an_endpoint_fails_are_summed_up_and_asked_again(run, served):
    from tests.support.completions_server import says, status

    server, words = served
    server.faults = [says("nonsense"), status(500)]
    code, out, err = run(*words)
    assert code == 1 and "1 of 4 rows failed, 0 not asked: more than --max-failed 0.01" in err
    assert "1 × http://127.0.0.1" in out and "failed 2 times, the last time with status 500" in out
    assert run(*words)[0] == 0 and len(server.requests) == 2 + 3 + 1
    server.faults = [says("nonsense"), status(500)]
    assert run(*words, "--fresh", "--max-failed", "0.5")[0] == 0


def test_what_an_evaluation_refuses(run, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, write = files
    write("bad.jsonl", {"id": 1, "question": "Who?"})
    corpus = ["--corpus", folder / "corpus.jsonl"]
    refused(run("eval", "--data", folder / "bad.jsonl", *corpus), "bad.jsonl, row 1, field 'answers'")
    refused(run("eval", "--policy", "tiny-hard", "--data", folder / "train.jsonl"), "no corpus", "--corpus")
    refused(run("eval", "--policy", "no/such/model"), "no/such/model")
    refused(run("eval", "--model", "m"), "--model", "endpoint")
    refused(run("eval", "--assume-retriever", "me"), "--assume-retriever me")
    code, out, _ = run("eval", "--vouch", "me")
    assert code == 2 and "--vouch is now called --assume-retriever" in out
    refused(run("eval", "--strategy", "agnet"), "agnet", "agent")
    refused(run("eval", "--sets", "nq"), "--data")
    refused(run("eval", "--show", folder), "no eval.json")
    code, _, err = run("eval", "--policy", "http://127.0.0.1:9/v1", "--retries", "0", *corpus)
    assert code == 1 and err.startswith("rexrag: http://127.0.0.1:9/v1/models") and len(err.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_every_command_has_help_with_an_example(run):
    commands = [
        "train",
        "compare",
        "eval",
        "report",
        "ask",
        "score",
        "retrieve",
        "serve",
        "warmup",
        "index build",
    ]
    for command in [*commands, "data world", "data check", "model import"]:
        code, out, _ = run(*command.split(), "--help")
        assert code == 0 and f"rexrag {command}" in out, command


def test_tools_print_what_they_found(run, files, monkeypatch):
    folder, _ = files
    code, _, err = run("index", "build", folder / "corpus.jsonl", "--out", folder / "train.jsonl" / "index")
    assert code == 2 and "train.jsonl" in err and "GB" not in err  # not how large a disk is
    assert "2 documents" in run("index", "build", folder / "corpus.jsonl", "--out", folder / "index")[1]
    code, out, _ = run("retrieve", "city in Norway", "--index", folder / "index", "-k", 1, "--json")
    assert code == 0 and json.loads(out)[0][0]["id"] == "1"
    disk = folder / "disk"
    built = run("index", "build", folder / "corpus.jsonl", "--out", disk, "--kind", "bm25-disk", "--json")
    assert json.loads(built[1])["documents"] == 2
    assert "about 2 passages. Will need about" in built[2]
    assert "Oslo" in run("retrieve", "Norway", "--index", disk)[1]
    assert "Oslo" in run("retrieve", "Norway", "--corpus", folder / "corpus.jsonl")[1]
    assert (
        "4 questions" in run("data", "check", folder / "train.jsonl", "--corpus", folder / "corpus.jsonl")[1]
    )
    findings = {finding["what"]: finding for finding in json.loads(run("doctor", "--json")[1])}
    assert {"torch", "tiny-hard", "gpu"} <= set(findings)
    assert findings["precision"]["detail"].startswith("policy.precision = auto is ")
    assert "hard questions: right by chance 0.0 %" in str(findings["tiny-hard"])


def test_a_user_s_own_files_train_through_the_same_code(run, tmp_path):
    threads = torch.get_num_threads()
    World(3, 24).write(tmp_path / "data", train=12, held_out=4)
    small = [
        "algorithm.rollouts=2",
        "train.steps=1",
        "train.control=",
        "train.max_generated=0",
        "train.threads=1",
    ]
    paths = [f"data.dev={tmp_path}/data/dev.jsonl", *small]
    code, out, err = run("train", *own(tmp_path / "data", *paths), "--out", tmp_path / "run", "--json")
    assert code == 0, err
    summary = json.loads(out)
    resume = ("train", "--resume", "--out", tmp_path / "run", "--json")
    for more, steps in (((), 1), (("--set", "train.steps=2"), 2), ((), 2)):
        code, out, err = run(*resume, *more)
        assert code == 0 and json.loads(out)["rex-rag-distill"]["steps"] == steps, err
    torch.set_num_threads(threads)
    assert summary["rex-rag-distill"]["em_before"]["n"] == 4
    assert (tmp_path / "run" / "report.html").stat().st_size > 1e6
    code, out, _ = run("ask", "Who is married to Anna?", "--policy", tmp_path / "run")
    assert code == 0 and "answer:" in out


def test_scoring_recorded_rollouts(run, shared):
    traces = shared / "data" / "traces" / "search_r1_3b_base_bamboogle.jsonl"
    code, out, _ = run("score", traces, "--json")
    found = json.loads(out)
    assert code == 0 and found["totals"]["rows"] == 125 and found["totals"]["disagreements"] == 0
    assert all(row["searches"] + row["answers"] > 0 for row in found["rows"])

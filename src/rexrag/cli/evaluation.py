"""`rexrag eval`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from rexrag.cli.training import AllowPlugins, JsonOption, SetOption

if TYPE_CHECKING:  # what they import is slow to load, and a command line is parsed first
    from rexrag.config.schema import Config
    from rexrag.evaluation.cells import Choices
    from rexrag.evaluation.policies import EndpointOptions
    from rexrag.evaluation.runner import Options


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    config: Annotated[
        str | None, typer.Argument(help="A config; default: the checkpoint's run, else Search-R1's protocol.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="A run folder, checkpoint, model folder or id, or http://…/v1.")
    ] = "",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A file, folder or hub id of questions; repeatable. Default: the config's dev set."
        ),
    ] = None,
    sets: Annotated[str, typer.Option(help="Some of --data's sets, e.g. nq,hotpotqa,musique.")] = "",
    strategy: Annotated[
        str,
        typer.Option(help="Some of agent,direct,cot,rag,ircot,search-o1,reflect; the first is the control."),
    ] = "agent",
    votes: Annotated[int, typer.Option(help="Majority vote over this many attempts.", min=1)] = 1,
    limit: Annotated[int, typer.Option(help="Questions drawn from each set; 0: all.", min=0)] = 0,
    stratify: Annotated[bool, typer.Option("--stratify", help="Keep the shares of question types.")] = False,
    corpus: Annotated[str, typer.Option(help="A corpus.jsonl to search (and to audit).")] = "",
    index: Annotated[str, typer.Option(help="Or an index folder to search.")] = "",
    retriever: Annotated[str, typer.Option(help="Or the address of a /retrieve service to search.")] = "",
    temperature: Annotated[
        float | None, typer.Option(help="Default 0 (greedy); with --votes the agent's.", min=0.0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of samples, votes and cues.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder; default runs/eval/<policy>-<digest>.")] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="Another evaluation's folder, for a paired test; repeatable.")
    ] = None,
    show: Annotated[Path | None, typer.Option(help="Print a finished evaluation; runs nothing.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ask all questions again, cached ones too.")] = False,
    audit: Annotated[bool, typer.Option(help="Count questions whose answer no passage contains.")] = True,
    assume_retriever: Annotated[
        str, typer.Option(help="wiki18-e5: state that the remote retriever is the paper's.", metavar="NAME")
    ] = "",
    vouch: Annotated[str, typer.Option(hidden=True)] = "",
    batch: Annotated[int, typer.Option(help="Attempts run side by side.", min=1)] = 64,
    max_failed: Annotated[
        float, typer.Option(help="Exit 1 where a larger share of the rows failed.", min=0.0, max=1.0)
    ] = 0.01,
    model: Annotated[str, typer.Option(help="Endpoint: the model's name there.")] = "",
    tokenizer: Annotated[str, typer.Option(help="Endpoint: tokenizer folder or id; default: --model.")] = "",
    concurrency: Annotated[int, typer.Option(help="Endpoint: rollouts in flight.", min=1)] = 16,
    timeout: Annotated[float, typer.Option(help="Endpoint: seconds for an answer.", min=0.1)] = 120.0,
    retries: Annotated[int, typer.Option(help="Endpoint: tries after the first.", min=0)] = 5,
    override: SetOption = None,
    allow_plugins: AllowPlugins = False,
    as_json: JsonOption = False,
) -> None:
    """Score a policy and its baselines: EM, F1, evidence, cost, with intervals, beside published numbers.

    The same command continues after a kill, asks failed questions again, and reuses the answers in --out.

    \b
    Examples:
      rexrag eval --policy runs/quickstart                          the run's own held-out questions
      rexrag eval --policy runs/quickstart --strategy agent,reflect,direct --against runs/eval/before
      rexrag eval --policy Qwen/Qwen2.5-3B --data FOLDER --index INDEX --limit 500
      rexrag eval --policy http://127.0.0.1:8000/v1 --data RUC-NLPIR/FlashRAG_datasets \\
          --sets nq,hotpotqa --retriever http://127.0.0.1:8001 --assume-retriever wiki18-e5
      rexrag eval --policy models/a --data dev.jsonl --corpus corpus.jsonl --votes 5
      rexrag eval --show runs/eval/a --against runs/eval/b          two finished evaluations, paired
    """
    from rexrag.cli.display import stdout
    from rexrag.cli.display_eval import print_evaluation
    from rexrag.errors import EvaluationError
    from rexrag.evaluation.cells import Choices
    from rexrag.evaluation.policies import EndpointOptions, resolve_config
    from rexrag.evaluation.runner import Options

    console = stdout()
    console.quiet = as_json
    if vouch:
        console.print("--vouch is now called --assume-retriever")
    if show is not None:
        result = _shown(show, against or [])
    else:
        overrides = [*_searched(corpus, index, retriever), *(override or [])]
        settings = resolve_config(policy, config, overrides, allow_plugins)
        choices = Choices(
            data=data or [], sets=_names(sets), strategies=_names(strategy), votes=votes, limit=limit,
            stratify=stratify, seed=seed, temperature=temperature,
        )  # fmt: skip
        options = Options(
            batch=batch, audit=audit, fresh=fresh, against=tuple(against or []),
            assumed_retriever=assume_retriever or vouch,
        )  # fmt: skip
        endpoint = EndpointOptions(
            model=model, tokenizer=tokenizer, concurrency=concurrency, timeout=timeout, retries=retries
        )
        result = _run(policy, settings, choices, options, endpoint, out, console)
    if as_json:
        print(json.dumps(result))
    else:
        print_evaluation(console, result)
    failures = result["failures"]
    if failures["stopped"] or failures["share"] > max_failed:
        raise EvaluationError(
            f"{failures['failed']:,} of {failures['rows']:,} rows failed, {failures['unasked']:,} not asked: "
            f"more than --max-failed {max_failed:g} allows; the same command asks them again"
        )


def _run(
    policy: str,
    settings: Config,
    choices: Choices,
    options: Options,
    endpoint: EndpointOptions,
    out: Path | None,
    console: Console,
) -> dict[str, Any]:
    from rexrag.cli.display_eval import EvalProgress
    from rexrag.evaluation.cells import plan_evaluation
    from rexrag.evaluation.policies import is_endpoint, open_policy
    from rexrag.evaluation.published import check_assumed
    from rexrag.evaluation.runner import run

    check_assumed(options.assumed_retriever, settings.retriever)
    source = open_policy(policy, settings.policy, endpoint)
    if is_endpoint(policy):  # a batch ends with its slowest rollout, so it holds several rounds of them
        options = replace(options, batch=max(options.batch, 4 * endpoint.concurrency))
    progress = EvalProgress(console)
    try:
        where = out or Path("runs/eval") / f"{_slug(source.name)}-{source.digest[:8]}"
        plan = plan_evaluation(source, settings, choices, where)
        return run(plan, options, progress) | {"out": str(plan.out)}
    except KeyboardInterrupt:
        progress.stop()
        console.print("stopped; what was answered is kept: the same command goes on")
        raise
    finally:
        progress.stop()
        source.close()


def _searched(corpus: str, index: str, retriever: str) -> list[str]:
    """What --corpus, --index and --retriever say, as overrides of the configuration."""
    from rexrag.errors import ConfigError
    from rexrag.retrieval.index.folder import read_manifest

    if index and retriever:
        raise ConfigError("--index and --retriever: only one of them would be asked; give that one")
    chosen = {"data.corpus": corpus} if corpus else {}
    if index:
        kind = read_manifest(index)["kind"]
        chosen |= {"retriever.kind": kind, "retriever.index": index, "retriever.url": ""}
    if retriever:
        chosen |= {"retriever.kind": "remote", "retriever.url": retriever}
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in chosen.items()]


def _shown(folder: Path, against: list[Path]) -> dict[str, Any]:
    from rexrag.evaluation.paired_tests import compare, load_evaluation

    result, rows = load_evaluation(folder)
    paired = [row for other in against for row in compare(rows, load_evaluation(other)[1], str(other))]
    return result | {"paired": paired or result["paired"], "out": str(folder)}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _slug(name: str) -> str:
    """A readable folder name: the last parts of a path or id."""
    tail = "-".join(Path(name).parts[-3:])
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in tail).strip("-.")[:80] or "policy"

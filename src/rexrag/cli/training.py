"""`rexrag train` and `rexrag report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rexrag.config import presets
from rexrag.config.files import dump_toml, load_config
from rexrag.config.plugin_keys import require_plugins_allowed
from rexrag.config.schema import ENDLESS, Budget, Config
from rexrag.errors import ConfigError
from rexrag.io import write_text
from rexrag.training.run_folder import check_resumable, free_folder, has_checkpoint
from rexrag.training.trackers import CONTROL

ConfigArgument = Annotated[
    str | None, typer.Argument(help="A TOML file or the name of a shipped config; none: the quickstart.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. --set algorithm.kl=0.001"),
]
Part = tuple[str, Config, Path]
"""Label, settings and folder of one of the runs of a command: the run itself, or its control."""
CONTROL_SETTINGS = "control.toml"
Summary = tuple[str, dict[str, Any]]
"""Label of a run, and its `summary.json`."""
AllowPlugins = Annotated[
    bool, typer.Option("--allow-plugins", help="Import plug-ins that the run folder names.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def register(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(compare)
    app.command()(report)


def train(
    config: ConfigArgument = None,
    override: SetOption = None,
    algorithm: Annotated[
        str,
        typer.Option(
            "--algorithm",
            "--arm",
            help="grpo, dapo, dr-grpo, rex-rag, rex-rag-distill; a shipped ablation; or a TOML file.",
        ),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/<name>.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="engine = verl: print verl's settings and the memory, then stop."),
    ] = False,
    allow_plugins: AllowPlugins = False,
    as_json: JsonOption = False,
) -> None:
    """Train a search agent; leave a run folder with a verdict and a page.

    \b
    Examples:
      rexrag train
      rexrag train --set train.steps=100 --out runs/long
      rexrag train own-data --set data.train=questions.jsonl --set data.corpus=corpus.jsonl
      rexrag train --resume --out runs/long
      rexrag train qwen2.5-3b-nq-hotpot --dry-run
    """
    from rexrag.cli.display import stdout, summary_table
    from rexrag.report import write_report
    from rexrag.training.verdict import Verdict

    overrides = [*(override or []), *([f"seed={seed}"] if seed is not None else [])]
    if resume:
        if out is None:
            raise ConfigError("--resume needs the run folder: --out DIR")
        if config is not None:
            raise ConfigError(
                f"--resume goes on with {out / 'config.toml'}, not {config}; change it with --set"
            )
        check_resumable(out)
        settings = presets.resolve(out / "config.toml", algorithm, overrides)
        require_plugins_allowed(settings, allow_plugins, out / "config.toml")
        control = _kept_control(settings, out, overrides)
        if control is not None:
            require_plugins_allowed(control, allow_plugins, out / CONTROL_SETTINGS)
    else:
        settings = presets.resolve(config, algorithm, overrides)
        settings, control = _control(config, settings, overrides)
    if dry_run:
        _show_dry_run(settings, as_json)
        return
    folder = out or free_folder(settings.name)
    console = stdout()
    console.quiet = as_json
    parts = [(settings.label, settings, folder)]
    if control is not None:
        parts.append((settings.train.control, control, folder / CONTROL))
    summaries = _run_parts(parts, resume, console)
    page = write_report([folder], folder / "report.html")
    if as_json:
        print(json.dumps(dict(summaries) | {"report": str(page)}))
        return
    for label, summary in summaries:
        if "verdict" in summary:  # a run of 0.1.0 that is over has none
            console.print(f"{label}: {Verdict(**summary['verdict']).line}", markup=False)
    console.print(summary_table(summaries))
    console.print(f"run folder {folder}\npage       {page}", markup=False)


def _show_dry_run(settings: Config, as_json: bool) -> None:
    from rexrag.cli.display import dry_run_tables, stdout
    from rexrag.verl.dry_run import dry_run

    facts = dry_run(settings)
    if as_json:
        print(json.dumps(facts))
        return
    for shown in dry_run_tables(facts):
        stdout().print(shown)


def _run_parts(parts: list[Part], resume: bool, console: Console) -> list[Summary]:
    """Train the run and its control; a resume skips what is over and begins again what saved nothing."""
    from rexrag.api.runs import run_training as run
    from rexrag.cli.display import RunProgress
    from rexrag.training.trackers import Together, open_trackers

    summaries: list[Summary] = []
    (_, settings, folder), *others = parts
    for label, part, where in parts:
        budget = summaries[0][1]["generated_tokens"] if summaries else 0
        part = part if not budget else _at_budget(part, budget)
        if resume and _is_done(part, where):
            summaries.append((label, json.loads((where / "summary.json").read_text(encoding="utf-8"))))
            continue
        console.print(f"{label}: loading, then an evaluation before training ({where})", markup=False)
        progress = RunProgress(console, label)
        kept = [_Kept(control) for _, control, _ in others] if where == folder else []
        observers = Together([progress, *kept, *open_trackers(settings.train.track)])
        try:
            again = resume and has_checkpoint(where)
            summary = run(part, where, resume=again, restart=resume and not again, observer=observers)
        except KeyboardInterrupt:
            progress.stop()
            if (folder / "config.toml").exists():
                command = f"rexrag train --resume --out {folder}"
                console.print(f"stopped; go on from the last checkpoint with: {command}", markup=False)
            raise
        finally:
            progress.stop()
            observers.finish()
        summaries.append((label, summary))
    return summaries


def compare(
    config: ConfigArgument = None,
    arms: Annotated[
        str, typer.Option(help="Algorithms, ablations or TOML files; the first is the control.")
    ] = "grpo,rex-rag-distill,rex-rag",
    seeds: Annotated[int, typer.Option(help="How many seeds, counted from --first-seed.")] = 6,
    first_seed: Annotated[int, typer.Option(help="The first seed.")] = 1,
    budget: Annotated[
        str,
        typer.Option(help="What is equal: generated (tokens), tokens (generated and read), rollouts, time."),
    ] = "generated",
    amount: Annotated[float, typer.Option(help="Tokens, rollouts or seconds of each run.")] = 60000,
    evals: Annotated[int, typer.Option(help="Evaluations of each run after the first.", min=1)] = 4,
    jobs: Annotated[int, typer.Option(help="Runs at once; 0: one a core.", min=0)] = 0,
    out: Annotated[Path, typer.Option(help="Folder; after a kill the same command continues.")] = Path(
        "runs/compare"
    ),
    override: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train algorithms with several seeds at an equal budget and compare them in pairs.

    \b
    Examples:
      rexrag compare --arms grpo,rex-rag-distill --seeds 10 --budget tokens --amount 200000
      rexrag compare my.toml --arms grpo,my-arm.toml --budget time --amount 600
    """
    from rexrag.cli.display import comparison_table, stdout, table
    from rexrag.experiments import diagnosis
    from rexrag.experiments import runner as experiment
    from rexrag.experiments.analysis import SEEDS_FOR_SIGNIFICANCE, few_seeds, findings
    from rexrag.report import write_report

    if budget not in experiment.LIMITS:
        raise ConfigError(f"--budget {budget}: expected {', '.join(experiment.LIMITS)}")
    chosen: Budget = next(known for known in experiment.LIMITS if known == budget)
    names = [name.strip() for name in arms.split(",") if name.strip()]
    wanted = range(first_seed, first_seed + seeds)
    work = experiment.plan(config, names, list(wanted), chosen, amount, override or [], evals)
    console = stdout()
    console.quiet = as_json
    console.print(
        f"{len(names)} arms × {seeds} seeds, {amount:g} {budget} each, control {names[0]}: {out}",
        markup=False,
    )
    if seeds < SEEDS_FOR_SIGNIFICANCE:
        console.print(few_seeds(seeds))
    ahead = experiment.look_ahead(work, out)
    title = "The initial checkpoint: how it fails, and what probes make of it"
    console.print(table(title, ("", "value [95 %]", "n"), diagnosis.lines(ahead)))
    result = experiment.run(work, out, jobs, console.print)
    folders = list(experiment.run_folders(work, out))
    page = write_report(folders, out / "report.html", work.arms[0], result)
    if as_json:
        print(json.dumps(result | {"diagnosis": ahead}))
        return
    for line in (*findings(result), *result["warnings"]):
        console.print(line, markup=False)
    console.print(comparison_table(result))
    console.print(f"figures {out / 'compare.json'}\npage    {page}", markup=False)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or the folder of a comparison.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write; of one folder, report.html in it.")
    ] = None,
) -> None:
    """Make one self-contained page from run folders.

    \b
    Examples:
      rexrag report runs/a runs/b --out both.html
      rexrag report runs/compare
    """
    from rexrag.report import write_report

    print(write_report(runs, out or (runs[0] if len(runs) == 1 else Path()) / "report.html"))


def _control(
    config: str | Path | None, settings: Config, overrides: list[str]
) -> tuple[Config, Config | None]:
    """The run, and the one beside it: the control's arm over the same base, not over the run's own arm.

    A run that is its own control goes alone.
    """
    if not settings.train.control:
        return settings, None
    control = presets.resolve(config, settings.train.control, [*overrides, "train.control=''"])
    alone = settings.model_copy(update={"train": settings.train.model_copy(update={"control": ""})})
    return (alone, None) if alone == control else (settings, control)


def _kept_control(settings: Config, folder: Path, overrides: list[str]) -> Config | None:
    """What `_Kept` wrote down: a run folder's config.toml has the run's arm in it."""
    if not settings.train.control:
        return None
    kept = folder / CONTROL_SETTINGS
    if not kept.is_file():
        raise ConfigError(f"{kept}: no such file; without it the control is unknown: --set train.control=")
    return presets.resolve(kept, overrides=[*overrides, "train.control=''"])


class _Kept:
    """Writes the control's settings into the run's folder, as soon as there is one: a kill may come next."""

    def __init__(self, control: Config) -> None:
        self.control = control

    def started(self, config: Config, folder: Path) -> None:
        write_text(folder / CONTROL_SETTINGS, dump_toml(self.control))

    def evaluated(self, figures: dict[str, Any]) -> None:
        pass

    def stepped(self, row: dict[str, Any], done: float) -> None:
        pass


def _is_done(part: Config, where: Path) -> bool:
    """Has this run ended under these very settings? Under others it may have further to go."""
    if not (where / "summary.json").exists() or not (where / "config.toml").exists():
        return False
    return load_config(where / "config.toml") == part


def _at_budget(config: Config, tokens: int) -> Config:
    """The same configuration, stopped by generated tokens instead of steps."""
    train = config.train.model_copy(update={"max_generated": tokens, "steps": ENDLESS})
    return config.model_copy(update={"train": train})

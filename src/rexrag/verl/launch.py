"""From `rexrag train` to verl: checks, data files, the retriever's service, and the hand-over."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rexrag.agent.codec import load_codec
from rexrag.config.schema import Config
from rexrag.data.questions import questions_digest
from rexrag.engine.loading import identity, resolve, settled
from rexrag.errors import CheckpointError, ConfigError, DataError
from rexrag.io import atomic_folder, write_json, write_jsonl
from rexrag.retrieval import check_service, make_retriever
from rexrag.retrieval.base import Retriever
from rexrag.retrieval.http.connections import Server
from rexrag.retrieval.http.service import create_app, listen
from rexrag.training.components import Data, fit_prompts, load_cues, load_data
from rexrag.training.loop import COUNTS, Progress, summarise, warn_of_overlap
from rexrag.training.run_folder import digest, environment, follow_config, last_row, open_run
from rexrag.types import Question
from rexrag.verl.checks import (
    check_attention,
    check_devices,
    check_installed,
    check_settings,
)
from rexrag.verl.cost import check_memory, shape_of
from rexrag.verl.mapping import MODULES, PLUGIN, compose
from rexrag.verl.records import STATE_FILE, question_row


def launch(config: Config, folder: Path, resume: bool = False, restart: bool = False) -> dict[str, Any]:
    """Train with verl into `folder` and return the summary. Raises RexragError before any process starts.

    restart: what a run left there that had saved nothing makes way.
    """
    check_installed()
    config = settled(config)
    check_settings(config)
    folder = folder.absolute()
    data = load_data(config.data)
    if len(data.train) < config.train.questions:
        raise DataError(
            f"{len(data.train)} training questions, train.questions = {config.train.questions}: "
            "expected at least as many questions as a step asks"
        )
    if not data.dev:  # verl wants a file of questions all the same; nothing may be called held-out then
        config = config.model_copy(update={"train": config.train.model_copy(update={"evals": 0})})
    source = resolve(config.policy.path, adapters=False)
    check_memory(config, shape_of(source))
    codec = load_codec(source)
    data = fit_prompts(data, codec, config)
    cues = load_cues(config, codec)
    os.environ[MODULES] = ",".join(
        dict.fromkeys([*filter(None, os.environ.get(MODULES, "").split(",")), PLUGIN])
    )
    from verl.plugin.platform import get_platform

    import verl  # noqa: F401 - registers a platform, which a plugin may bring

    check_devices(config, get_platform().device_module.device_count())
    check_attention(config, get_platform().device_name)
    with retriever_service(config, data) as (url, retriever_digest):
        served = config.model_copy(
            update={
                "retriever": config.retriever.model_copy(update={"kind": "remote", "url": url}),
                "policy": config.policy.model_copy(update={"path": model_folder(source, folder)}),
            }
        )
        check_service(served.retriever)
        digests = {
            "train": questions_digest(data.train),
            "dev": questions_digest(data.dev),
            "retriever": retriever_digest,
            "cues": "none" if cues is None else cues.digest,
            "model": digest(*identity(source)),
        }
        tree = compose(served, folder, digests, resume)
        with open_run(folder, config, resume=resume, restart=restart):
            warn_of_overlap(data)
            if resume:
                follow_config(folder, config, check_checkpoint(folder / "checkpoints", digests))
            else:
                write_json(folder / "environment.json", environment(**digests))
            name_architecture(source, folder)
            write_questions(folder / "verl" / "train.jsonl", data.train, config)
            write_questions(folder / "verl" / "dev.jsonl", data.dev or data.train[:1], config)
            run(tree)
    row = last_row(folder / "metrics.jsonl")
    counts = {name: row[name] for name in (*COUNTS, "seconds")}
    return summarise(config, folder, Progress(**counts))


def check_checkpoint(checkpoints: Path, digests: dict[str, str]) -> int:
    """The step of the checkpoint to resume from. Raises CheckpointError for none, or other data or cues."""
    try:
        step = int((checkpoints / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8"))
        file = checkpoints / f"global_step_{step}" / STATE_FILE
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoints}: no checkpoint to resume from: {error}") from None
    for name, then in state["digests"].items():
        if digests.get(name) != then:
            raise CheckpointError(
                f"{file}: the run's '{name}' has changed since this checkpoint "
                f"({then[:12]} then, {digests.get(name, 'nothing')[:12]} now)"
            )
    return step


def run(tree: Any) -> None:
    """verl's own entry, with its own checks. Returns when the training is over."""
    from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    try:
        validate_config(tree, need_reference_policy(tree), need_critic(tree))
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"verl refuses this configuration: {error}") from None
    run_ppo(tree, task_runner_class=TaskRunnerV1)


def model_folder(source: str, folder: Path) -> str:
    """The model's path for verl: the folder or id itself, or one in the run folder (`name_architecture`)."""
    return source if _names_architecture(source) else str(folder / "verl" / "model")


def name_architecture(source: str, folder: Path) -> None:
    """verl needs `architectures` in config.json; where a folder lacks it, link to its files beside one."""
    if _names_architecture(source):
        return
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    with atomic_folder(folder / "verl" / "model") as fresh:
        for file in Path(source).iterdir():
            if file.is_file() and file.name != "config.json":
                (fresh / file.name).symlink_to(file.absolute())
        config.save_pretrained(str(fresh))


def _names_architecture(source: str) -> bool:
    file = Path(source) / "config.json"
    return not file.is_file() or bool(json.loads(file.read_text(encoding="utf-8")).get("architectures"))


def write_questions(file: Path, questions: Sequence[Question], config: Config) -> None:
    """A file in verl's data format."""
    rows = (question_row(question, i, config.agent.template) for i, question in enumerate(questions))
    write_jsonl(file, rows)


@contextmanager
def retriever_service(config: Config, data: Data) -> Iterator[tuple[str, str]]:
    """(address, digest) of the configured service; an index of our own is served here while the run lasts."""
    if config.retriever.kind == "remote":
        yield config.retriever.url, make_retriever(config.retriever).digest
        return
    if config.verl.nodes > 1:
        raise ConfigError(
            f"verl.nodes = {config.verl.nodes}: the other nodes cannot reach an index on this one; start "
            "`rexrag serve` and set retriever.kind = 'remote' and retriever.url"
        )
    retriever = make_retriever(config.retriever, data.corpus)
    with serving(retriever) as url:
        yield url, retriever.digest


@contextmanager
def serving(retriever: Retriever, port: int = 0) -> Iterator[str]:
    """Serve a retriever on this machine's loopback from a thread; yields the address."""
    with listen("127.0.0.1", port) as listening:
        server = Server(create_app(retriever))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/retrieve"
        finally:
            server.should_exit = True
            thread.join()

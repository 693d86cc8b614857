"""From a configuration to the things a run needs: policy, learner, retriever, questions, cue pool."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rexrag.agent.codec import HFCodec
from rexrag.agent.dead_end_judge import JudgeContext, blinded
from rexrag.agent.episode import Codec
from rexrag.agent.lengths import describe, too_long
from rexrag.agent.prompts import TEMPLATES, cue_pool, template_digest
from rexrag.agent.scoring import Scoring
from rexrag.config.algorithms import Probing
from rexrag.config.schema import Config, DataConfig
from rexrag.data.questions import draw_questions, load_questions, questions_digest
from rexrag.data.world.generator import World
from rexrag.engine.base import Learner, Policy
from rexrag.errors import ConfigError, DataError
from rexrag.io import say_once
from rexrag.method.cues import CueTrie
from rexrag.method.dead_ends import Judge
from rexrag.plugins import load_plugin
from rexrag.retrieval import check_service, make_retriever
from rexrag.retrieval.base import Retriever
from rexrag.training.step import StepContext
from rexrag.types import Document, Question

FRESH_WORLD = 1_000_003
"""Distance of a fresh world's seed from that of the world trained in."""


@dataclass(frozen=True, slots=True)
class Data:
    """Questions to train on and to evaluate with, and the corpus (documents, or the path of a file)."""

    train: list[Question]
    dev: list[Question]
    corpus: Sequence[Document] | str


@dataclass(frozen=True, slots=True)
class Components:
    """What a run is made of."""

    step: StepContext
    """Policy, retriever, cue pool, judges: what a step works with."""
    learner: Learner
    data: Data
    initial_policy: Callable[[], Policy] | None = None
    """Loads the weights that the run starts from, for diagnostics."""
    fresh: Data | None = None
    """Questions (`dev`) and corpus of a second fictional world."""
    save_tokenizer: Callable[[Path], object] = lambda folder: None
    """Writes the tokenizer beside the learner's weights, so that a checkpoint is a model folder."""
    model: str = ""
    """Digest of the weights that the run starts from, and that a KL looks back to."""
    template: str = ""
    """Digest of an instruction template in a text file; empty for a named one."""

    @property
    def policy(self) -> Policy:
        return self.step.policy

    @property
    def retriever(self) -> Retriever:
        return self.step.retriever

    @property
    def digests(self) -> dict[str, str]:
        """What a checkpoint is bound to."""
        trie = self.step.trie
        return {
            "train": questions_digest(self.data.train),
            "dev": questions_digest(self.data.dev),
            "retriever": self.retriever.digest,
            "cues": "none" if trie is None else trie.digest,
            **({"model": self.model} if self.model else {}),
            **({"template": self.template} if self.template else {}),
        }


def build(config: Config) -> Components:
    """Load everything a run needs, before anything is written. Raises RexragError with one line."""
    from rexrag.engine.loading import identity, load_engine, load_policy, resolve
    from rexrag.engine.sampling.policy import LocalPolicy

    scoring = Scoring.of(config.agent)
    data = load_data(config.data)
    retriever = make_retriever(config.retriever, data.corpus)
    if config.retriever.kind == "remote":
        check_service(config.retriever)
    policy, learner = load_engine(config)
    check_window(policy, config)
    data = fit_prompts(data, policy.codec, config)
    own = policy
    if learner.mirror is not None or learner.autocast:  # the numbers that the learner's ratios start from
        own = LocalPolicy(learner.model, policy.codec, autocast=learner.autocast)
    judge = dead_end_judge(config, policy)
    codec = policy.codec
    assert isinstance(codec, HFCodec)
    return Components(
        StepContext(policy, retriever, load_cues(config, codec), own, scoring, judge),
        learner,
        data,
        initial_policy=lambda: load_policy(config.policy.model_copy(update={"precision": "float32"})),
        fresh=fresh_world(config.data),
        save_tokenizer=codec.tokenizer.save_pretrained,
        model=hashlib.sha256("\n".join(identity(resolve(config.policy.path))).encode()).hexdigest(),
        template=template_digest(config.agent.template) if config.agent.template not in TEMPLATES else "",
    )


def dead_end_judge(config: Config, policy: Policy | None) -> Judge | None:
    """The judge of `dead_ends = "judge"` as the method calls it; else None.

    policy: scores for the judge where it can. Raises PluginError.
    """
    algorithm = config.algorithm
    if not isinstance(algorithm, Probing) or algorithm.dead_ends != "judge":
        return None
    name = algorithm.dead_end_judge
    judge = load_plugin(name, "algorithm.dead_end_judge", parameters=2)
    return blinded(judge, JudgeContext(score=None if policy is None else policy.score), name)


def check_window(policy: Policy, config: Config) -> None:
    """Has the model positions for whole rollouts? Raises ConfigError."""
    window = getattr(policy, "window", None)
    if window is not None and config.agent.total_tokens > window:
        given = f"agent.total_tokens = {config.agent.total_tokens}"
        raise ConfigError(f"{given}: {config.policy.path} reads {window} tokens at most; set fewer")


def fit_prompts(data: Data, codec: Codec, config: Config) -> Data:
    """The data without questions that are too long, where `data.skip_long` says so; said on standard error.

    Raises DataError that counts and names them where it does not, or where no question is left.
    """
    every = [*data.train, *data.dev]
    long = too_long(every, codec, config.agent)
    if not long:
        return data
    message = describe(long, len(every), config.agent)
    if not config.data.skip_long:
        raise DataError(f"{message}; leave them out with data.skip_long = true, or raise agent.total_tokens")
    out = {question.group for question in long}
    train, dev = ([q for q in part if q.group not in out] for part in (data.train, data.dev))
    if data.train and not train:
        raise DataError(f"{message}; none is left to train on")
    say_once(f"left out: {message}")
    return Data(train, dev, data.corpus)


def load_data(config: DataConfig) -> Data:
    """Files where they are named, else the embedded world. Raises ConfigError, DataError."""
    if not config.train:
        if config.corpus or config.dev:
            raise ConfigError(
                "data.train is empty; give questions to train on, or leave corpus and dev empty too"
            )
        world = World(config.world_seed, config.world_people)
        return Data(
            world.questions("train", config.world_questions),
            world.questions("held-out", config.dev_limit),
            world.documents,
        )
    dev = load_questions(config.dev, split="dev") if config.dev else []
    # Drawn, not the first: a file of several sets in turn would be judged by its first set alone.
    return Data(load_questions(config.train), draw_questions(dev, config.dev_limit), config.corpus)


def fresh_world(config: DataConfig) -> Data | None:
    """A second world of the same size, where `data.fresh_questions` asks for one. Raises ConfigError."""
    if not config.fresh_questions:
        return None
    if config.train:
        raise ConfigError("data.fresh_questions: only the embedded world can be made anew; set it to 0")
    world = World(config.world_seed + FRESH_WORLD, config.world_people)
    return Data([], world.questions("held-out", config.fresh_questions), world.documents)


def load_cues(config: Config, codec: Codec) -> CueTrie | None:
    """The configured cue pool as token ids; None for `none`. Raises ConfigError, CueError."""
    if config.agent.cues == "none":
        return None
    return CueTrie([codec.encode(cue) for cue in cue_pool(config.agent.cues)])

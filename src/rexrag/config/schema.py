"""Configuration: one tree of frozen pydantic models. `files.py` reads and writes it.

Every field is documented where it stands; `docs/paper_map.md` puts the paper's settings beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rexrag.config.algorithms import Algorithm, RexRagDistill

OPEN_TABLE = "overrides"
"""The table of `[verl]` whose keys are verl's own."""
ENDLESS = 10**9
"""Steps of a run that only its budget ends."""
Budget = Literal["rollouts", "generated", "tokens", "time"]
SPENT: dict[Budget, str] = {
    "rollouts": "rollouts",
    "generated": "generated_tokens",
    "tokens": "spent_tokens",
    "time": "seconds",
}
"""Budget of a comparison -> the count in a run's logs that it limits."""
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Below = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


Tracker = Literal["tensorboard", "wandb", "trackio"]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PolicyConfig(Model):
    """The model, and which of its weights train."""

    path: str = "tiny-hard"
    """A Hugging Face id or folder, or a checkpoint shipped in the package: `tiny-hard`, `tiny-middle`,
    `tiny-easy`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: sampler weights, and autocast over the learner's float32 master weights. `auto` is bfloat16
    where the CPU or GPU multiplies in it, with `mismatch_cap` = 2 unless that is set; else float32."""
    device: str = "auto"
    """`auto`: CUDA where there is a GPU, else the CPU."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """0 trains the weights themselves; otherwise a peft LoRA of this rank on all linear layers."""
    train_last_layers: Annotated[int, Field(ge=0)] = 0
    """0 trains all; otherwise only the last n decoder layers and the final norm."""


class DataConfig(Model):
    """Questions and corpus. Without files, the embedded fictional world is generated."""

    train: str = ""
    """Questions to train on: .jsonl, .json, .parquet, .tsv or .csv (docs/guides/own-data.md). Empty: the
    embedded world."""
    dev: str = ""
    """Held-out questions, in the same formats."""
    corpus: str = ""
    """Passages to search: a .jsonl with `contents`, or `title` and `text`."""
    skip_long: bool = False
    """Leave out questions whose prompt fills `agent.total_tokens`, instead of refusing the whole file."""
    world_seed: int = 0
    """Seed of the embedded world."""
    world_people: Count = 120
    """People in the embedded world; other entities grow with them."""
    world_questions: Count = 2000
    """Training questions drawn from the world."""
    dev_limit: Count = 300
    """Questions of a held-out evaluation, drawn once from the file or the embedded world."""
    fresh_questions: Annotated[int, Field(ge=0)] = 0
    """Embedded world only: evaluate this many questions of a second world too, before and after a run."""


class RetrieverConfig(Model):
    """What answers a search."""

    kind: Literal["bm25", "bm25-disk", "bm25-fast", "dense", "hybrid", "remote", "plugin"] = "bm25"
    """How passages are searched. `bm25` needs only the corpus, `remote` a URL, `plugin` its name; the others
    need an index."""
    plugin: str = ""
    """For `plugin`: "my_package.module:name" of a retriever, or of a function () -> retriever."""
    url: str = ""
    """Address of a Search-R1 `/retrieve` service, for `remote`."""
    index: str = ""
    """A saved index folder of this kind; empty builds a bm25 index in memory from the corpus."""
    encoder: str = ""
    """Folder or hub id of the encoder of a dense or hybrid index. Empty: as when the index was built."""
    topk: Count = 3
    """Documents shown for a search."""
    timeout: Positive = 30.0
    """Seconds to wait for an answer of a remote service."""
    retries: Annotated[int, Field(ge=0)] = 8
    """Retries of a failed request to a remote service; pauses double from half a second up to 30 s."""


class AgentConfig(Model):
    """The episode: prompt, protocol and limits."""

    template: str = "search-r1"
    """Instruction: `search-r1`, `search-first`, `terse`, `direct`, or your own text file (`mine.txt`) with
    `{question}` in it."""
    search_turns: Count = 5
    """Search turns at most. One more turn follows in which a search is not run."""
    turn_tokens: Count = 500
    """Tokens that the policy may sample in a turn."""
    evidence_tokens: Count = 500
    """Tokens of documents shown after a search."""
    total_tokens: Count = 4096
    """Tokens of prompt and response together, at most."""
    temperature: Positive = 1.0
    """Sampling temperature of training; held-out evaluations are greedy."""
    cues: str = "default"
    """Cue pool: `default`, `small-5`, `small-15`, `tiny`; your own text file (`doubts.txt`) with one cue a
    line; or `none`: probes continue without a cue."""
    reward: str = "em"
    """`em`, `f1`, or a plug-in "my_package.module:function", (Rollout) -> float."""
    answer_judge: str = "em"
    """The judge that decides whether an answer is correct: `em` (exact match), or a plug-in
    "my_package.module:function", (answer, Question) -> bool."""
    protocol: str = "tags"
    """How searches, evidence and answers are written: `tags`, or a plug-in "my_package.module:Protocol"."""


class LearnerConfig(Model):
    """Optimizer and batches of an update."""

    lr: Positive = 3e-4
    """Learning rate of AdamW."""
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    """Steps in which the learning rate rises to `lr`."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight decay of AdamW."""
    betas: tuple[Below, Below] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    grad_clip: Positive = 1.0
    """A gradient with a larger norm is scaled down to this norm."""
    minibatches: Count = 1
    """Optimizer updates a step, whatever the number of probes."""
    micro_tokens: Count = 16384
    """Tokens in one forward and backward pass; changes memory, not the loss."""


class TrainConfig(Model):
    """A run: its length, budget, evaluations, checkpoints and logs."""

    steps: Count = 60
    """Steps at most."""
    questions: Count = 32
    """Questions a step."""
    max_generated: Annotated[int, Field(ge=0)] = 0
    """Stop after this many generated tokens, those of filtered probes included. 0: no limit."""
    max_tokens: Annotated[int, Field(ge=0)] = 0
    """Stop after this many tokens that the sampling model generated or read (prompts, evidence, cues, rows
    scored again). 0: no limit."""
    max_rollouts: Annotated[int, Field(ge=0)] = 0
    """Stop after this many rollouts; a probe counts as one, kept or not. 0: no limit."""
    max_seconds: Annotated[float, Field(ge=0.0)] = 0.0
    """Stop after this many seconds of steps; evaluations and checkpoints do not count. 0: no limit."""
    evals: Annotated[int, Field(ge=0)] = 1
    """Held-out evaluations, spread evenly over the run, the last at its end; one more comes before it."""
    save_every: Count = 20
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Count = 2
    """Only this many newest checkpoints are kept."""
    diagnose_every: Annotated[int, Field(ge=0)] = 0
    """Measure gradient norms by segment and the KL to the initial checkpoint every so many steps; 0: never.
    The cost is not in the budget."""
    log_rollouts: Annotated[int, Field(ge=0)] = 32
    """Rollouts written per step; probes and their parents first."""
    control: str = ""
    """A second algorithm trained from the same initial checkpoint and shown beside the first, e.g. `grpo`."""
    callbacks: tuple[str, ...] = ()
    """Plug-ins "my_package.module:name", called at each event of a run (see `training.callbacks`)."""
    track: tuple[Tracker, ...] = ()
    """Loggers that get the run's numbers too, for example ["tensorboard"]; `pip install -e '.[track]'`."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Torch threads; 0 leaves torch's choice."""


class WarmupConfig(Model):
    """`rexrag warmup`: supervised training that teaches a pretrained model the protocol."""

    epochs: Count = 2
    """Passes over the demonstrations."""
    batch: Count = 16
    """Demonstrations an update."""
    lr: Positive = 1e-4
    """Learning rate."""
    demonstrations: Annotated[int, Field(ge=0)] = 0
    """Demonstrations at most, in a round; 0 takes all."""
    evidence_weight: Unit = 0.0
    """Weight of evidence tokens in the loss; 0 masks them."""
    recovery: Unit = 0.5
    """Share of the chains with a second demonstration: a conclusion, a doubt, the rest of the chain."""


Scalar = bool | int | float | str


class VerlConfig(Model):
    """`engine = "verl"`: machines, memory, and any key of verl's own configuration."""

    nodes: Count = 1
    """Machines."""
    gpus_per_node: Count = 8
    """GPUs of each machine."""
    gpu_memory: Positive = 80.0
    """GiB of one GPU; the run is refused where the estimate does not fit."""
    rollout: Literal["vllm", "sglang"] = "vllm"
    """The engine that samples."""
    tensor_parallel: Count = 1
    """GPUs that share one copy of the rollout engine."""
    rollout_memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of a GPU's memory that the rollout engine takes while it generates."""
    prompt_tokens: Count = 1024
    """Longest prompt."""
    tokens_per_gpu: Count = 16384
    """Tokens of one training micro-batch on one GPU."""
    offload: bool = False
    """Keep parameters and optimizer state in the host's memory while the rollout engine runs."""
    agent_workers: Count = 8
    """Processes that drive episodes."""
    search_batch: Count = 64
    """Queries in one request to the retriever, at most."""
    search_connections: Count = 4
    """Requests to the retriever in flight at once, from each agent worker."""
    loggers: tuple[str, ...] = ("console",)
    """verl's loggers: console, tensorboard, wandb, …"""
    overrides: dict[str, Scalar | list[Scalar]] = {}
    """Any key of verl's own tree, as `"actor_rollout_ref.rollout.enforce_eager" = true`; these win. A key
    that verl's tree lacks begins with "+". The text "null" is verl's null, which TOML cannot spell."""

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, tree: Any) -> Any:
        """Nested tables of overrides are dotted keys; both spellings are the same."""
        if isinstance(tree, dict) and isinstance(tree.get("overrides"), dict):
            return {**tree, "overrides": dict(_dotted(tree["overrides"]))}
        return tree


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class Config(Model):
    """A whole run."""

    name: str = "run"
    """Name of the run; its folder is `runs/<name>` unless `--out` says otherwise."""
    arm: str = ""
    """Label of the run in tables: the arm of a comparison. Empty: the algorithm's name."""
    seed: int = 0
    """Seed of all random draws. The same seed on the same machine gives the same run."""
    engine: Literal["local", "verl"] = "local"
    """`local`: this process. `verl`: several GPUs, by verl."""
    policy: PolicyConfig = PolicyConfig()
    data: DataConfig = DataConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    agent: AgentConfig = AgentConfig()
    algorithm: Algorithm = RexRagDistill()
    learner: LearnerConfig = LearnerConfig()
    train: TrainConfig = TrainConfig()
    warmup: WarmupConfig = WarmupConfig()
    verl: VerlConfig = VerlConfig()

    @property
    def label(self) -> str:
        """What tables call this run."""
        return self.arm or self.algorithm.name

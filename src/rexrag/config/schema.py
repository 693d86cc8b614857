"""Configuration: one tree of frozen pydantic models. `config_io.py` reads and writes it.

Every field is documented where it stands; `docs/paper_map.md` puts the paper's settings beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rexrag.types import DeadEnd

OPEN_TABLE = "overrides"
"""The one table, of `verl`, whose keys are not ours."""
ENDLESS = 10**9
"""Steps of a run that only its budget ends."""
Budget = Literal["rollouts", "generated", "tokens", "time"]
SPENT: dict[Budget, str] = {
    "rollouts": "rollouts",
    "generated": "generated_tokens",
    "tokens": "spent_tokens",
    "time": "seconds",
}
"""What arms of a comparison spend alike -> the count in a run's logs that it limits."""
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Below = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


Tracker = Literal["tensorboard", "wandb", "trackio"]


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PolicyConfig(Model):
    """Which weights, and which of them train."""

    path: str = "embedded"
    """A Hugging Face id or folder, or a start shipped in the package: `embedded` (the hard one),
    `embedded-middle`, `embedded-easy`."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16: sampler weights, and autocast over the learner's float32 master weights. `auto` is bfloat16
    where the CPU or GPU multiplies in it, with `mismatch_cap` = 2 unless that is set; else float32."""
    device: str = "auto"
    """`auto` takes CUDA where there is one."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """0 trains the weights themselves; otherwise a peft LoRA of this rank on all linear layers."""
    train_last_layers: Annotated[int, Field(ge=0)] = 0
    """0 trains all; otherwise only the last n decoder layers and the final norm."""


class DataConfig(Model):
    """Questions and corpus. `world` generates the embedded fictional world instead of reading files."""

    train: str = ""
    """Questions: .jsonl or .parquet, plain or Search-R1 rows. Empty: the embedded world."""
    dev: str = ""
    corpus: str = ""
    world_seed: int = 0
    world_people: Count = 120
    world_questions: Count = 2000
    """Training questions drawn from the world."""
    dev_limit: Count = 300
    """Questions of a held-out evaluation, drawn from the file (or the embedded world), always the same."""
    fresh_questions: Annotated[int, Field(ge=0)] = 0
    """Embedded world only: this many questions of a second world are asked too, before and after a run."""


class RetrieverConfig(Model):
    """Who answers a search."""

    kind: Literal["bm25", "bm25-disk", "bm25-fast", "dense", "hybrid", "remote"] = "bm25"
    url: str = ""
    """Address of a Search-R1 `/retrieve` service, for `remote`."""
    index: str = ""
    """A saved index folder of this kind; empty builds a bm25 index in memory from the corpus."""
    encoder: str = ""
    """Where the encoder of a dense or hybrid index is, if not where it was when the index was built."""
    topk: Count = 3
    timeout: Positive = 30.0
    retries: Annotated[int, Field(ge=0)] = 8
    """Pauses double from half a second up to 30 s: eight of them sit out a service that is away for 45 s."""


class AgentConfig(Model):
    """The episode: how an agent talks, and how long."""

    template: str = "search-r1"
    """Name of an instruction template in `agent/prompts.py`."""
    search_turns: Count = 5
    """B. One more turn follows in which a search is not run."""
    turn_tokens: Count = 500
    evidence_tokens: Count = 500
    total_tokens: Count = 4096
    """Prompt + response."""
    temperature: Positive = 1.0
    reward: Literal["em", "f1"] = "em"
    format_reward: Unit = 0.0
    """Given to a wrong rollout whose tags are well-formed."""


class MethodConfig(Model):
    """Every switch of the method. METHOD names in brackets."""

    rollouts: Count = 5
    """N base rollouts a question."""
    probe: bool = True
    """False is plain GRPO."""
    probe_probability: Unit = 0.2
    """p: chance that a dead end is probed."""
    probe_target: Unit = 0.0
    """Above 0: p falls in proportion once fewer of the recent probes than this are right."""
    dead_ends: tuple[DeadEnd, ...] = (DeadEnd.WRONG,)
    probe_forced_turn: bool = False
    """Probe answers given in the forced last turn too."""
    probe_groups: Literal["all", "all-wrong"] = "all"
    """Probe every group's dead ends, or only where no rollout of the group was right."""
    dynamic_sampling: Annotated[int, Field(ge=0)] = 0
    """DAPO: ask up to this many more batches of questions until as many groups as a step has questions
    differ in reward, and train on those only; 0 trains on what was drawn."""
    cues: str = "default"
    """Name of a cue pool; your own, a text file (`doubts.txt`) with one a line; or `none`: cut and continue
    without a cue."""

    filter: Literal["cue-logp", "none", "random", "right"] = "cue-logp"
    """What is kept: the most plausible cues, all, any, right probes first, or right probes alone."""
    keep_per_group: Annotated[int, Field(ge=0)] = 0
    """At most this many kept probes of one question; 0 is no limit."""
    keep: Literal["fixed", "adaptive"] = "fixed"
    keep_ratio: Unit = 0.08
    """ρ: kept probes per base rollout; the cap when adaptive."""
    keep_floor: Unit = 0.02
    """Adaptive ρ never falls below this."""
    keep_momentum: Unit = 0.1

    realignment: Literal["paper", "trajectory", "internalize", "none"] = "paper"
    cue_density: Literal["fine", "coarse"] = "fine"
    tail: Literal["one", "truncated", "unclipped"] = "one"
    """internalize: weight of the spliced continuation. one: that of any token, clipped. truncated: its ratio
    to the density that wrote it, after the cue, at most `tail_cap`. unclipped: 1, also where the policy has
    moved towards it since the rollout (and its ratio, at most `tail_cap` = 1, where it moved away): the
    decision to go on is too rare for a clip of 20 % a step."""
    tail_cap: Positive = 1.0
    cue_loss: Literal["all", "first", "none"] = "all"
    prefix_loss: Literal["all", "none"] = "all"
    """none: what a probe took over from its base rollout (o′) is trained in the base rollout's row alone, and
    gets no credit for how the probe went on."""
    alpha: Literal["batch", "group"] = "batch"
    failure_rate: Literal["batch", "question"] = "batch"
    allow_large_alpha: bool = False
    """Go on when alpha is so large that every positive base token is clipped at once."""

    advantage_scale: Literal["std", "none"] = "std"
    advantage_baseline: Literal["mean", "leave-one-out"] = "mean"
    clip_low: Unit = 0.2
    clip_high: Positive = 0.2
    aggregation: Literal["token-mean", "sequence-mean", "sequence-sum"] = "token-mean"
    kl: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the k3 KL to the reference model in the loss; the paper uses 0.001."""
    mismatch_cap: Annotated[float, Field(ge=0.0)] = 0.0
    """Truncation of the separate sampler-mismatch weight; 0 takes the sampler's log-probs as π_old."""

    @model_validator(mode="after")
    def _check(self) -> MethodConfig:
        if self.keep == "adaptive" and self.keep_floor > self.keep_ratio:
            raise ValueError(f"keep_floor {self.keep_floor} is above keep_ratio {self.keep_ratio}")
        if self.realignment == "trajectory" and self.cues == "none" and self.probe:
            raise ValueError("realignment 'trajectory' needs cues: a continuation without one has no density")
        if self.mismatch_cap and self.realignment == "internalize" and self.tail == "truncated":
            raise ValueError(
                "mismatch_cap and a truncated internalized tail would correct the same tokens twice"
            )
        return self


class LearnerConfig(Model):
    lr: Positive = 3e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Below, Below] = (0.9, 0.95)
    grad_clip: Positive = 1.0
    minibatches: Count = 1
    """Optimizer updates a step, whatever the number of probes."""
    micro_tokens: Count = 16384
    """Tokens in one forward and backward pass; changes memory, not the loss."""


class TrainConfig(Model):
    steps: Count = 60
    questions: Count = 32
    """Questions a step."""
    max_generated: Annotated[int, Field(ge=0)] = 0
    """Stop when this many tokens were generated; those of filtered probes count. 0 is no limit."""
    max_tokens: Annotated[int, Field(ge=0)] = 0
    """Stop when the sampling model has run this many tokens: generated ones, and all that it had to read
    (prompts, evidence, cues, rows scored again)."""
    max_rollouts: Annotated[int, Field(ge=0)] = 0
    """Stop when this many rollouts were drawn; a probe counts as one, kept or not."""
    max_seconds: Annotated[float, Field(ge=0.0)] = 0.0
    """Stop when steps have taken this long; evaluations and checkpoints do not count."""
    evals: Annotated[int, Field(ge=0)] = 1
    """Held-out evaluations spread evenly over the run, beside the one before it; the last is at the end."""
    save_every: Count = 20
    keep_checkpoints: Count = 2
    diagnose_every: Annotated[int, Field(ge=0)] = 0
    """Measure gradient norms by segment and the KL to the start every so many steps (not in the budget)."""
    log_rollouts: Annotated[int, Field(ge=0)] = 32
    """Rollouts written per step; probes and their parents first."""
    control: str = ""
    """A second arm trained from the same start and shown beside the first, e.g. `grpo`."""
    track: tuple[Tracker, ...] = ()
    """Loggers that get the run's numbers too, for example ["tensorboard"]; `pip install -e '.[track]'`."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Torch threads; 0 leaves torch's choice."""


class WarmupConfig(Model):
    """`rexrag warmup`: supervised demonstrations that teach a pretrained model the protocol."""

    epochs: Count = 2
    batch: Count = 16
    lr: Positive = 1e-4
    demonstrations: Annotated[int, Field(ge=0)] = 0
    """At most this many; 0 takes every question whose chain the rule finds."""
    evidence_weight: Unit = 0.0
    recovery: Unit = 0.5
    """Share of the chains that are shown once more: a conclusion, a doubt, and the right way on."""


Scalar = bool | int | float | str


class VerlConfig(Model):
    """`engine = "verl"`: machines, memory, and anything else of verl's own configuration."""

    nodes: Count = 1
    gpus_per_node: Count = 8
    gpu_memory: Positive = 80.0
    """GiB of one GPU; the run is refused where the estimate does not fit."""
    gpu_tflops: Positive = 989.0
    """Dense bfloat16 peak of one GPU, for the estimated time of a step (989: H100 SXM)."""
    gpu_bandwidth: Positive = 3350.0
    """GB/s of one GPU's memory, for the estimated time of a step (3350: H100 SXM)."""
    rollout: Literal["vllm", "sglang"] = "vllm"
    tensor_parallel: Count = 1
    """GPUs that share one copy of the rollout engine."""
    rollout_memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Share of a GPU's memory that the rollout engine takes while it generates."""
    prompt_tokens: Count = 1024
    """Longest prompt."""
    tokens_per_gpu: Count = 16384
    """Tokens of one training micro-batch on one GPU."""
    offload: bool = False
    """Keep parameters and optimizer in the host's memory while the rollout engine runs."""
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
    arm: str = ""
    """Name of the preset under `configs/arms` that was laid over this configuration; for the record."""
    seed: int = 0
    engine: Literal["local", "verl"] = "local"
    policy: PolicyConfig = PolicyConfig()
    data: DataConfig = DataConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    agent: AgentConfig = AgentConfig()
    method: MethodConfig = MethodConfig()
    learner: LearnerConfig = LearnerConfig()
    train: TrainConfig = TrainConfig()
    warmup: WarmupConfig = WarmupConfig()
    verl: VerlConfig = VerlConfig()

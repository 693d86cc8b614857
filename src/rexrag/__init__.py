"""Train search agents that explore beyond dead ends: REX-RAG (arXiv 2508.08149).

    run = rexrag.train("quickstart", out="runs/nb")
    agent = rexrag.load_agent("runs/nb")
    agent.ask("Who is married to Clara Nyberg?").answer
    rexrag.evaluate(agent, "dev.jsonl", strategies=["agent", "reflect"]).to_pandas()
    rexrag.compare(["grpo", "rex-rag", "rex-rag-distill"], seeds=6).report()

Names are imported when they are first used: `import rexrag` loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_WHERE = {
    "Agent": "rexrag.api.agents",
    "Answer": "rexrag.evaluation.ask",
    "BlindRollout": "rexrag.agent.dead_end_judge",
    "Comparison": "rexrag.api.comparisons",
    "Config": "rexrag.config.schema",
    "Document": "rexrag.types",
    "Evaluation": "rexrag.api.evaluations",
    "JudgeContext": "rexrag.agent.dead_end_judge",
    "Probe": "rexrag.types",
    "Question": "rexrag.types",
    "RexragError": "rexrag.errors",
    "Rollout": "rexrag.types",
    "RolloutGroup": "rexrag.types",
    "Run": "rexrag.api.runs",
    "Trainer": "rexrag.api.runs",
    "compare": "rexrag.api.comparisons",
    "evaluate": "rexrag.api.evaluations",
    "load_agent": "rexrag.api.agents",
    "load_config": "rexrag.api.runs",
    "train": "rexrag.api.runs",
}
"""Public name -> the module that defines it."""
__all__ = [
    "Agent",
    "Answer",
    "BlindRollout",
    "Comparison",
    "Config",
    "Document",
    "Evaluation",
    "JudgeContext",
    "Probe",
    "Question",
    "RexragError",
    "Rollout",
    "RolloutGroup",
    "Run",
    "Trainer",
    "__version__",
    "compare",
    "evaluate",
    "load_agent",
    "load_config",
    "train",
]

if TYPE_CHECKING:
    from rexrag.agent.dead_end_judge import BlindRollout, JudgeContext
    from rexrag.api.agents import Agent, load_agent
    from rexrag.api.comparisons import Comparison, compare
    from rexrag.api.evaluations import Evaluation, evaluate
    from rexrag.api.runs import Run, Trainer, load_config, train
    from rexrag.config.schema import Config
    from rexrag.errors import RexragError
    from rexrag.evaluation.ask import Answer
    from rexrag.types import Document, Probe, Question, Rollout, RolloutGroup


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rexrag' has no attribute {name!r}")
    value = getattr(import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

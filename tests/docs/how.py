"""How each command of the docs is run by its test, or why it is only parsed."""

# ruff: noqa: E501 (a command stands here as its page prints it)

from __future__ import annotations

from dataclasses import dataclass

MODEL = "needs a model of a hub"
GPUS = "needs several GPUs"
LONG = "takes hours"
MINUTES = "takes minutes"
SERVER = "needs a server of completions"
OTHER_ADDRESS = "listens beyond loopback"
OTHER = "needs another program"
TARGET = "a target of the Makefile"
INSTALL = "installs packages"


@dataclass(frozen=True)
class Run:
    """Run the command with these words after it; `swaps` replaces words first."""

    more: str = ""
    swaps: tuple[tuple[str, str], ...] = ()
    serves: bool = False
    """It listens until it is told to stop."""
    asks: bool = False
    """It asks a retriever at RETRIEVER; a served index takes its place."""


RETRIEVER = "http://127.0.0.1:8000"
SMALL = (
    " --set train.steps=2 --set train.questions=4 --set data.dev_limit=8 --set train.evals=1"
    " --set learner.minibatches=1"
)
OWN = (
    " --set policy.path=tiny-hard --set agent.template=terse --set agent.total_tokens=512 --set agent.turn_tokens=48"
    " --set agent.evidence_tokens=120" + SMALL
)
FEW = " --limit 4 --no-audit"
TERSE = " --set agent.template=terse --set agent.total_tokens=512"
HOW: dict[str, Run | str] = {
    "make quickstart": TARGET,
    "make test": TARGET,
    "make check": TARGET,
    "make test-slow": TARGET,
    "make test-dense": TARGET,
    "make test-verl": TARGET,
    "make format": TARGET,
    "make real DATA=FOLDER": TARGET,
    "rexrag train smollm2-2wiki --algorithm rex-rag": MODEL,
    ". .venv/bin/activate": OTHER,
    'rexrag ask "Who leads the company that Clara Nyberg works for?" --policy runs/quickstart': Run(),
    'rexrag ask "Who leads the company that Clara Nyberg works for?" --policy tiny-hard': Run(),
    "rexrag compare --arms grpo,rex-rag-distill,rex-rag": Run(
        "--seeds 2 --evals 1 --amount 1500 --out runs/readme --jobs 1" + SMALL
    ),
    "rexrag eval --policy runs/quickstart --strategy agent,reflect": Run(FEW),
    "rexrag doctor": Run(),
    "python -m rexrag.theory.bias": Run("--horizon 6 --rollouts 2 --json"),
    "rexrag train --resume --out runs/quickstart": Run(),
    "rexrag compare --arms grpo,rex-rag-distill,rex-rag --seeds 10 --first-seed 21 --evals 4 --budget generated --amount 60000 --set policy.path=tiny-hard --out runs/hard": LONG,
    "python benchmarks/arms.py experiments/results/hard.jsonl": Run(),
    "python benchmarks/arms.py experiments/results/hard-rates-new-seeds.jsonl --control grpo-lr45 --along 15000,30000,45000,60000": Run(),
    "python benchmarks/arms.py experiments/results/hard-tokens.jsonl": Run(),
    "python benchmarks/rollout.py --rounds 11 --rollouts 64,256 --group 4 --trl-python TRL --vllm-python VLLM": OTHER,
    "python benchmarks/rollout.py --model MODEL --data DATA --rollouts 32 --group 4 --trl-python TRL --vllm-python VLLM": OTHER,
    "python benchmarks/probe.py --rounds 9 --group 4": MINUTES,
    "python benchmarks/learn.py": MINUTES,
    "python benchmarks/learn.py --model MODEL --data DATA --questions 1 --rounds 3": MODEL,
    "python benchmarks/step.py --no-growth": MINUTES,
    "python benchmarks/step.py --only-growth --sweeps rollouts,turns,length,model": LONG,
    "python benchmarks/method.py": MINUTES,
    "python benchmarks/retrieve.py --sizes 12000,200000,1000000 --queries 320": LONG,
    "python benchmarks/retrieve.py --corpus grown-1000000.jsonl --questions 2wiki/train.jsonl --engines seismic --queries 640 --topk 3": LONG,
    'rexrag retrieve "Who is the mayor of Larkin?" --corpus corpus.jsonl': Run(),
    "rexrag eval --policy tiny-hard --data dev.jsonl --corpus corpus.jsonl --limit 8": Run(),
    "rexrag train own-data --set policy.path=Qwen/Qwen2.5-0.5B-Instruct --set data.train=train.jsonl --set data.dev=dev.jsonl --set data.corpus=corpus.jsonl --out runs/mine": MODEL,
    "cp configs/own-data.toml mine.toml": Run(),
    "rexrag train mine.toml --algorithm grpo --out runs/mine-grpo": Run(OWN),
    "rexrag train own-data --set policy.path=tiny-hard --set agent.template=terse --set agent.total_tokens=512 --set data.train=train.jsonl --set data.dev=dev.jsonl --set data.corpus=corpus.jsonl --set train.steps=2 --out runs/try": Run(
        SMALL
    ),
    "rexrag warmup mine.toml --demonstrations demos.jsonl --out models/warm": Run(OWN),
    "rexrag warmup mine.toml --from-rollouts --out models/warm": Run(
        "--questions 12 --rollouts 4" + OWN, swaps=(("models/warm", "models/own"),)
    ),
    "rexrag train mine.toml --set policy.path=models/warm --out runs/mine-warm": MODEL,
    "rexrag train mine.toml --set agent.cues=doubts.txt --out runs/mine-cues": Run(OWN),
    "rexrag train --resume --out runs/mine": Run(swaps=(("runs/mine", "runs/quickstart"),)),
    "rexrag report runs/mine --out mine.html": Run(swaps=(("runs/mine", "runs/quickstart"),)),
    "rexrag train own-data --set policy.path=Qwen/Qwen2.5-0.5B-Instruct --out runs/qwen": MODEL,
    "rexrag eval --policy models/mine --data dev.jsonl --corpus corpus.jsonl": Run(
        FEW + TERSE, swaps=(("models/mine", "models/copy"),)
    ),
    "rexrag model import SmolLM2-135M-Instruct.Q4_1.gguf --out models/smollm2-135m": MODEL,
    "rexrag eval --policy Qwen/Qwen2.5-0.5B-Instruct --data dev.jsonl --corpus corpus.jsonl --limit 50": MODEL,
    "rexrag train own-data --set policy.path=Qwen/Qwen2.5-0.5B-Instruct --set policy.lora_rank=32 --set learner.lr=1e-5 --out runs/lora": MODEL,
    'rexrag ask "Who is the mayor of Larkin?" --policy runs/quickstart': Run(),
    "rexrag eval --policy runs/quickstart --data dev.jsonl --corpus corpus.jsonl": Run(FEW),
    "rexrag model export runs/quickstart --out models/trained": Run(),
    "rexrag train quickstart --set agent.reward=examples.reward:reward --out runs/reward": Run(SMALL),
    "rexrag score traces.jsonl --rows": Run(),
    "rexrag train quickstart --set agent.cues=examples/cue_pool.txt --out runs/mine": Run(SMALL),
    "rexrag index build corpus.jsonl --out indexes/wiki": Run(swaps=(("indexes/wiki", "indexes/again"),)),
    'rexrag retrieve "capital of France" --index indexes/wiki -k 5': Run(),
    "rexrag index check indexes/wiki": Run(),
    "rexrag serve indexes/wiki": Run("--port 0", serves=True),
    "rexrag index build corpus.jsonl --out indexes/disk --kind bm25-disk": Run(),
    "rexrag index build corpus.jsonl --out indexes/e5 --kind dense --encoder intfloat/e5-base-v2 --ann hnsw": MODEL,
    "rexrag index build corpus.jsonl --out indexes/both --kind hybrid --encoder intfloat/e5-base-v2": MODEL,
    "rexrag eval --policy runs/quickstart --data dev.jsonl --index indexes/wiki": Run(FEW),
    "rexrag index build corpus.jsonl --out indexes/wiki --kind bm25-disk --dry-run": Run(
        swaps=(("indexes/wiki", "indexes/dry"),)
    ),
    "rexrag serve indexes/wiki --port 8000": Run(swaps=(("8000", "0"),), serves=True),
    'rexrag retrieve "capital of France" --url http://127.0.0.1:8000': Run(asks=True),
    'curl -X POST http://127.0.0.1:8000/retrieve -H "Content-Type: application/json" -d \'{"queries": ["capital of France"], "topk": 3, "return_scores": true}\'': Run(
        asks=True
    ),
    "rexrag train mine.toml --set retriever.kind=remote --set retriever.url=http://127.0.0.1:8000": Run(
        OWN + " --out runs/remote", asks=True
    ),
    "REXRAG_RETRIEVER_TOKEN=a-long-secret-of-your-own rexrag serve indexes/wiki --host 0.0.0.0": OTHER_ADDRESS,
    "python -m vllm.entrypoints.openai.api_server --model models/trained --dtype float32 --max-model-len 1024 --port 8011": OTHER,
    "rexrag eval quickstart --policy http://127.0.0.1:8011/v1 --tokenizer models/trained": SERVER,
    "rexrag eval --policy runs/quickstart --strategy agent,reflect,direct": Run(FEW),
    "rexrag eval --policy tiny-hard --limit 50": Run(FEW, swaps=((" --limit 50", ""),)),
    "rexrag eval --policy Qwen/Qwen2.5-3B --data FOLDER --index indexes/wiki --limit 500": MODEL,
    "rexrag eval --policy http://127.0.0.1:8000/v1 --data FOLDER --retriever http://127.0.0.1:8001": SERVER,
    "rexrag eval --policy runs/quickstart --out runs/eval/a": Run(FEW),
    "rexrag eval quickstart --policy tiny-hard --out runs/eval/b --against runs/eval/a": Run(
        FEW + " --set data.dev_limit=8"
    ),
    "rexrag eval --show runs/eval/b --against runs/eval/a": Run(),
    "rexrag compare --arms grpo,rex-rag-distill --seeds 10 --budget generated --amount 60000 --out runs/compare": Run(
        "--seeds 2 --amount 1500 --evals 1 --jobs 1" + SMALL
    ),
    "rexrag train quickstart --set policy.device=auto --out runs/gpu": Run(SMALL),
    "rexrag train own-data --set policy.path=Qwen/Qwen2.5-0.5B-Instruct --set policy.precision=bfloat16 --out runs/bfloat16": MODEL,
    "pip install -e '.[verl]'": INSTALL,
    "pip install 'verl[vllm,fsdp]==0.9.1'": INSTALL,
    "rexrag train qwen2.5-3b-nq-hotpot --dry-run": MODEL,
    "rexrag train qwen2.5-3b-nq-hotpot": GPUS,
    "rexrag model export runs/qwen2.5-3b-nq-hotpot --out models/rex-3b --dtype bfloat16": GPUS,
    "rexrag train qwen2.5-3b-lora-24gb --dry-run": MODEL,
    "ray start --head": GPUS,
    "ray start --address=HEAD:6379": GPUS,
    "RAY_ADDRESS=HEAD:6379 rexrag train qwen2.5-7b-nq-hotpot --set verl.nodes=2": GPUS,
}
"""A command as the page has it -> how it is run here, or why it is only parsed."""

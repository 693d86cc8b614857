#!/usr/bin/env bash
# The cold start of experiments/LOG.md, from the repository's root: run.sh MODEL_FOLDER DATA_FOLDER OUT_FOLDER
# DATA_FOLDER holds corpus.jsonl, train.jsonl, dev.jsonl. A killed evaluation goes on where it stopped.
set -euo pipefail
model=$1 data=$2 out=$3
here=experiments/results/cold-start
set_data=(--set "data.train=$data/train.jsonl" --set "data.dev=$data/dev.jsonl" --set "data.corpus=$data/corpus.jsonl")
# One thread: on a shared machine two threads wait for each other most of the time.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

evaluate() {  # NAME TEMPLATE MODEL
  rexrag eval "$here/nq.toml" "${set_data[@]}" --policy "$3" --set "agent.template=$2" \
    --no-audit --batch 32 --out "$out/$1"
}

evaluate zero-search-r1 search-r1 "$model"
evaluate zero-search-first search-first "$model"
rexrag warmup "$here/nq.toml" "${set_data[@]}" --set "policy.path=$model" --set agent.template=search-first \
  --set agent.temperature=0.6 --from-rollouts --rounds 1 --questions 48 --rollouts 4 --out "$out/model" | tee "$here/rounds.txt"
evaluate after-round-1 search-first "$out/model"
python "$here/figures.py" zero-search-r1="$out/zero-search-r1" zero-search-first="$out/zero-search-first" \
  after-round-1="$out/after-round-1" | tee "$here/figures.jsonl"

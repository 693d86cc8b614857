# Two commands are enough: `make quickstart` trains, `make test` tests. Both make .venv on first use.
#
# On Linux without a GPU, PyTorch's own CPU wheel index saves some GB of downloads:
#   make quickstart PIP_ARGS="--extra-index-url <the CPU wheel index named on pytorch.org>"

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test test-slow check format bias benchmark clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rexrag needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[test]"
	touch $(STAMP)

quickstart: $(STAMP)  ## train on the embedded world, evaluate, write a page
	$(BIN)/rexrag train --out runs/quickstart

test: $(STAMP)  ## the fast tests
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## the slow tests too
	$(BIN)/python -m pytest -m "slow or not slow"

check: $(STAMP)  ## linter, formatter, type checker, tests
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(STAMP)
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

bias: $(STAMP)  ## exact bias of every estimator
	$(BIN)/python -m rexrag.method.bias

benchmark: $(STAMP)
	$(BIN)/python benchmarks/method.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info

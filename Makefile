# `make demo` and `make test` do all the set-up on a fresh machine: Python 3.11 or newer is all that they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(BIN)/.dev: $(BIN)/.core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(BIN)/.core  ## build a replay set from sixteen real tasks, offline, on a CPU
	$(BIN)/curate build examples/superni/config.yaml
	$(BIN)/curate check runs/superni
	@echo; echo "Why is a row in the set? (curate explain RUN UID)"; echo
	@$(BIN)/curate explain runs/superni "$$($(BIN)/python -c 'import polars as p; print(p.read_parquet("runs/superni/samples.parquet").filter(origin="replay")["uid"][0])')"

test: $(BIN)/.dev lint  ## lint, type-check and run every test
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: $(BIN)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs

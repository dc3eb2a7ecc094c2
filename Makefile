# `make demo` and `make test` do all the set-up on a fresh machine: Python 3.11 or newer is all that they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint notebooks bench clean

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

demo: $(BIN)/.core  ## every stage on eighteen real tasks with a small real model, offline, on a CPU
	$(BIN)/curate build examples/demo/config.yaml
	$(BIN)/curate check runs/demo
	@echo; echo "Why is a row in the set, and what did the policy make of it? (curate explain RUN UID)"; echo
	@$(BIN)/curate explain runs/demo "$$($(BIN)/python -c 'import polars as p; print(p.read_parquet("runs/demo/completions.parquet").filter(p.col("origin") == "policy", p.col("stage") == 4).sort("reward", descending=True)["prompt_uid"][0])')"

test: $(BIN)/.dev lint  ## lint, type-check and run every test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

lint: $(BIN)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(BIN)/.dev  ## execute the notebooks in place
	$(BIN)/python notebooks/execute.py

bench: $(BIN)/.dev  ## run every benchmark against its peer, into benchmarks/RESULTS.md; ONLY=a,b DATA=folder LIST=1
	$(BIN)/python benchmarks/bench.py $(if $(ONLY),--only '$(ONLY)') $(if $(DATA),--data '$(DATA)') $(if $(LIST),--list)

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs

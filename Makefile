# `make run` and `make test` do all the set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The search server's own FAISS: tests load our files with it.
SERVER_VENV := .venv-server
SERVER_FAISS := faiss-cpu==1.11.0.post1

.DEFAULT_GOAL := help
.PHONY: help run ui test test-ui test-faults bench lint clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.ready  ## The whole daily job; with nothing set, on the sample catalog in .muse/
	@$(BIN)/muse run

ui: $(VENV)/.ready  ## Open the Dagster UI at http://127.0.0.1:3000
	@$(BIN)/muse ui

test: $(VENV)/.ready $(SERVER_VENV)/.ready  ## All tests, on SQLite + Valkey and on MariaDB + Redis
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore muse_assets_tests/ui $(PYTEST_ARGS)

test-ui: $(VENV)/.ready-ui  ## The UI in a real browser (Debian's chromium), against a real webserver and daemon
	$(BIN)/python -m pytest $(PYTEST_ARGS) muse_assets_tests/ui

test-faults: $(VENV)/.ready  ## Every fault injected many times (an hour); prints one table
	$(BIN)/python -m pytest -n 2 --dist load --maxschedchunk 1 --heavy-faults $(PYTEST_ARGS) muse_assets_tests/faults

bench: $(VENV)/.ready  ## What the work costs beside what one would use instead; prints ratios
	$(BIN)/python -m muse_assets_tests.benchmarks $(BENCH)

lint: $(VENV)/.ready  ## Format, lint, types, and that Dagster loads the definitions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/dagster definitions validate -w workspace.yaml

clean:  ## Remove the environments and the embedded data
	rm -rf $(VENV) $(SERVER_VENV) .muse

$(VENV)/.ready: setup.py
	@echo "Setting up $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

$(VENV)/.ready-ui: $(VENV)/.ready
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,ui]'
	@touch $@

$(SERVER_VENV)/.ready: Makefile
	@echo "Setting up $(SERVER_VENV) with $(SERVER_FAISS) (once)"
	@$(PYTHON) -m venv $(SERVER_VENV)
	@$(SERVER_VENV)/bin/pip install --quiet --disable-pip-version-check '$(SERVER_FAISS)' 'numpy<3'
	@touch $@

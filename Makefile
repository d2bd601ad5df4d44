# The commands people and CI use. `make test` and `make demo` need only Python >= 3.10, git and make: they install
# everything into .venv first. SETUP=no uses PYTHON and what is installed there instead, and installs nothing:
#   make test-gpu PYTHON=python3 SETUP=no

PYTHON ?= python3
VENV   ?= .venv
SETUP  ?= yes
JOBS   ?= 2

ifeq ($(SETUP),no)
export PYTHONPATH := src$(if $(PYTHONPATH),:$(PYTHONPATH))
PY   := $(PYTHON)
DEPS :=
else
PY   := $(VENV)/bin/python
DEPS := $(VENV)/.stamp
# The CUDA compiler of the development environment, where it is installed, rather than any that happens to be on PATH.
PIP_CUDA = $(VENV)/lib/python3*/site-packages/nvidia/cu13
WITH_NVCC = if [ -z "$${CUDA_HOME:-}" ] && [ -x $(PIP_CUDA)/bin/nvcc ]; then CUDA_HOME=$$(cd $(PIP_CUDA) && pwd); export CUDA_HOME; fi;
endif

.PHONY: help demo test test-slow test-gpu sanitize bench tables lint format docs clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(DEPS) ## Convert a real model to MLA and let it answer (ARGS="--rank 96" passes options)
	$(PY) -m flexmla demo $(ARGS)

test: $(DEPS) ## Tests that need no GPU
	$(WITH_NVCC) OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu and not slow" -n $(JOBS) --dist worksteal $(ARGS)

test-slow: $(DEPS) ## The slow tests that need no GPU
	$(WITH_NVCC) $(PY) -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: $(DEPS) ## Tests that need a GPU
	$(PY) -m pytest -m gpu $(ARGS)

sanitize: $(DEPS) ## compute-sanitizer over every kernel and branch (needs a GPU and the CUDA toolkit)
	$(PY) tests/sanitize.py # compiles what is missing
	compute-sanitizer --tool memcheck --error-exitcode 1 $(PY) tests/sanitize.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(PY) tests/sanitize.py

bench: $(DEPS) ## Measure every suite (needs a GPU; ARGS="--commit abc" passes options)
	$(PY) -m flexmla bench llama2 per-head deepseek small-latent models paged ragged mtp --overhead \
	  --json benchmarks/results/local.jsonl $(ARGS)

tables: $(DEPS) ## Write the tables and the plot of the documentation from benchmarks/results
	$(PY) benchmarks/tables.py

lint: $(DEPS) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEPS) ## Let ruff fix and format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.stamp-docs ## Build the documentation into site/
	$(VENV)/bin/python -m mkdocs build --strict

clean: ## Remove the environment and everything built
	rm -rf $(VENV) site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "flexmla needs Python 3.10 to 3.13: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.stamp: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e '.[hf,bench,dev]' -c constraints.txt
	@touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp
	$(VENV)/bin/python -m pip install -e '.[docs]' -c constraints.txt
	@touch $@

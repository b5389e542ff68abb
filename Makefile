# One command for each need. A target sets up what it needs in .venv, once, and says so;
# PYTHON=python3.12 names the interpreter that .venv is made with.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
PEERS := .venv-peers

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test soak check docs dist bench bench-gpu bench-peers clean FORCE

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

demo: $(READY)  ## Make a synthetic BIDS dataset, run a study on it in demo/, show the table
	$(BIN)/nidl-dcl demo demo

# Many tests start Python anew, which would compile every module again without files of byte code.
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY)  ## Run all tests on all cores; ARGS="-m 'not slow'" runs the quick ones
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

soak: $(READY)  ## Kill studies at random moments and compare how they end (minutes); KILLS=36 SEED=0
	$(BIN)/python tests/soak.py $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

check: $(READY)  ## Lint, formatting, types, layers, Dockerfile and documentation
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html

docs: $(READY)  ## Build the documentation in docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build/html

dist: $(READY)  ## Build a source archive and a wheel in dist/
	$(BIN)/python -m build --no-isolation

bench: $(READY)  ## Run every benchmark, write benchmarks/RESULTS.md; with peers, if they are there
	$(if $(wildcard $(PEERS)/bin/python),$(PEERS)/bin/python,$(BIN)/python) benchmarks/run.py $(NAMES)

bench-gpu: $(READY)  ## Measure training on a GPU, and test what only a GPU shows (ten minutes)
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python benchmarks/gpu.py

bench-peers:  ## Make an environment with the peers of the benchmarks (several GB)
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check \
	  torch==2.14.1 torchvision==0.29.1 nidl lightly monai==1.6.1
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -e . nidl

clean:  ## Remove .venv, demo/ and everything else that was made here
	rm -rf .venv $(PEERS) demo docs/_build docs/generated build dist
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt $(BIN)/python
	@echo "==> Installing nidl_dcl and its tools into .venv (minutes the first time)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	@echo "$(CURDIR)" > $(READY)

# An environment knows its folder by heart: one that was moved, or never finished, is made anew.
ifneq ($(shell cat $(READY) 2>/dev/null),$(CURDIR))
$(BIN)/python: FORCE
endif

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13))' || { \
	  echo "nidl_dcl needs Python 3.11, 3.12 or 3.13; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one, such as: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@echo "==> Making the environment .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear .venv || { \
	  echo "'$(PYTHON) -m venv' failed; Debian and Ubuntu have it in the package python3-venv." >&2; \
	  exit 1; }

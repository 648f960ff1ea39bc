# Every target makes what it needs (.venv included) and is safe to run again. The two to know: `make demo`, `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SLURM := $(VENV)/.slurm
PYTEST := $(BIN)/python -m pytest
DEMO_OUT ?= demo_run
INTEGRATION_OUT ?= integration_run
ABLATIONS_OUT ?= ablations_run
# Four processes on two cores: many tests wait for others. tests/conftest.py orders the files.
PARALLEL := -n 4 --dist loadfile --no-loadscope-reorder
SLOW_REPORT := --durations=10
COVERAGE := --cov=onellm_dist --cov-report=term:skip-covered --cov-report=xml
# Huge pages (glibc 2.35): tests fork some 1,400 processes of 700 MB, whose page tables are copied.
test test-fast: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
# Where it is set, every process of every test would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup slurm demo demo-full test test-fast soak lint format types integration bounds docs constraints ablations clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## make .venv and install everything in it

$(STAMP): setup.cfg setup.py pyproject.toml constraints.txt launch/setup_machine.sh
	@bash launch/setup_machine.sh $(PYTHON) $(VENV)
	@touch $@

$(SLURM): launch/setup_slurm.sh $(STAMP)
	@bash launch/setup_slurm.sh $@

slurm: $(SLURM)  ## Debian's Slurm, for `onellm rehearse` and its tests (root only; no daemon is started)

demo: $(STAMP)  ## shards, toy towers, align, tune, captions and an HTML report on the toy world (20 to 35 minutes on 2 cores)
	$(BIN)/onellm demo --out $(DEMO_OUT)

demo-full: $(STAMP)  ## the same with three times the training (about an hour on 2 cores)
	$(BIN)/onellm demo --full --out $(DEMO_OUT)_full

ablations: $(STAMP)  ## the paper's ablations on the toy world: ten variants, three seeds, a table and a page (hours)
	$(BIN)/onellm ablate --out $(ABLATIONS_OUT)

test: $(STAMP) $(SLURM)  ## every check except the long random ones, with the coverage of the fast tests
	$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint types docs
	$(PYTEST) -m "not soak" $(PARALLEL) $(SLOW_REPORT) $(COVERAGE)

test-fast: $(STAMP) $(SLURM)  ## under three minutes: for every edit
	$(PYTEST) -m "not slow and not seconds and not soak" $(PARALLEL)

soak: export ONELLM_HYPOTHESIS := random
soak: $(STAMP) $(SLURM)  ## long random runs (hours)
	$(BIN)/python -m pip install --quiet --only-binary :all: "atheris>=3" || echo "atheris could not be installed: nothing is fuzzed by coverage"
	$(PYTEST) -m "not slow and not soak" $(PARALLEL)
	ONELLM_FUZZ_GUIDED=$${ONELLM_FUZZ_GUIDED-60} $(PYTEST) -m soak --timeout 7200
	ONELLM_REAL_PROGRAMS=1 $(PYTEST) -m "slow and not soak" tests/examples tests/diagnostics tests/serving

lint: $(STAMP)  ## style, formatting, and the contracts of the import graph
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(STAMP)  ## static types, strict
	$(BIN)/mypy --num-workers 2

format: $(STAMP)  ## apply the formatter
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)  ## the documentation site, in site/ (no network needed)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # --quiet would hide warnings from --strict

integration: $(STAMP)  ## real media, real SmolLM2-135M, ViT-L/14 shapes, ZeRO-3 on 2 ranks (up to an hour on 2 cores)
	$(BIN)/python -m onellm_dist.testing.integration --out $(INTEGRATION_OUT)

bounds: $(STAMP)  ## tests but the slow ones at the oldest and newest supported versions, and of sdist and wheel (installs tens of GB)
	$(BIN)/python -m pip install --quiet nox uv
	$(BIN)/nox

constraints: $(STAMP)  ## resolve constraints.txt anew
	$(BIN)/python -m pip install --quiet uv
	{ head -n 2 constraints.txt; $(BIN)/uv pip compile setup.cfg --extra dev --extra docs --extra remote --extra serve --universal \
	  --python-version 3.10 --no-annotate --no-header --quiet --upgrade | grep -v jsfetch; } > constraints.new
	mv constraints.new constraints.txt

clean:  ## remove what demo and tests left (not .venv, and not runs/, where the recipes write)
	rm -rf $(DEMO_OUT) $(DEMO_OUT)_full $(INTEGRATION_OUT) $(ABLATIONS_OUT) site build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  .import_linter_cache .coverage coverage.xml .nox

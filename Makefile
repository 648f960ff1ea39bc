# Every target makes what it needs (.venv included) and is safe to run twice. The two to know: `make demo`, `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SLURM := $(VENV)/.slurm
PYTEST := $(BIN)/python -m pytest
DEMO_OUT ?= demo_run
REAL_OUT ?= real_run
SLOW_REPORT := --durations=15

.PHONY: help setup slurm demo demo-full test test-fast soak lint format types rehearse-real bench clean
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

demo: $(STAMP)  ## the whole path on the toy world: shards, stand-in towers, align, tune, captions, HTML report
	$(BIN)/onellm demo --out $(DEMO_OUT)

demo-full: $(STAMP)  ## the same, three times as long (about an hour on 2 CPU cores)
	$(BIN)/onellm demo --full --out $(DEMO_OUT)_full

test: $(STAMP) $(SLURM) lint types  ## every check but the long random ones
	$(PYTEST) -m "not soak" -n 2 --dist loadfile $(SLOW_REPORT)

test-fast: $(STAMP) $(SLURM)  ## under three minutes: for every edit
	$(PYTEST) -m "not slow and not soak" -n 2 --dist loadfile

soak: $(STAMP) $(SLURM)  ## long random runs
	$(PYTEST) -m soak --timeout 7200

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)  ## apply the formatter
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

rehearse-real: $(STAMP)  ## real media, real SmolLM2-135M, ViT-L/14 shapes, ZeRO-3 on 2 ranks (up to an hour on 2 cores)
	$(BIN)/python -m onellm_dist.testing.integration --out $(REAL_OUT)

clean:  ## remove what demo and tests left (not .venv, and not runs/, where the recipes write)
	rm -rf $(DEMO_OUT) $(DEMO_OUT)_full $(REAL_OUT) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

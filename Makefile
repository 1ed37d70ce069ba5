# `make quickstart` and `make test` do all the set-up they need.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install quickstart digits test lint types contracts pytest slow bench clean

help:
	@echo "make quickstart   install, then score, mix, prune and shard real text, offline"
	@echo "make digits       the same for classification, on handwritten digits"
	@echo "make test         install, then lint, types, import contracts and tests"
	@echo "make bench        benchmarks; prints tables"

# torch goes first and pinned. For a build without CUDA where the default one has it:
# PIP_EXTRA_INDEX_URL names an index of CPU builds.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,report,dev]'
	touch $(STAMP)

install: $(STAMP)

quickstart: $(STAMP)
	$(BIN)/curate run configs/quickstart.yaml
	$(BIN)/curate show runs/quickstart

digits: $(STAMP)
	$(BIN)/curate run configs/digits.yaml
	$(BIN)/curate show runs/digits

test: lint types contracts pytest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/pyright

contracts: $(STAMP)
	$(BIN)/lint-imports

pytest: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

bench: $(STAMP)
	$(BIN)/python -m pytest tests/benchmarks -s -o addopts=--import-mode=importlib

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

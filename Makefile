# `make quickstart` and `make test` do all the set-up they need.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MOSAIC := .venv-mosaic

.PHONY: help install mosaic quickstart digits docs test lint types contracts pytest slow bench clean

help:
	@echo "make quickstart   install, then score, mix, prune and shard real text, offline"
	@echo "make digits       the same for classification, on handwritten digits"
	@echo "make test         install, then lint, types, import contracts and tests"
	@echo "make docs         the guide as a site, in site/"
	@echo "make bench        benchmarks; prints tables"
	@echo "make mosaic       a reader of Mosaic Streaming, for the tests of its shards"

# torch goes first and pinned. For a build without CUDA where the default one has it:
# PIP_EXTRA_INDEX_URL names an index of CPU builds.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,report,dev]'
	touch $(STAMP)

install: $(STAMP)

# Mosaic Streaming asks for older neighbours than curate and for far more than it needs to read
# shards: it gets a room of its own, with a door to the libraries of the main one.
$(MOSAIC)/.installed: $(STAMP) constraints-mosaic.txt
	$(BIN)/python -m venv --clear --without-pip $(MOSAIC)
	$(BIN)/python -m pip --python $(MOSAIC)/bin/python install --quiet --disable-pip-version-check --no-deps -r constraints-mosaic.txt
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > "$$($(MOSAIC)/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	touch $@

mosaic: $(MOSAIC)/.installed

quickstart: $(STAMP)
	$(BIN)/curate run configs/quickstart.yaml
	$(BIN)/curate show runs/quickstart
	$(BIN)/curate report runs/quickstart

digits: $(STAMP)
	$(BIN)/curate run configs/digits.yaml
	$(BIN)/curate show runs/digits
	$(BIN)/curate report runs/digits

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

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
	rm -rf $(VENV) $(MOSAIC) .pytest_cache .ruff_cache .hypothesis

# make demo   the whole way on real digits; make test   everything CI runs; make check   lint, types, architecture
# make docs   the documentation site, in build/docs
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test check lint types imports pytest docs clean

demo: $(INSTALLED)
	$(BIN)/edgekit pipeline

test: check pytest

check: lint types imports

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

imports: $(INSTALLED)
	$(BIN)/lint-imports

# Warnings are errors: a link that leads nowhere is one. The tests build it too.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fresh-env --quiet --fail-on-warning --keep-going --builder html docs build/docs
	@echo "open build/docs/index.html"

# A process a core, a file at a time: most of the time is Python's, so torch's threads would only get in each other's way.
# tests/conftest.py says which files come first.
pytest: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations 25

# One environment for all: the tested versions of constraints.txt. torch comes first and pinned: a range would let
# another package pull its newest build. Where the index offers a build for the CPU only, point pip at it (PIP_INDEX_URL).
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || \
	  { echo "edgekit is tested on Python 3.10 to 3.12; choose one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt 'torch==2.13.0'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

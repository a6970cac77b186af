# Everything a developer types. Each target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types chaos ci clean

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python must be 3.11 or newer, got %d.%d; run make PYTHON=/path/to/python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## caption a rendered data set end to end on a local Ray
	$(BIN)/python -m pipeline demo

test: $(STAMP)  ## the default suite
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

chaos: $(STAMP)  ## real crashes, apart from the default suite
	$(BIN)/python -m pytest tests/chaos --timeout=900

ci: lint types test

clean:
	rm -rf $(VENV) build *.egg-info demo_output

# The commands of development. Each target sets up .venv by itself.
PYTHON ?= python3
# make install TORCH=cpu installs torch without CUDA, whose download is 2.8 GB smaller. That index lacks some
# versions of constraints.txt, so torch's dependencies are installed with the rest.
TORCH_INDEX := $(if $(filter cpu,$(TORCH)),--no-deps --index-url https://download.pytorch.org/whl/cpu)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test slow kernels gpu lowest cluster lint types docs coverage chaos pages picture wheel ci clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python must be 3.11 or newer, got %d.%d; run make PYTHON=/path/to/python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_INDEX) torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)  ## set up .venv, as every other target does by itself; TORCH=cpu for torch without CUDA

demo: $(STAMP)  ## caption drawn scenes end to end on a local Ray and grade the captions
	$(BIN)/python -m pipeline demo

test: $(STAMP)  ## run the default suite: unit, parity, contracts, integration
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup tests/unit tests/parity tests/contracts
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup tests/integration

slow: $(STAMP)  ## run the tests that the default suite leaves to continuous integration
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadgroup -m slow

# triton gets its own folder, so that the other tests run without it, like users with torch for CPUs.
build/triton: deploy/constraints-cuda.txt | $(STAMP)
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ -c $< triton

kernels: build/triton  ## run the kernels for a GPU in triton's interpreter, on a CPU
	PYTHONPATH=build/triton $(BIN)/python -m pytest --numprocesses=2 tests/kernels

gpu: $(STAMP)  ## run the tests that need an NVIDIA GPU, where they are not skipped; not in the default suite
	$(BIN)/python -m pytest -m gpu tests/parity
	$(BIN)/python -m pytest tests/kernels

# torch has the version of constraints.txt. One file is left out because schemathesis does not fit the oldest packages, and one
# test because older versions of transformers import torch's compiler.
lowest: $(STAMP)  ## run the unit and parity tests with the lowest versions that pyproject.toml declares; not in the default suite
	rm -rf build/lowest
	$(BIN)/uv venv --quiet --python $(BIN)/python build/lowest
	$(BIN)/pip --python build/lowest/bin/python install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_INDEX) torch
	grep '^torch==' constraints.txt > build/lowest/torch.txt
	$(BIN)/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct -c build/lowest/torch.txt -e '.[dev]'
	build/lowest/bin/python -m pytest --numprocesses=2 --dist=loadgroup tests/unit tests/parity \
		--ignore=tests/unit/deploy/routes/test_generated_requests.py \
		--deselect=tests/parity/engine/test_scheduling.py::test_a_process_that_never_closes_its_engine_ends_cleanly

lint: $(STAMP)  ## check style and formatting with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## check types with mypy
	$(BIN)/mypy

docs: $(STAMP)  ## build the documentation site in build/site; a broken link or reference fails
	$(BIN)/zensical build --clean --strict

coverage: $(STAMP)  ## print the line coverage of the unit, parity and contract tests
	$(BIN)/python -m pytest tests/unit tests/parity tests/contracts \
		--cov=blip2_actor --cov=pipeline --cov=deploy --cov-report=term:skip-covered

chaos: $(STAMP)  ## run the tests that kill processes or start clusters of their own; not in the default suite
	$(BIN)/python -m pytest tests/chaos --timeout=900 -m ''

cluster: $(STAMP)  ## run a job, an endpoint and an autoscaling cluster on real Ray processes, in about half an hour; not in the default suite
	$(BIN)/python -m pytest --timeout=900 -m '' tests/integration/job/test_job_submit.py tests/chaos/own_clusters/test_submit.py \
		tests/chaos/own_clusters/test_autoscaler.py tests/chaos/own_clusters/nodes \
		tests/chaos/own_clusters/online/test_endpoint_changes.py tests/chaos/own_clusters/online/test_updates.py

pages: $(STAMP)  ## run the tests of the HTML pages in Chromium, which must be installed; not in the default suite
	$(BIN)/python -m pytest tests/pages

picture: $(STAMP)  ## make the pictures of docs/images anew from real runs, with Chromium and tmux
	$(BIN)/python -m tests.pages.picture

wheel: $(STAMP)  ## build dist/*.whl and run its demonstration in a fresh environment
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist
	$(BIN)/python -m tests.contracts.installed_wheel dist/*.whl

ci: lint types docs test slow kernels pages  ## run what continuous integration runs

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info demo_output .coverage

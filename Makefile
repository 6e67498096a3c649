# Two commands do everything on a fresh machine:
#   make train    set up .venv, train on the embedded data set, test at 300 K and 600 K: a table and a parity plot
#   make test     set up .venv with the tools of development and torch-scatter, run the tests
#   make docs     build the site of the documentation; open site/index.html
# ARGS goes to the trainer or to pytest: make train ARGS="--training.budget_seconds 20", make test ARGS="-m slow".
# JOBS is the number of processes of the tests (one for each core, at most 8), PYTHON the interpreter that .venv is made
# with; versions come from constraints.txt.

PYTHON ?= python3
VENV = .venv
PY = $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
ARGS =
JOBS := $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)

.PHONY: help train test lint types docs wheel package dev clean

help:
	@sed -n 's/^#   //p' Makefile

# --- set-up: each step leaves a stamp and is done again when what it reads has changed

$(VENV)/torch.stamp: constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("nbody_pyg needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel
	touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) --no-build-isolation -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/package.stamp
	$(PIP) --no-build-isolation -e ".[dev,data,periodic]"
	sh scripts/install_scatter.sh $(PY) -c constraints.txt
	touch $@

$(VENV)/docs.stamp: $(VENV)/package.stamp
	$(PIP) --no-build-isolation -e ".[docs]"
	touch $@

package: $(VENV)/package.stamp

dev: $(VENV)/dev.stamp

# --- the two commands

train: $(VENV)/package.stamp
	$(VENV)/bin/nbody train configs/embedded.yaml $(ARGS)

test: $(VENV)/dev.stamp
	$(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# --- for developers

lint: $(VENV)/dev.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/dev.stamp
	$(PY) -m mypy

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

wheel: $(VENV)/package.stamp
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache

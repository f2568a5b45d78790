# `make demo` and `make test` set everything up by themselves; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest

.PHONY: help demo test check format lint types docs lowest sweep full clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch first and pinned: a looser request would fetch a build with several gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(INSTALLED) ## set up and run the main job: slim, verify, export and time a trained network
	$(BIN)/graphprune demo

test: $(INSTALLED) ## set up and run the tests
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not sweep and not full and not cuda"

check: format lint types test ## what continuous integration runs

format: $(INSTALLED) ## is the code formatted?
	$(BIN)/ruff format --check .

lint: $(INSTALLED) ## does the linter agree?
	$(BIN)/ruff check .

types: $(INSTALLED) ## do the strict types hold?
	$(BIN)/mypy

docs: $(INSTALLED) ## build the pages in docs/ and the reference of the API
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m sphinx -q -W -b html docs docs/_build

# An environment of its own: what is tried is that the bounds in pyproject.toml are true.
$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt "torch==2.13.0"
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[plot]"
	touch $@

lowest: $(LOWEST)/.installed ## do the main calls work with the lowest versions allowed?
	$(LOWEST)/bin/python tests/lowest.py

sweep: $(INSTALLED) ## ten thousand random networks
	$(BIN)/python -m pytest -n 2 -m sweep

full: $(INSTALLED) ## the full-size models: slim, verify, export, compare
	$(BIN)/python -m pytest -n 2 -m full

clean: ## remove what the other targets made
	rm -rf $(VENV) $(LOWEST) demo-output build docs/_build docs/measured *.egg-info

# Needs Python 3.11, pip and make; everything else is installed into .venv on the first call.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: help install demo test docs lint unit format clean

help:
	@echo "make demo    images by the embedded model, stock and accelerated, side by side"
	@echo "make docs    the documentation site, in outputs/site"
	@echo "make test    ruff, mypy and the tests, which build the site as well"
	@echo "make clean   remove the virtual environment, caches and outputs"

install: $(STAMP)

$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install --disable-pip-version-check --constraint .ci/constraints.txt --editable ".[dev]"
	touch $@

demo: $(STAMP)
	$(BIN) examples/demo.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN) -m mkdocs build --strict
	@echo "the site: outputs/site/index.html"

test: lint unit

lint: $(STAMP)
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

unit: $(STAMP)
	$(BIN) -m pytest -n 2 --dist worksteal

format: $(STAMP)
	$(BIN) -m ruff check --fix .
	$(BIN) -m ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist outputs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SETTINGS := pyproject.toml constraints.txt

.PHONY: quickstart ui test check test-interop clean

quickstart: $(VENV)/.installed  ## train, ensemble and evaluate SAEs on the embedded language model
	$(BIN)/saeens run quickstart

ui: $(VENV)/.installed  ## the Dagster UI, on loopback
	$(BIN)/saeens ui

test: $(VENV)/.installed-dev  ## the whole test suite
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test-interop: .venv-interop/.installed  ## SAE folders open in SAELens, with the same codes
	.venv-interop/bin/python -m pytest -m interop tests/interop

clean:  ## remove the virtual environments; what runs made stays in data/
	rm -rf $(VENV) .venv-interop

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"Python 3.11 to 3.13 is needed, {v[0]}.{v[1]} was found: make PYTHON=/path/to/python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SETTINGS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0" --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt hypothesis pyright pytest ruff scikit-learn scipy
	touch $@

.venv-interop/.installed: pyproject.toml constraints-interop.txt
	$(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-interop.txt "torch==2.13.0" sae-lens pytest
	touch $@

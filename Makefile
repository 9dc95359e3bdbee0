# make demo | test | lint | docs | tutorials | bench | clean; everything is installed into .venv, once.
PYTHON ?= python3
MINOR := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS := constraints/$(if $(filter 3.11,$(MINOR)),py311,py312).txt
INSTALLED := .venv/.installed-$(MINOR)
INSTALLED_DOCS := .venv/.installed-docs-$(MINOR)
BIN := .venv/bin

.PHONY: demo test lint docs tutorials dist bench clean .venv

demo: $(INSTALLED)
	$(BIN)/python -m mixscvi.demo

# One thread for each of the two processes: more fight over the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The site, in docs/_build/html; a warning is an error. No network is needed.
docs: $(INSTALLED_DOCS)
	MPLBACKEND=agg $(BIN)/python -m sphinx -n -W --keep-going -q docs docs/_build/html

# Runs all notebooks again, with their outputs written into them.
tutorials: $(INSTALLED_DOCS)
	$(BIN)/python docs/run_tutorials.py

# Wheel and source distribution, checked.
dist: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --group release
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# Ratios to scVI's times; minutes, on a machine that does nothing else.
bench: $(INSTALLED)
	$(BIN)/python benchmarks/speed.py

.venv: $(INSTALLED)

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'mixscvi needs Python 3.11 or newer; $(PYTHON) is $(or $(MINOR),not one).' \
	    'Name another: make PYTHON=python3.12' >&2; exit 1; }
	$(BIN)/python$(MINOR) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install -q --upgrade -c $(CONSTRAINTS) pip
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e . --group test --group lint
	touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) --group docs
	touch $@

clean:
	rm -rf build dist docs/_build docs/generated
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache mixscvi-demo lightning_logs
	find mixscvi tests -name __pycache__ -prune -exec rm -rf {} +

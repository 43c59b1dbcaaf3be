# make demo, make test, make check and make bench each build .venv first if it is missing or out of date.
PYTHON ?= python3
JOBS ?= 2
DEMO_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test test-all check bench format clean

help:
	@echo "make demo      train, search and report on scikit-learn's digits (DEMO_ARGS=--quick shortens it)"
	@echo "make test      the fast tests, in JOBS=$(JOBS) processes"
	@echo "make test-all  the slow tests as well"
	@echo "make check     formatting, lint, types, layers, wheel"
	@echo "make bench     the benchmarks: JSON and tables"
	@echo "make format    format the code and sort its imports"
	@echo "make clean     remove caches and build outputs (not .venv)"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): a few GB on the first run, which takes some minutes ..."
	@$(PYTHON) -c 'import sys; sys.exit("saq_fx needs Python 3.11 or newer: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c 'import torch, torchvision' || { \
		echo "torch and torchvision do not work together. Most often one is a CPU build and the other a CUDA build:"; \
		$(BIN)/python -m pip list 2>/dev/null | grep -i -E '^(torch|torchvision) '; \
		echo "Remove $(VENV), see to it that pip takes both from one index, and run make again."; exit 1; }
	@touch $@

demo: $(INSTALLED)
	$(BIN)/saq-fx demo $(DEMO_ARGS)

# One thread a process: the processes already fill the cores.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

check: $(INSTALLED)
	$(BIN)/python tools/check.py

bench: $(INSTALLED)
	@for script in $(wildcard tools/bench_*.py); do echo "$$script"; $(BIN)/python $$script || exit 1; done

format: $(INSTALLED)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

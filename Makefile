# `make demo`, `make docs` and `make test` need Python 3.11 or newer and nothing else: they fill .venv/ themselves,
# once, and again only when pyproject.toml or setup.py changes.
#
#   PYTHON=...        the interpreter to build .venv/ with, if not the first that fits
#   TORCH_INDEX=...   package index for torch, such as its CPU-only one: a far smaller download
#   WORKERS=...       processes that share the tests

BIN := .venv/bin
DEMO := runs/demo
WORKERS ?= auto
# Neighbours stay in one process, which makes the models that they share once; who is done takes over from others.
SHARED := --maxprocesses 4 --dist worksteal

export PYTHON TORCH_INDEX

.PHONY: help demo docs test quick lint format wheel check-wheel sanitize clean

help:
	@echo "make demo     calibrate, compress, freeze, correct and measure a small model"
	@echo "make docs     write the reference of all public names to docs/api/"
	@echo "make test     lint, types, tests, and the wheel in a clean environment: what CI runs"
	@echo "make quick    lint, types, and the tests that take no longer than a few seconds"
	@echo "make lint     ruff and mypy only"
	@echo "make sanitize the kernel tests on C code with address and undefined-behaviour sanitizers"
	@echo "make format   let ruff repair what it can"
	@echo "make clean    remove .venv/, caches and builds; runs/ stays"

demo: .venv/.ready-report
	@$(BIN)/errata demo --out $(DEMO)
	@echo "open $(CURDIR)/$(DEMO)/report.html"

docs: .venv/.ready-docs
	@$(BIN)/python scripts/make_docs.py --out docs/api

# Types, the wheel and the sanitizers take one core each, and half a minute.
test: .venv/.ready-dev
	@$(MAKE) --no-print-directory -j2 --output-sync=target lint check-wheel sanitize
	$(BIN)/pytest -q -n $(WORKERS) $(SHARED)

check-wheel: .venv/.ready-dev
	$(BIN)/python scripts/check_wheel.py

sanitize: .venv/.ready-dev
	scripts/sanitize.sh

quick: lint
	$(BIN)/pytest -q -n $(WORKERS) $(SHARED) -m "not slow"

lint: .venv/.ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	@$(BIN)/python scripts/link_typecheck.py
	$(BIN)/mypy

format: .venv/.ready-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: .venv/.ready-dev
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv build dist errata.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready-%: pyproject.toml setup.py
	@scripts/set_up.sh $*

PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 2
CASES ?= 100000
# Processes that run tests side by side, each with a server of its own; one on a server of yours.
JOBS ?= $(if $(DATABASE_URL),0,2)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FUZZ_READY := $(VENV)/.fuzz-ready

.PHONY: help setup demo admin test coverage check format soak fuzz slow bench matrix wheel clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make the virtual environment

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

demo: $(READY) ## run the shop: publish, handle, kill a worker, prove nothing was lost
	$(BIN)/python manage.py demo

admin: $(READY) ## serve the admin with a worker and the demo's data
	$(BIN)/python manage.py demo --serve

test: $(READY) ## run the tests, but for those that take long
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

coverage: $(READY) ## tell which lines no test reaches; takes twice as long as the tests
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

check: $(READY) ## the fast gate: lint, format, types, imports, migrations, system checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python manage.py makemigrations --check --dry-run
	$(BIN)/python manage.py check --fail-level WARNING

format: $(READY) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: $(READY) ## inject random faults for MINUTES (2), repeatable with SEED
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

fuzz: $(FUZZ_READY) ## guess CASES (100000) bad inputs by coverage, repeatable with SEED
	$(BIN)/python -m tests.fuzz.guided --cases $(CASES) $(if $(SEED),--seed $(SEED)) $(TARGETS)

$(FUZZ_READY): $(READY) requirements-fuzz.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-fuzz.txt
	@touch $@

slow: $(READY) ## run the tests that take long
	$(BIN)/python -m pytest -m slow

bench: $(READY) ## measure beside other task systems; e.g. make bench ARGS="noop latency --rounds 5"
	$(BIN)/python -m benchmarks $(ARGS)

matrix: ## run the tests on every interpreter found here
	@for minor in 11 12 13 14; do \
		command -v python3.$$minor >/dev/null && python3.$$minor -c 'import ssl' 2>/dev/null || continue; \
		$(MAKE) --no-print-directory test PYTHON=python3.$$minor VENV=.venv-3.$$minor || exit 1; \
	done

# What an earlier build left would get into it, modules that have been moved away since included.
wheel: $(READY) ## build the wheel into dist/
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove what the targets above made
	rm -rf .venv .venv-3.* .postgres .postgres-* build dist .coverage* *.egg-info
	rm -rf benchmarks/.peers benchmarks/.postgres benchmarks/results
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

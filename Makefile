# Every target works from a fresh clone: what is missing is set up first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
UNFINISHED := $(VENV)/.unfinished

PYTEST := $(BIN)/python -m pytest
# A file stays in one process, and those with slow tests come first: see tests/conftest.py.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: help demo check test test-clients test-hard lint docs clean

help: ## list the targets (the default)
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1~\2/p' $(MAKEFILE_LIST) | awk -F'~' '{ printf "%-20s %s\n", $$1, $$2 }'

demo: $(STAMP) ## prune the embedded model; options: make demo ARGS="--steps 100 --out small"
	@$(BIN)/nuteprune demo $(ARGS)

check: lint ## lint and the quick tests, within a minute: while you work
	$(PYTEST) $(PARALLEL) --hypothesis-profile=quick -m "not slow and not network and not clients and not hard" $(ARGS)

test: lint ## lint and the test suite; options for pytest: make test ARGS="-k gates"
	$(PYTEST) $(PARALLEL) $(ARGS)

test-clients: $(STAMP) ## load exported models in other programs
	$(PYTEST) -m clients $(ARGS)

test-hard: $(STAMP) ## long fault-injection and soak tests, and families that `make test` leaves out
	$(PYTEST) $(PARALLEL) --hypothesis-profile=hard -m hard $(ARGS)

# Idle threads sleep: tiny models on few cores otherwise spend their time spinning.
check test test-clients test-hard: export OMP_WAIT_POLICY ?= PASSIVE
# A process per core, and so a thread per process.
check test test-hard: export OMP_NUM_THREADS ?= 1
# Compiled tests are kept: else each process compiles them anew, for seconds.
check test test-hard: export PYTHONDONTWRITEBYTECODE =

lint: $(STAMP) ## ruff, mypy and the order of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(STAMP) ## build the documentation into build/site
	@$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean: ## remove .venv, caches and build products
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist

# The stamp is written last, and a set-up that was cut off leaves its mark: that .venv is made
# anew, since pip takes half-copied packages for installed. A .venv of yours is kept and added to.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "nuteprune needs Python 3.11 or newer, which $(PYTHON) is not; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@if [ -e $(UNFINISHED) ]; then rm -rf $(VENV); fi
	@mkdir -p $(VENV) && rm -f $@ && touch $(UNFINISHED)
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@rm $(UNFINISHED) && touch $@

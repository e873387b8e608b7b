# The README's commands. Each one does its own set-up and reuses what is there.
#   make quickstart   the main job and its comparison, on the shipped laboratory
#   make test         linters, type check and the fast tests       make test-long   the slow tests
#   make docs         the site, strictly                            make notebooks   every notebook, executed

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
# The stamp's name is a checksum of what decides the environment: another lock file means another installation.
STAMP := $(VENV)/.installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d ' ' -f 1)
JOBS ?= 2
# What the site and the notebooks need besides lies in the same environment, installed when first asked for.
DOCS_STAMP := $(VENV)/.docs-$(shell cat requirements.lock requirements-docs.lock | cksum | cut -d ' ' -f 1)

.PHONY: quickstart test test-fast test-long docs notebooks lint format setup clean

quickstart: $(STAMP)
	$(BIN)/featcl run experiments/quickstart/base.yaml

test: lint test-fast

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile -m "not slow"

test-long: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

docs: $(DOCS_STAMP)
	$(BIN)/mkdocs build --strict --quiet
	$(BIN)/python -m pytest -q tests/docs/test_site.py tests/docs/test_links.py

notebooks: $(DOCS_STAMP)
	$(BIN)/python -m pytest -q tests/notebooks -m "slow or not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(STAMP)

$(STAMP):
	@test -n "$(PYTHON)" || { echo "featcl needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the exact versions of requirements.lock into $(VENV); once, one to four minutes"
	$(BIN)/python -m pip install -qq -r requirements.lock
	$(BIN)/python -m pip install -qq --no-deps -e .
	rm -f $(VENV)/.installed-*
	touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -qq --no-deps -r requirements-docs.lock
	rm -f $(VENV)/.docs-*
	touch $@

clean:
	rm -rf .pytest_cache .ruff_cache build dist

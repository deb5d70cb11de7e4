PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
# Tests of what the lowest versions do not have yet, or of how their layers hand on what they make.
NEWER := push_to_hub or lfm2 or checkpointing or finite_differences
# Only their files are imported there: others may import what the lowest versions do not have.
MARKED = $(shell grep -rl --include='test_*.py' 'mark\.versions' tests)
# Two processes, each of which takes file after file in the order of collection; -n 0 in ARGS for one.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

version = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# A .venv is kept as it is; one that was made with another Python than the one asked for must not pass for it.
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(BIN)/python),)
ifneq ($(call version,$(PYTHON)),$(call version,$(BIN)/python))
$(error .venv has Python $(call version,$(BIN)/python), PYTHON=$(PYTHON) is $(call version,$(PYTHON)): remove .venv or leave PYTHON out)
endif
endif
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-lowest test-highest check format bench wheel

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "The first run makes .venv; PYTHON=python3.12 chooses its Python (3.10 or newer)."

demo: $(INSTALLED)  ## run examples/demo.py; ARGS="..." are passed on
	$(BIN)/python examples/demo.py $(ARGS)

test: $(INSTALLED)  ## run the tests that take seconds, and the one on Gemma 3 270M; ARGS="..." go to pytest
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED)  ## run all tests
	$(PYTEST) $(ARGS)

test-lowest:  ## run some of the tests on the lowest versions of transformers and TRL that are supported, in .venv-lowest
	@test -x .venv-lowest/bin/pip || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install -q -c tests/lowest.txt -e '.[dev]'
	.venv-lowest/bin/python -m pytest -n 2 --dist loadfile -m "versions and not slow" -k "not ($(NEWER))" $(MARKED) $(ARGS)

test-highest:  ## run the same tests on the highest versions that the package index has (gigabytes), in .venv-highest
	@test -x .venv-highest/bin/pip || $(PYTHON) -m venv .venv-highest
	.venv-highest/bin/pip install -q --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-highest/bin/python -m pytest -n 2 --dist loadfile -m "versions and not slow" $(ARGS)

bench: $(INSTALLED)  ## measure what a forecast costs; ARGS="--only 1 3" for some settings, ARGS="--device cuda" on a GPU
	$(BIN)/python examples/benchmark.py $(ARGS)

check: $(INSTALLED)  ## check format, lint and types, then test
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(MAKE) test

format: $(INSTALLED)  ## format the code and repair what the linter can
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

wheel:  ## build the wheel and the source archive into dist/ and check them, in .venv-wheel
	@test -x .venv-wheel/bin/pip || $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install -q build twine
	rm -f dist/sts_callback-*
	.venv-wheel/bin/python -m build
	.venv-wheel/bin/twine check --strict dist/sts_callback-*

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "sts-callback needs Python 3.10 or newer; $(PYTHON) is $(or $(call version,$(PYTHON)),not there). Try: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	@touch $@

# `make` lists what there is. Everything runs from .venv, which is rebuilt when a requirements file changes.

.DEFAULT_GOAL := help
.PHONY: help install smoke test check image-test docs clean

# The plain `python3` when it is new enough, else the newest that is. A name on the PATH is not yet an interpreter (pyenv's
# shims) and an interpreter may come without venv (Debian's), so each is tried.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	"$$python" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1 && echo "$$python" && break; done)
PIP_VERSION := 26.3
TEST_PROCESSES ?= 2
BIN := .venv/bin
# Folders that the linters look at when they exist.
SOURCES := job tests $(wildcard runpod benchmarks)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/.installed ## create .venv with everything pinned

.venv/.installed: requirements.txt requirements-dev.txt requirements-runpod.txt requirements-smoke.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with venv is needed (Debian, Ubuntu: apt-get install python3-venv); or name one: make PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip==$(PIP_VERSION)
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps -r requirements-smoke.txt
	touch $@

smoke: install ## fine-tune a 135M model on this machine, from settings to report: no GPU, no account
	RECIPE=smoke $(BIN)/python -m job run

test: install ## run the tests and report the coverage of job/
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist worksteal --cov=job --cov-report=term

check: install ## what CI runs: format, lint, types, shell, workflows, Dockerfile, tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy $(SOURCES) .github/release_notes.py
	$(BIN)/shellcheck entrypoint.sh .ci/run deploy/hf-jobs.sh
	$(BIN)/zizmor --offline --no-progress -q .github
	$(BIN)/hadolint Dockerfile
	$(MAKE) test

image-test: install ## build the image on a small Debian and run it: root on Linux, podman, mmdebstrap
	IMAGE_TEST=1 $(BIN)/python -m pytest -p no:cacheprovider -o faulthandler_timeout=1800 -s -v -rs tests/image

docs: install ## write env.example and the README's settings table from job/settings
	$(BIN)/python -m job settings --write

clean: ## remove .venv and everything that tools left; runs/ stays
	rm -rf .venv .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find job tests -name __pycache__ -type d -prune -exec rm -rf {} +

# make demo       the main job, for real, in a minute (KEEP=1 leaves it running)
# make test       everything that must hold: lint, types, import contracts, the whole test suite
# make test-long  the exhaustive runs as well
# make bench      the benchmarks (NAME=relay-ed25519 runs one)
# make lock       renew constraints.txt
# Each does all set-up it needs: Debian packages (as root), a virtual environment, the pinned dependencies.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
KEEP ?=
NAME ?=
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: demo test test-long bench lock lint setup debian servers clean
.DEFAULT_GOAL := help

help:
	@sed -n '1,/^$$/s/^# //p' Makefile

setup: debian $(VENV)/.installed

debian:
	@sh tests/lab/debian-packages.sh $(PYTHON)

servers: debian
	@sh tests/lab/debian-servers.sh .lab

$(VENV)/.installed: constraints.txt pyproject.toml | debian
	$(PYTHON) -c 'import sys; sys.exit("malote needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: setup
	$(BIN)/python tests/demo.py $(if $(KEEP),--keep)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint servers
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not long"

test-long: lint servers
	MALOTE_TEST_PROFILE=long $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --timeout 3600

bench: setup
	$(BIN)/python -m bench $(NAME)

# Universal: one file for every Python and platform that malote runs on; it names no index.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	  --no-annotate --no-header --upgrade --extra dev pyproject.toml --output-file constraints.txt
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

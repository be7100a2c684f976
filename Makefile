# make quickstart   the main job on a small MoE, in under five minutes
# make test         the tests
# make test-tools   the tests with other people's tools, in an environment of their own
# make test-servers vLLM's, SGLang's and llama.cpp's own code on an exported adapter (downloads 400 MB, installs nothing)
# make architectures every model class with routed experts goes the whole way; writes docs/architectures.md
# make docs         the documentation as a site, in site/
# make lint types   what CI runs before them
# make bench        what training costs, in time and memory
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
# Bytecode is compiled at first import: compiling all of it at once takes longer than the rest. It has to be kept then,
# or each process that a test starts compiles anew for seconds.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: quickstart test test-tools test-in-tools-environment test-servers lint types bench architectures architectures-check docs clean

# What running it needs, and what testing it needs on top.
$(STAMP)-run:
	@echo "Setting up $(VENV) (once; a minute or two) ..."
	$(PYTHON) -m venv $(VENV)
	@# torch by its exact version first: left to a range, pip may choose a build with gigabytes of GPU libraries.
	$(PIP) torch
	$(PIP) --editable ".[trl,report]"
	@touch $@

$(STAMP)-test: $(STAMP)-run
	$(PIP) --editable ".[test,dev]"
	@touch $@

quickstart: $(STAMP)-run
	$(BIN)/python examples/quickstart.py

test: $(STAMP)-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

# The evaluation harness brings forty packages, which the other tests should do without.
test-tools:
	$(MAKE) --no-print-directory VENV=.venv-tools test-in-tools-environment

$(STAMP)-tools: $(STAMP)-test
	$(PIP) --editable ".[eval-test]"
	@touch $@

test-in-tools-environment: $(STAMP)-tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/commands/test_run_lm_eval.py $(ARGS)

# The servers' wheels are never installed: their Python files are read, and what needs a GPU has a stand-in.
$(VENV)/servers/.ready: $(STAMP)-test tests/servers/requirements.txt tests/servers/unpack.py
	rm -rf $(VENV)/servers
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		--dest $(VENV)/servers/wheels --requirement tests/servers/requirements.txt
	$(BIN)/python -m tests.servers.unpack $(VENV)/servers/wheels $(VENV)/servers
	rm -rf $(VENV)/servers/wheels
	@touch $@

test-servers: $(VENV)/servers/.ready
	PEFT_SIEVE_SERVERS=$(VENV)/servers $(BIN)/python -m pytest tests/servers $(ARGS)

lint: $(STAMP)-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-cache

types: $(STAMP)-test
	$(BIN)/mypy peft_sieve

# Fails where a step fails and no sentence says why; about three minutes.
architectures: $(STAMP)-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures.walk --output docs/architectures.md $(ARGS)

# The same without writing the page.
architectures-check: $(STAMP)-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.architectures.walk $(ARGS)

# Side by side on this machine, and the figures from the rows; about a quarter of an hour on two cores.
bench: $(STAMP)-run
	set -e; for name in step memory load profiling drift profile scaling; do $(BIN)/python benchmarks/bench_$$name.py; done
	$(BIN)/python benchmarks/plot.py

# The package is read there, not installed; a warning fails.
DOCS := .venv-docs/.ready-$(shell cat docs/requirements.txt constraints.txt | cksum | cut -d' ' -f1)
$(DOCS):
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--requirement docs/requirements.txt
	@touch $@

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict
	@echo "The site is in site/."

clean:
	rm -rf $(VENV) .venv-tools .venv-docs site .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info

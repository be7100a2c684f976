# make quickstart   the main job on a small MoE, in under five minutes
# make test         the tests
# make lint types   what CI runs before them
# make bench        what profiling costs
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test lint types bench clean

$(READY):
	@echo "Setting up $(VENV) (once; a minute or two) ..."
	$(PYTHON) -m venv $(VENV)
	@# torch by its exact version first: left to a range, pip may choose a build with gigabytes of GPU libraries.
	$(PIP) torch
	$(PIP) --editable ".[test,dev]"
	@rm -f $(VENV)/.ready-*
	@touch $@

quickstart: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python examples/quickstart.py

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy peft_sieve

bench: $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/bench_profiling.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info

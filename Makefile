# make run    the main job: FedPEAT over 2,000 devices on real text, a report at the end
# make test   lint, layers, types and all tests
# make bench  the benchmarks (minutes; run them on a quiet machine)
# Each sets up .venv first if there is none. ARGS="--rounds 20" goes to the main job.

PYTHON ?= python3
VENV = .venv/bin
SETUP = .venv/installed

.PHONY: run test check bench
run: $(SETUP)
	$(VENV)/python workloads/large_scale.py --fleet.memory-scale 0.045 --rounds 8 --evaluation.every 2 $(ARGS)

test: check
	$(VENV)/pytest

check: $(SETUP)
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/lint-imports --no-logo
	$(VENV)/pyright --pythonpath $(VENV)/python

bench: $(SETUP)
	$(VENV)/python workloads/benchmarks/client_batch.py

$(SETUP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

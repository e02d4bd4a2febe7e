# make run    the main job: FedPEAT over 2,000 devices on real text, a report at the end
# make test   lint, layers, types, all tests, and those that compare numbers once more as a plainer processor computes
# make full   the same, once more as another one does, and the memory model on many more random settings
# make bench  the benchmarks (minutes; run them on a quiet machine)
# Each sets up .venv first if there is none. ARGS="--rounds 20" goes to the main job.

PYTHON ?= python3
VENV = .venv/bin
SETUP = .venv/installed

# Two computations of one number are compared: what passes on this machine's vector instructions must pass without.
NUMBERS = tests/parity $(addprefix tests/unit/test_,foundation.py emulator.py proxy.py vit_emulator.py) \
	--ignore tests/parity/test_memory_model.py --ignore tests/parity/test_embedded_models.py

.PHONY: run test full parity-elsewhere parity-plain parity-avx2 check bench
run: $(SETUP)
	$(VENV)/python workloads/large_scale.py --fleet.memory-scale 0.045 --rounds 8 --evaluation.every 2 $(ARGS)

test: check
	$(VENV)/pytest
	$(MAKE) parity-plain

full: test parity-avx2
	FEDPEAT_MEMORY_SETTINGS=40 $(VENV)/pytest tests/parity/test_memory_model.py

parity-elsewhere: parity-plain parity-avx2

parity-plain: $(SETUP)
	ATEN_CPU_CAPABILITY=default $(VENV)/pytest $(NUMBERS)

parity-avx2: $(SETUP)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(VENV)/pytest $(NUMBERS)

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
